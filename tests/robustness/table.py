"""The tables of ``docs/models.md``: what becomes of every model family."""

import re
from collections.abc import Iterable

import transformers
from tests.robustness.family_check import Outcome

from lrc.compressors.export import gguf_families
from lrc.compressors.slicing import families as rotations

MARK = "<!-- written by tests.robustness.sweep -->"
HEADINGS = {
    "served": "### Supported",
    "rejected": "### Rejected by `lrc plan`",
    "not built": "### Not tested",
    "failed": "### Failed",
}
COLUMNS = ["`model_type`", "class", "matrices", "`drop`", "`slicegpt`", "GGUF"]
Rows = dict[str, dict[str, str]]
"""Status -> family -> row."""


def read_rows(page: str, mark: str = MARK) -> Rows:
    """Return the rows of the tables after the mark of a page."""
    rows: Rows = {status: {} for status in HEADINGS}
    status = None
    for line in page.partition(mark)[2].splitlines():
        if line.startswith("#"):
            status = next((s for s, heading in HEADINGS.items() if heading == line), None)
        elif status and (row := re.match(r"\| ([\w.-]+) \|", line)):
            rows[status][row[1]] = line
    return rows


def with_outcomes(page: str, outcomes: Iterable[Outcome], *, everything: bool) -> str:
    """Return a page with the rows of these families; all others are removed if `everything`."""
    rows: Rows = {status: {} for status in HEADINGS} if everything else read_rows(page)
    for outcome in outcomes:
        for families in rows.values():
            families.pop(outcome.family, None)
        rows[outcome.status][outcome.family] = _row(outcome)
    total = sum(map(len, rows.values()))
    parts = [
        f"{page.partition(MARK)[0]}{MARK}",
        f"With transformers {transformers.__version__}, {len(rows['served'])} of {total} model "
        "types are supported.",
    ]
    for status, families in rows.items():
        if families:
            columns = COLUMNS if status == "served" else ["`model_type`", "reason"]
            head = [markdown_row(columns), "|---" * len(columns) + "|"]
            parts += [HEADINGS[status], "\n".join([*head, *map(families.get, sorted(families))])]
    return "\n\n".join(parts) + "\n"


def _row(outcome: Outcome) -> str:
    kind = outcome.family
    if outcome.status != "served":
        return markdown_row([kind, short_reason(outcome.reason or "; ".join(outcome.failures))])
    return markdown_row(
        [
            kind,
            outcome.model,
            f"{outcome.compressed:.0%}",
            f"no: {short_reason(outcome.drop)}" if outcome.drop else "yes",
            _yes(kind in rotations.FAMILIES),
            _yes(kind in gguf_families.FAMILIES),
        ]
    )


def markdown_row(cells: list[str]) -> str:
    """Return a row of a table."""
    return f"| {' | '.join(cells)} |"


def _yes(condition: bool) -> str:
    return "yes" if condition else "no"


def short_reason(reason: str) -> str:
    """Return the reason of an error message without the parts that all of them share."""
    text = " ".join(reason.split())
    text = re.sub(r"^[\w.\[\]]+: ", "", text)
    text = re.sub(r"^\S+ \(model_type '[^']*'\) is not supported yet: ", "", text)
    text = re.sub(r"; (supported are|use another method).*", "", text)
    text = re.sub(r"\S*/source\b", "the folder", text)
    text = text if len(text) <= 160 else f"{text[:160].rsplit(' ', 1)[0]} ..."
    return text.replace("|", "\\|")
