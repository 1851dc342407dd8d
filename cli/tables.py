"""Plans, reports and checkpoints as tables on stdout."""

import re
from dataclasses import asdict
from typing import Any

from lrc.cli.quality import OUT, as_size, new_table, print_baselines, print_comparison
from lrc.compressors.estimate import Estimate
from lrc.compressors.planning.plan import Matrix, Plan

LAYER_NUMBER = re.compile(r"\.\d+\.")


def print_plan(plan: Plan, expected: Estimate, *, every: bool) -> None:
    """Print a plan: matrices, totals, and the estimated time, memory and disk space.

    Matrices that differ only in the number of their layer share a row, unless `every` is set.
    """
    for cut in plan.slices:
        _print_cut(asdict(cut))
    if plan.targeted:
        _print_matrices(plan, every=every)
    _print_sizes(plan.to_json(), plan.compressed_bytes, matrices=bool(plan.targeted))
    print_warnings(plan)
    parts = ", ".join(f"{stage} {seconds:.0f} s" for stage, seconds in expected.seconds.items())
    OUT.print(
        f"estimate: {parts}; memory {as_size(expected.memory_bytes)}; disk "
        f"{as_size(expected.disk_bytes)} while it runs"
    )
    if expected.not_estimated:
        OUT.print(f"not estimated: {', '.join(expected.not_estimated)}")


def _print_matrices(plan: Plan, *, every: bool) -> None:
    methods = sorted({m.method for m in plan.targeted})
    one = f", {methods[0]}" if len(methods) == 1 else ""
    table = new_table(f"{plan.source} ({plan.architecture}, {plan.dtype}{one})")
    table.add_column("matrix", overflow="fold")
    columns = ("layers", "shape", "method", "form", "size", "MiB", "kept")
    for column in columns:
        if column != "method" or not one:
            table.add_column(column, justify="right", no_wrap=column != "form", overflow="fold")
    for name, group in _alike(plan.targeted, every=every).items():
        m = group[0]
        bits = sum(m.bits for m in group)
        table.add_row(
            name[0],
            str(len(group)),
            f"{m.shape[0]} x {m.shape[1]}",
            *([] if one else [m.method]),
            _form(m),
            "pending" if m.pending else m.written,
            "" if m.pending else f"{bits / 8 / 2**20:.2f}",
            "" if m.pending else f"{bits / sum(m.source_bits for m in group):.1%}",
        )
    OUT.print(table)
    for allocation in sorted({m.pending for m in plan.matrices if m.pending}):
        OUT.print(f"pending: the {allocation} allocation will choose within the budget")


def print_warnings(plan: Plan) -> None:
    """Print what is planned but not advised."""
    for warning in plan.warnings:
        OUT.print(f"[yellow]warning[/]: {warning}")


