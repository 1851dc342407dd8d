"""Where results are printed, and how their numbers are written."""

import sys

from rich.console import Console
from rich.table import Table

# A pipe or a file is not 80 columns wide.
OUT = Console(highlight=False, width=None if sys.stdout.isatty() else 160)


def new_table(title: str) -> Table:
    """Return a table without lines."""
    return Table(title=title or None, title_justify="left", header_style="bold", box=None)


def as_size(n_bytes: int | None) -> str:
    """Write bytes in the unit that suits them."""
    if n_bytes is None:
        return "unknown"
    if n_bytes < 2**20:
        return f"{n_bytes / 2**10:.1f} KiB"
    return f"{n_bytes / 2**30:.2f} GiB" if n_bytes >= 2**30 else f"{n_bytes / 2**20:.1f} MiB"


def as_number(value: float | None) -> str:
    """Write a number that is nowhere near zero; nothing if there is none."""
    return "" if value is None else f"{value:.3f}" if value < 1e4 else f"{value:.3e}"


def as_measured(value: float | None, error: float | None) -> str:
    """Write a score and, where it is known, its standard error."""
    if value is None:
        return ""
    return f"{value:.4f}" + (f" ± {error:.4f}" if error is not None else "")
