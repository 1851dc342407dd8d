"""How good models are, side by side, as tables."""

from typing import Any

from lrc.cli.cells import OUT, as_measured, as_number, as_size, new_table


def print_comparison(evaluation: dict[str, Any]) -> None:
    """Print what dense and compressed model score."""
    rows = []
    for name, p in evaluation["perplexity"].items():
        change = "" if p["ratio"] is None else f"x {p['ratio']:.3f}"
        rows.append(
            (f"perplexity {name}", as_number(p["dense"]), as_number(p["compressed"]), change)
        )
    for task, metrics in evaluation["tasks"].items():
        for metric, v in metrics.items():
            if not isinstance(v, dict):
                continue
            recovery = "" if v["recovery"] is None else f"{v['recovery']:.1f} % of dense"
            rows.append(
                (
                    f"{task} {metric}",
                    as_measured(v["dense"], v["stderr"]["dense"]),
                    as_measured(v["compressed"], v["stderr"]["compressed"]),
                    recovery,
                )
            )
    if not rows:
        return
    table = new_table("quality")
    for column in ("", "dense", "compressed", ""):
        table.add_column(column, justify="right" if column else "left")
    for row in rows:
        table.add_row(*row)
    OUT.print(table)


def print_baselines(report: dict[str, Any]) -> None:
    """Print size against perplexity of the result and of plain alternatives, largest first."""
    evaluation = report["evaluation"]
    if not evaluation.get("alternatives"):  # reports of earlier versions have none
        return
    sizes = report["size"]["model"]["tensor_bytes"]
    texts = evaluation["perplexity"]
    rows = [
        (each["name"], each["bytes"], [each["perplexity"][text] for text in texts])
        for each in evaluation["alternatives"]
    ]
    for name, key in (("dense", "dense"), ("[bold]this result[/]", "compressed")):
        values = [entry[key] for entry in texts.values()]
        if None not in values:
            rows.append((name, sizes[key], values))
    table = new_table("beside plain alternatives")
    for column in ("", "tensors", "of dense", *(f"perplexity {text}" for text in texts)):
        table.add_column(column, justify="right" if column else "left")
    for name, size, values in sorted(rows, key=lambda row: -row[1]):
        cells = ["not finite" if value is None else as_number(value) for value in values]
        table.add_row(name, as_size(size), f"{size / sizes['dense']:.1%}", *cells)
    OUT.print(table)
    OUT.print(evaluation["verdict"])


def print_evaluation(blocks: dict[str, Any]) -> None:
    """Print one column a checkpoint, one row a measure."""
    table = new_table("")
    table.add_column("")
    for checkpoint in blocks:
        table.add_column(checkpoint, justify="right", overflow="fold")
    first = next(iter(blocks.values()))
    for name, p in first["perplexity"].items():
        cells = [as_number(block["perplexity"][name]["perplexity"]) for block in blocks.values()]
        table.add_row(f"perplexity {name} ({p['tokens']:,} tokens)", *cells)
    for task, metrics in first["tasks"].items():
        for metric, v in metrics.items():
            if not isinstance(v, dict):
                continue
            values = [block["tasks"][task][metric] for block in blocks.values()]
            table.add_row(
                f"{task} {metric}", *[as_measured(v["value"], v["stderr"]) for v in values]
            )
    OUT.print(table)
