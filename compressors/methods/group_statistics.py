"""Statistics of weights that are solved together."""

from collections.abc import Collection, Sequence

import torch

from lrc.compressors.solvers.moments import Moment, Statistics


def few_tokens(n_tokens: int) -> str:
    """Return the reason why a weight has no statistics, although it may have received tokens."""
    return (
        f"saw {'only ' * (n_tokens > 0)}{n_tokens or 'no'} calibration token{'s' * (n_tokens > 1)}"
    )


def combined(known: Sequence[Statistics]) -> Statistics:
    """Return the statistics of weights stacked along their outputs.

    For several weights that is the sum of their input moments; no method that shares a factor needs
    more.

    Raises
    ------
    ValueError
        If several weights have only images of their moments.
    """
    if len(known) == 1:
        return known[0]
    moments = [each.inputs.whole() for each in known if each.inputs is not None]
    n_tokens = max(each.n_tokens for each in known)
    return Statistics(n_tokens, Moment.of(torch.stack(moments).sum(dim=0)))


def missing_reason(known: Sequence[Statistics], needed: Collection[str]) -> str | None:
    """Return why weights cannot be compressed with these statistics; None if nothing is missing.

    Of several weights that are solved together, one must have them.
    """
    missing = set.intersection(*({*each.missing(needed)} for each in known))
    if not missing:
        return None
    if all(each.n_tokens == 0 for each in known) or "inputs" in missing:
        return f"{few_tokens(min(each.n_tokens for each in known))}; stays dense"
    return f"calibration has no {', '.join(sorted(missing))} for it; stays dense"


def has_zero_statistics(known: Sequence[Statistics]) -> bool:
    """Return whether all inputs or all gradients of a weight were zero.

    The metric then leaves that side out, so that errors are not comparable with others.
    """
    for each in known:
        moments = [each.inputs, each.gradients]
        sums = [each.input_magnitude, each.row_fisher]
        if any(m is not None and m.empty for m in moments):
            return True
        if any(s is not None and not bool(s.any()) for s in sums):
            return True
    return False
