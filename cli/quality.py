"""Scores of models as tables, and the formatting that all tables share."""

import sys
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lrc.compressors.page.number_text import score_text
from lrc.configs.size import size_text

# A pipe or a file is not 80 columns wide.
OUT = Console(highlight=False, width=None if sys.stdout.isatty() else 160)


def new_table(title: str, *columns: str) -> Table:
    """Return a table without lines; the first column is flush left, the others right."""
    table = Table(title=title or None, title_justify="left", header_style="bold", box=None)
    for column in columns:
        table.add_column(column, justify="right" if table.columns else "left", overflow="fold")
    return table


def as_perplexity(value: float | None, error: float | None) -> str:
    """Format a perplexity with its standard error, if known; empty if None."""
    return "" if value is None else score_text(value, error)


def as_score(value: float | None, error: float | None) -> str:
    """Format a score with its standard error, if known; empty if None."""
    if value is None:
        return ""
    return f"{value:.4f}" + (f" ± {error:.4f}" if error is not None else "")


def as_percentage(fraction: float, error: float | None) -> str:
    """Format a fraction in percent, with its standard error, if known."""
    return f"{fraction:.2%}" + (f" ± {error:.2%}" if error is not None else "")


def print_comparison(evaluation: dict[str, Any]) -> None:
    """Print the scores of the dense and the compressed model, and the comparison of both."""
    table = new_table("quality", "", "dense", "compressed", "")
    for name, p in evaluation["perplexity"].items():
        change = "" if p["ratio"] is None else f"x {p['ratio']:.3f}"
        # Reports of earlier versions do not say it.
        domain = {True: "in domain", False: "other text"}.get(p.get("in_domain"), "")
        errors = p.get("stderr", {"dense": None, "compressed": None})
        table.add_row(
            f"perplexity {name}",
            *(as_perplexity(p[model], errors[model]) for model in ("dense", "compressed")),
            ", ".join(filter(None, [change, domain])),
        )
    for task, metrics in evaluation["tasks"].items():
        for metric, v in metrics.items():
            scores = [as_score(v[model], v["stderr"][model]) for model in ("dense", "compressed")]
            recovery = "" if v["recovery"] is None else f"{v['recovery']:.1f} % of dense"
            table.add_row(f"{task} {metric}", *scores, recovery)
    if table.rows:
        OUT.print(table)
    # Reports of earlier versions have none of these.
    _print_agreement(evaluation.get("kl", {}))
    if gap := evaluation.get("domain_gap"):
        OUT.print(f"[yellow]warning[/]: {escape(gap)}")
    for each in evaluation.get("generations", []):
        _print_generation(each)


def _print_agreement(kl: dict[str, Any]) -> None:
    """Print how closely the compressed model predicts what the dense model predicts."""
    columns = ["KL(dense || compressed)", "KL(compressed || dense)", "top-1 agreement"]
    table = new_table("predictions compared with the dense model, nats per token", "", *columns)
    for name, entry in kl.items():
        table.add_row(f"{name} ({entry['tokens']:,} tokens)", *agreement_cells(entry))
        for part in entry["positions"]:
            first, last = part["context"]
            numbers = f"{first:,} to {last:,} tokens" if first < last else _tokens(first)
            table.add_row(f"  after {numbers}", *agreement_cells(part))
    if table.rows:
        OUT.print(table)


def agreement_cells(entry: dict[str, Any]) -> list[str]:
    """Format both divergences and the agreement, with their standard errors."""
    errors = entry["stderr"] or dict.fromkeys(("forward", "reverse", "agreement"))
    return [
        *(as_score(entry[key], errors[key]) for key in ("forward", "reverse")),
        as_percentage(entry["agreement"], errors["agreement"]),
    ]


def _tokens(count: int) -> str:
    return "1 token" if count == 1 else f"{count:,} tokens"


def _print_generation(each: dict[str, Any]) -> None:
    """Print the continuations of a prompt, one below the other."""
    first, count = each["first_difference"], each["new_tokens"]
    where = "the same text" if first is None else f"differ after {_tokens(first)}"
    numbers = f"{count['dense']:,} and {count['compressed']:,} new tokens"
    OUT.print(f"[bold]prompt[/]: {escape(each['prompt'])} [dim]({numbers}, {where})[/]")
    for model in ("dense", "compressed"):
        OUT.print(f"  {model}: {escape(each[model].strip())}")


def print_baselines(report: dict[str, Any]) -> None:
    """Print size and perplexity of the result and of its baselines, largest first."""
    evaluation = report["evaluation"]
    if not evaluation["baselines"]:
        return
    sizes = report["size"]["model"]["tensor_bytes"]
    texts = evaluation["perplexity"]
    rows = [
        (each["name"], each["bytes"], [each["perplexity"][text] for text in texts])
        for each in evaluation["baselines"]
    ]
    for name, key in (("dense", "dense"), ("[bold]this result[/]", "compressed")):
        values = [entry[key] for entry in texts.values()]
        if None not in values:
            rows.append((name, sizes[key], values))
    columns = ["", "tensors", "of dense", *(f"perplexity {text}" for text in texts)]
    table = new_table("comparison with baselines", *columns)
    for name, size, values in sorted(rows, key=lambda row: -row[1]):
        table.add_row(
            name, size_text(size), f"{size / sizes['dense']:.1%}", *map(score_text, values)
        )
    OUT.print(table)
    OUT.print(evaluation["baseline_comparison"])


def print_evaluation(blocks: dict[str, Any]) -> None:
    """Print the scores of several checkpoints, one column each."""
    table = new_table("", "", *blocks)
    models = list(blocks.values())
    for name in dict.fromkeys(name for block in models for name in block["perplexity"]):
        found = [block["perplexity"].get(name) for block in models]
        tokens = next(p["tokens"] for p in found if p)
        cells = ["" if p is None else as_perplexity(p["perplexity"], p["stderr"]) for p in found]
        table.add_row(f"perplexity {name} ({tokens:,} tokens)", *cells)
    for name in dict.fromkeys(name for block in models for name in block["kl"]):
        entries = [block["kl"].get(name) for block in models]
        tokens = next(entry["tokens"] for entry in entries if entry)
        columns = [agreement_cells(entry) if entry else [""] * 3 for entry in entries]
        for number, title in enumerate(("KL(first || this)", "KL(this || first)", "agreement")):
            cells = [column[number] for column in columns]
            table.add_row(f"{title} {name} ({tokens:,} tokens)", *cells)
    rows = dict.fromkeys(
        (task, metric)
        for block in models
        for task, metrics in block["tasks"].items()
        for metric in metrics
    )
    for task, metric in rows:
        values = [block["tasks"].get(task, {}).get(metric) for block in models]
        cells = ["" if v is None else as_score(v["value"], v["stderr"]) for v in values]
        table.add_row(f"{task} {metric}", *cells)
    OUT.print(table)
