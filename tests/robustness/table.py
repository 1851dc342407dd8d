"""The table of the documentation: what becomes of every model family."""

import re
from collections.abc import Iterable

import transformers
from tests.robustness.family_check import Outcome


def table(outcomes: Iterable[Outcome]) -> str:
    """Return the Markdown of three tables: served, rejected, and not tested."""
    by_status: dict[str, list[Outcome]] = {}
    for outcome in sorted(outcomes, key=lambda outcome: outcome.family):
        by_status.setdefault(outcome.status, []).append(outcome)
    served, rejected, not_built, failed = (
        by_status.get(status, []) for status in ("served", "rejected", "not built", "failed")
    )
    parts = [
        f"With transformers {transformers.__version__}, {len(served)} of "
        f"{sum(map(len, by_status.values()))} families are supported.",
        "### Supported",
        "\n".join(
            [
                "| `model_type` | class | compressible part of the layers | removing layers |",
                "|---|---|---|---|",
                *(f"| {o.family} | {o.model} | {o.compressed:.0%} | {_drop(o)} |" for o in served),
            ]
        ),
        "### Rejected by `lrc plan`",
        _reasons(rejected),
        "### Not tested",
        _reasons(not_built),
    ]
    if failed:
        parts += ["### Failed", _reasons(failed)]
    return "\n\n".join(parts) + "\n"


def _reasons(outcomes: list[Outcome]) -> str:
    rows = [f"| {o.family} | {_short(o.reason or '; '.join(o.failures))} |" for o in outcomes]
    return "\n".join(["| `model_type` | reason |", "|---|---|", *rows])


def _drop(outcome: Outcome) -> str:
    return f"no: {_short(outcome.drop)}" if outcome.drop else "yes"


def _short(reason: str) -> str:
    """Return the reason of an error message, without the parts that all of them share."""
    text = " ".join(reason.split())
    text = re.sub(r"^[\w.\[\]]+: ", "", text)
    text = re.sub(r"^\S+ \(model_type '[^']*'\) is not supported yet: ", "", text)
    text = re.sub(r"; (supported are|use another method).*", "", text)
    text = re.sub(r"\S*/source\b", "the folder", text)
    text = text if len(text) <= 160 else f"{text[:160].rsplit(' ', 1)[0]} ..."
    return text.replace("|", "\\|")
