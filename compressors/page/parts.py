"""What a page consists of: sections of text, tables, figures and code."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from markupsafe import Markup


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    kind: ClassVar[str] = "text"
    text: str
    warning: bool = False


@dataclass(frozen=True)
class Facts:
    """Names with their values, in large type."""

    kind: ClassVar[str] = "facts"
    items: Sequence[tuple[str, str, str]]
    """Name, value and a remark."""


@dataclass(frozen=True)
class Table:
    """A table; the first column names the rows."""

    kind: ClassVar[str] = "table"
    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    numbers: bool = True
    """Whether the columns after the first are flush right."""
    folded: bool = False
    """Whether the page shows it only on request; printed pages leave it out."""


@dataclass(frozen=True)
class Figures:
    """Figures, side by side where the page is wide enough."""

    kind: ClassVar[str] = "figures"
    items: Sequence[tuple[Markup, str]]
    """SVG and caption."""


@dataclass(frozen=True)
class Code:
    """Text in a fixed-width font."""

    kind: ClassVar[str] = "code"
    text: str
    summary: str = ""
    """If given, the page shows the text only on request, under this title."""


Part = Text | Facts | Table | Figures | Code


@dataclass(frozen=True)
class Section:
    """A part of the page with a heading."""

    id: str
    title: str
    parts: Sequence[Part]


def figures(*items: tuple[str, str] | None) -> list[Part]:
    """Return a row of figures, SVG and caption each; nothing if all are None."""
    found = [(Markup(svg), caption) for svg, caption in filter(None, items)]  # made by `Page.svg`
    return [Figures(found)] if found else []


def tables(caption: str, head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[Part]:
    """Return a table of numbers; nothing without rows."""
    found = [*rows]
    return [Table(caption, head, found)] if found else []
