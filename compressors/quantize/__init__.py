"""Rounding of matrices to integers of few bits, by what their inputs notice."""

from lrc.compressors.quantize.branch import branch
from lrc.compressors.quantize.factors import (
    RoundedPair,
    RoundedPivot,
    round_pair,
    round_pivot,
)
from lrc.compressors.quantize.gauges import gauges
from lrc.compressors.quantize.gptq import gptq
from lrc.compressors.quantize.grid import Grid, ScaleOverflow, find_grid, round_to
from lrc.compressors.quantize.group_sparse import GroupSparseWeight, round_groups
from lrc.compressors.quantize.rounded import Rounded
from lrc.compressors.quantize.rtn import rtn
from lrc.compressors.quantize.values import round_sparse, round_values
from lrc.compressors.quantize.weight import Rounder, round_weight

__all__ = [
    "Grid",
    "GroupSparseWeight",
    "Rounded",
    "RoundedPair",
    "RoundedPivot",
    "Rounder",
    "ScaleOverflow",
    "branch",
    "find_grid",
    "gauges",
    "gptq",
    "round_groups",
    "round_pair",
    "round_pivot",
    "round_sparse",
    "round_to",
    "round_values",
    "round_weight",
    "rtn",
]
