"""From a budget in stored bits to a rank."""

from lrc.compressors.layers import LowRank


def rank_for_budget(d_out: int, d_in: int, keep: float, *, bits: int) -> int:
    """Return the largest rank whose factors take at most `keep` of the dense bits; 0 if none.

    Parameters
    ----------
    d_out, d_in : int
        Shape of the weight.
    keep : float
        Stored bits over dense bits, in (0, 1].
    bits : int
        Bits of one number, dense and in the factors.
    """
    budget = int(keep * d_out * d_in * bits)
    overhead = LowRank.stored_bits(d_out, d_in, 0, bits=bits)
    per_rank = LowRank.stored_bits(d_out, d_in, 1, bits=bits) - overhead
    return max(0, min(d_out, d_in, (budget - overhead) // per_rank))
