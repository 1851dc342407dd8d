"""Numbers as the page shows them."""

from math import isfinite


def score_text(value: float | None, error: float | None = None) -> str:
    """Format a perplexity; None stands for one that is not finite.

    A standard error is written in the notation of the value: 48,613 ± 144.
    """
    if value is None:
        return "not finite"
    notation = ".3f" if value < 1e4 else ",.0f" if value < 1e9 else ".3e"
    return " ± ".join(format(each, notation) for each in (value, error) if each is not None)


def nats_text(value: float | None) -> str:
    """Format a divergence or an increase of the loss; None stands for one that is not finite."""
    if value is None:
        return "not finite"
    return f"{value:.4f}" if value == 0 or abs(value) >= 1e-3 else f"{value:.1e}"


def percent_text(fraction: float | None) -> str:
    """Format a fraction as a percentage; empty if None."""
    return "" if fraction is None else f"{100 * fraction:.1f} %"


def seconds_text(seconds: float) -> str:
    """Format a duration."""
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 120 else f"{minutes / 60:.1f} h"


def short_text(value: float) -> str:
    """Format a number for a cell of a heat map, in at most six characters.

    >>> [short_text(x) for x in (576, 4.1279, 0.0312, 0.00097, 0.00002, 0)]
    ['576', '4.13', '0.031', '0.001', '2e-05', '0']
    """
    if value == int(value):
        return f"{value:.0f}"
    if not isfinite(value) or abs(value) < 9.5e-4:  # which is not rounded to 0.001
        return f"{value:.0e}"
    return f"{value:.2f}" if abs(value) >= 0.1 else f"{value:.3f}"
