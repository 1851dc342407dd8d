"""Run-time forms of a compressed linear layer; each knows its own bits and its dense equivalent."""

from lrc.compressors.layers.low_rank import LowRank

__all__ = ["FORMS", "LowRank"]

FORMS = {"low_rank": LowRank}
