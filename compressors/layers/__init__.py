"""Run-time forms of a compressed linear layer; each knows its own bits and its dense equivalent."""

from lrc.compressors.layers.dictionary import SparseDictionary
from lrc.compressors.layers.form import Form, RankForm, Sizes, Spec
from lrc.compressors.layers.low_rank import LowRank
from lrc.compressors.layers.pivoted import PivotedLowRank
from lrc.compressors.layers.shared import SharedLowRank
from lrc.compressors.layers.sparse import Sparse

__all__ = [
    "FORMS",
    "Form",
    "LowRank",
    "PivotedLowRank",
    "RankForm",
    "SharedLowRank",
    "Sizes",
    "Sparse",
    "SparseDictionary",
    "Spec",
]

FORMS: dict[str, type[Form]] = {
    "low_rank": LowRank,
    "pivoted_low_rank": PivotedLowRank,
    "shared_low_rank": SharedLowRank,
    "sparse": Sparse,
    "dictionary": SparseDictionary,
}
