"""Decomposition: a weight and what calibration knows of it in, a rate-distortion curve out."""

from lrc.compressors.decompose.compensate import PrefixMoments, refit_target
from lrc.compressors.decompose.method import Coded, CodedMethod, Method
from lrc.compressors.decompose.methods import METHODS, LowRankMethod, Metric
from lrc.compressors.decompose.moments import Moment, Statistics
from lrc.compressors.decompose.shared import shared_spectrum, split, split_codes
from lrc.compressors.decompose.spectrum import Factors, Spectrum, energies_only, spectrum

__all__ = [
    "METHODS",
    "Coded",
    "CodedMethod",
    "Factors",
    "LowRankMethod",
    "Method",
    "Metric",
    "Moment",
    "PrefixMoments",
    "Spectrum",
    "Statistics",
    "energies_only",
    "refit_target",
    "shared_spectrum",
    "spectrum",
    "split",
    "split_codes",
]
