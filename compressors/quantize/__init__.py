"""Rounding of matrices to integers of few bits, by what their inputs notice."""

from lrc.compressors.quantize.standin import *
