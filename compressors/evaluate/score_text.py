"""Scores as sentences write them."""


def four_digits(value: float) -> str:
    """Format a score with four significant digits, and thousands without an exponent.

    >>> four_digits(18.96616), four_digits(0.00012345), four_digits(48613.2)
    ('18.97', '0.0001234', '48,613')
    """
    return f"{value:,.0f}" if 1e4 <= abs(value) < 1e9 else f"{value:.4g}"
