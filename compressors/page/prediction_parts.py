"""Tables about the predictions of the compressed model next to those of the dense one."""

from collections.abc import Mapping
from typing import Any

from lrc.compressors.page.number_text import nats_text, percent_text
from lrc.compressors.page.parts import Part, Table, tables


def divergences(kl: Mapping[str, Any]) -> list[Part]:
    """Return divergences and agreement of both models by text."""
    head = [
        "text",
        "KL(dense || compressed)",
        "KL(compressed || dense)",
        "top-1 agreement",
    ]
    rows = [
        [
            f"{name}, {entry['tokens']:,} tokens",
            *(
                _with_error(nats_text(entry[key]), entry["stderr"], key)
                for key in ("forward", "reverse")
            ),
            _agreement(entry),
        ]
        for name, entry in kl.items()
    ]
    caption = "Predictions compared with the dense model, nats per token ± standard error"
    return [*tables(caption, head, rows), *_positions(kl)]


def _positions(kl: Mapping[str, Any]) -> list[Part]:
    """Return the same by the number of tokens before a prediction, on request."""
    rows = [
        [
            f"{name}, after {each['context'][0]:,} to {each['context'][1]:,} tokens",
            *(
                _with_error(nats_text(each[key]), each["stderr"], key)
                for key in ("forward", "reverse")
            ),
            _agreement(each),
        ]
        for name, entry in kl.items()
        for each in entry["positions"]
    ]
    if not rows:
        return []
    head = ["predictions", "KL(dense || compressed)", "KL(compressed || dense)", "top-1 agreement"]
    caption = "Predictions compared by the number of tokens before them"
    return [Table(caption, head, rows, folded=True)]


def _agreement(entry: Mapping[str, Any]) -> str:
    error = (entry["stderr"] or {}).get("agreement")
    text = percent_text(entry["agreement"])
    return text if error is None else f"{text} ± {percent_text(error)}"


def _with_error(text: str, errors: Mapping[str, float] | None, key: str) -> str:
    return text if errors is None else f"{text} ± {nats_text(errors[key])}"
