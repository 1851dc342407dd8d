"""Rounding of matrices to integers of few bits, by what their inputs notice."""

from lrc.compressors.quantize.gptq import gptq
from lrc.compressors.quantize.grid import Grid, find_grid, round_to
from lrc.compressors.quantize.rounded import Rounded
from lrc.compressors.quantize.rtn import rtn
from lrc.compressors.quantize.standin import *
from lrc.compressors.quantize.weight import Rounder, round_weight

__all__ = ["Grid", "Rounded", "Rounder", "find_grid", "gptq", "round_to", "round_weight", "rtn"]
