"""Products with compressed weights that are faster than rebuilding the weight for every call."""

from lrc.compressors.kernels.failures import run_or_restore
from lrc.compressors.kernels.fast_path import FastPath, needs_gradients, optimize, slow_layers
from lrc.compressors.kernels.implementations import Entry, Need, select

__all__ = [
    "Entry",
    "FastPath",
    "Need",
    "needs_gradients",
    "optimize",
    "run_or_restore",
    "select",
    "slow_layers",
]
