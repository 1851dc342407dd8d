"""Run-time forms of a compressed linear layer; each knows its own bits and its dense equivalent."""

from lrc.compressors.layers.dictionary import SparseDictionary
from lrc.compressors.layers.embedded import EmbeddedIntegers, TiedHead
from lrc.compressors.layers.form import Form, Sizes, Spec
from lrc.compressors.layers.group_sparse import GroupSparse
from lrc.compressors.layers.integers import Integers, IntegersPlusLowRank
from lrc.compressors.layers.low_rank import LowRank
from lrc.compressors.layers.pivoted import PivotedLowRank
from lrc.compressors.layers.rank_form import RankForm
from lrc.compressors.layers.scheme import Scheme
from lrc.compressors.layers.shared import SharedDictionary, SharedLowRank, Sharing
from lrc.compressors.layers.sparse import Sparse
from lrc.compressors.layers.sums import LowRankPlusSparse

__all__ = [
    "FORMS",
    "MEMBERS",
    "EmbeddedIntegers",
    "Form",
    "GroupSparse",
    "Integers",
    "IntegersPlusLowRank",
    "LowRank",
    "LowRankPlusSparse",
    "PivotedLowRank",
    "RankForm",
    "Scheme",
    "SharedDictionary",
    "SharedLowRank",
    "Sharing",
    "Sizes",
    "Sparse",
    "SparseDictionary",
    "Spec",
    "TiedHead",
]

FORMS: dict[str, type[Form]] = {
    "low_rank": LowRank,
    "pivoted_low_rank": PivotedLowRank,
    "shared_low_rank": SharedLowRank,
    "sparse": Sparse,
    "low_rank_plus_sparse": LowRankPlusSparse,
    "dictionary": SparseDictionary,
    "shared_dictionary": SharedDictionary,
    "integers": Integers,
    "integers_plus_low_rank": IntegersPlusLowRank,
    "group_sparse": GroupSparse,
    "embedded_integers": EmbeddedIntegers,
}
MEMBERS: dict[str, str] = {"low_rank": "shared_low_rank", "dictionary": "shared_dictionary"}
"""Form of the first of a group -> that of those which borrow from it."""
