"""Rounding of matrices to integers of few bits, by what their inputs notice."""

from lrc.compressors.quantize.gptq import gptq
from lrc.compressors.quantize.grid import Grid, find_grid, round_to
from lrc.compressors.quantize.rounded import Rounded
from lrc.compressors.quantize.rtn import rtn

__all__ = ["Grid", "Rounded", "find_grid", "gptq", "round_to", "rtn"]
