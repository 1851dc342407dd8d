"""Run-time forms of a compressed linear layer; each knows its own bits and its dense equivalent."""

from lrc.compressors.layers.form import Form, RankForm, Sizes, Spec
from lrc.compressors.layers.low_rank import LowRank
from lrc.compressors.layers.pivoted import PivotedLowRank
from lrc.compressors.layers.shared import SharedLowRank

__all__ = [
    "FORMS",
    "Form",
    "LowRank",
    "PivotedLowRank",
    "RankForm",
    "SharedLowRank",
    "Sizes",
    "Spec",
]

FORMS: dict[str, type[Form]] = {
    "low_rank": LowRank,
    "pivoted_low_rank": PivotedLowRank,
    "shared_low_rank": SharedLowRank,
}