def print_report(report: dict[str, Any], output: str) -> None:
    """Print the summary of a finished run."""
    size = report["size"]
    table = new_table("size", "", "dense", "compressed", "kept")
    targeted = {"dense": size["targeted"]["source_bits"], "compressed": size["targeted"]["bits"]}
    for name, pair, write in (
        ("parameters", size["model"]["parameters"], "{:,}".format),
        ("weight files", size["model"]["file_bytes"], as_size),
        ("targeted matrices", targeted, lambda bits: as_size(bits // 8)),
    ):
        dense, compressed = pair["dense"], pair["compressed"]
        if dense:
            table.add_row(name, write(dense), write(compressed), f"{compressed / dense:.1%}")
    OUT.print(table)
    for cut in report.get("slices", []):  # reports of earlier versions have none
        _print_cut(cut)
    if size["source"]["quantized"]:
        OUT.print(f"the source file is itself quantized: {as_size(size['source']['file_bytes'])}")
    print_comparison(report["evaluation"])
    print_baselines(report)
    fallbacks = [layer for layer in report["layers"] if layer["fallback"]]
    for layer in fallbacks[:10]:
        OUT.print(f"[yellow]fallback[/]: {layer['name']}: {layer['fallback']}")
    if len(fallbacks) > 10:
        OUT.print(f"... and {len(fallbacks) - 10} more fallbacks in report.json")
    seconds = report["timing"]["seconds"]
    OUT.print(
        f"{sum(seconds.values()):.0f} s ({', '.join(f'{k} {v:.0f}' for k, v in seconds.items())}), "
        f"peak memory {as_size(report['memory']['peak_rss_bytes'])}"
    )
    OUT.print(f"checkpoint: {output}/checkpoint   report: {output}/report.json")


def print_inspection(facts: dict[str, Any]) -> None:
    """Print the facts of a checkpoint."""
    columns = ("matrix", "shape", "form", "size") if facts["modules"] else ()
    table = new_table(f"{facts['path']} ({facts['architecture']})", *columns)
    for m in sorted(facts["modules"], key=lambda m: _natural(m["name"])):
        form = " ".join(filter(None, [m["form"], m["pattern"], m["scheme"]]))
        table.add_row(m["name"], f"{m['shape'][0]} x {m['shape'][1]}", form, m["written"])
    OUT.print(table if facts["modules"] else f"[bold]{table.title}[/]")
    for cut in facts["slices"] or []:
        _print_cut(cut)
    OUT.print(
        f"{facts['parameters']:,} parameters, {as_size(facts['file_bytes'])} of weights, format "
        f"version {facts['format_version']}"
        + (", every hash verified" if facts["verified"] else "")
    )
    if facts["totals"] and facts["modules"]:
        OUT.print(f"kept {facts['totals']['kept']:.1%} of the bits of the targeted matrices")
    if facts["environment"]:
        versions = facts["environment"]["versions"]
        OUT.print(
            f"made from {facts['recipe']['model']['path']} with lrc {versions['lrc']}, torch "
            f"{versions['torch']}, transformers {versions['transformers']}"
        )
    if facts["evaluation"]:
        print_comparison(facts["evaluation"])


def _form(m: Matrix) -> str:
    """Return form and pattern of a matrix, and the reason if it stays dense."""
    if m.pending and m.method == "mixed":
        return " ".join(filter(None, ["any", m.scheme]))
    form = " ".join(filter(None, [m.form, m.pattern, m.scheme]))
    return form if m.note is None else f"{form}: {m.note}"


def _alike(matrices: list[Matrix], *, every: bool) -> dict[tuple[str, ...], list[Matrix]]:
    """Group matrices by name without layer number and all other cells of their row."""
    groups: dict[tuple[str, ...], list[Matrix]] = {}
    for m in matrices:
        name = m.name if every else LAYER_NUMBER.sub(".*.", m.name, count=1)
        facts = (m.shape, m.method, _form(m), m.written)
        groups.setdefault((name, *map(str, facts)), []).append(m)
    return groups


def _natural(name: str) -> list[tuple[int, str]]:
    """Sort layer 10 after layer 9."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in name.split(".")]


def _print_cut(cut: dict[str, Any]) -> None:
    """Print what a slicing stage changes in the config, and the size."""
    numbers = {key: each for key, each in cut["config"].items() if isinstance(each[1], int)}
    changes = [f"{key} {before} -> {after}" for key, (before, after) in numbers.items()]
    shapes = cut["config"].get("shapes", [None, None])[1]
    if shapes:
        changes.append(f"{len(shapes)} linears with individual shapes")
    for key, each in cut["facts"].items():
        if isinstance(each, list) and len(each) == 2 and isinstance(each[1], list):
            changes.append(f"{key} {each[0]} -> {min(each[1])} to {max(each[1])}")
    before, after = cut["bytes"]
    sizes = f"{as_size(before)} -> {as_size(after)}"
    OUT.print(f"slice, {cut['method']}: {', '.join(changes)}; {sizes}")
    if "pending" in cut["facts"]:
        OUT.print(f"pending: {cut['facts']['pending']}; shown is an even split of the same size")


def _print_sizes(plan: dict[str, Any], compressed_bytes: int, *, matrices: bool) -> None:
    totals = plan["totals"]
    if matrices:
        kind = "budget" if any(m["pending"] for m in plan["matrices"]) else "kept"
        OUT.print(
            f"targeted matrices: {as_size(totals['source_bits'] // 8)} -> "
            f"{as_size(totals['bits'] // 8)} ({kind} {totals['kept']:.1%})"
        )
    OUT.print(
        f"whole model: {as_size(totals['dense_bytes'])} -> {as_size(compressed_bytes)}, "
        f"{totals['dense_parameters']:,} -> {totals['compressed_parameters']:,} parameters"
    )
    if plan["source_quantized"]:
        OUT.print(
            f"the source file is itself quantized and takes {as_size(plan['source_file_bytes'])}; "
            f"sizes above compare with the model at {plan['dtype']}"
        )
