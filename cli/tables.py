"""Plans, reports and checkpoints as tables on stdout."""

import re
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lrc.cli.bench_tables import print_slow_forms, print_slower_models
from lrc.cli.quality import OUT, new_table, print_baselines, print_comparison
from lrc.compressors.estimates.estimate import Estimate
from lrc.compressors.io.natural_order import natural
from lrc.compressors.planning.coverage import Coverage, plan_coverage
from lrc.compressors.planning.draft_speed import PredictedPair
from lrc.compressors.planning.measures import GGUF
from lrc.compressors.planning.plan import Plan
from lrc.compressors.planning.predicted_times import predicted_times
from lrc.compressors.planning.summary import WeightSummary, summarize
from lrc.compressors.planning.tasks import LayerTask
from lrc.configs.size import MIB, size_text, size_texts
from lrc.configs.sources import counts, described

LAYER_NUMBER = re.compile(r"\.\d+\.")
EXPERT_NUMBER = re.compile(r"(?<=experts)\.\d+\.")


def print_plan(plan: Plan, expected: Estimate, *, every: bool) -> None:
    """Print a plan: weights, totals, and the estimated time, memory and disk space.

    Weights that differ only in the number of their layer share a row, unless `every` is set.
    """
    for record in plan.slices:
        _print_slice(asdict(record))
    rows = summarize(plan)
    if rows:
        _print_weights(plan, rows, every=every)
    _print_experts(plan)
    given = plan.calibration["source"]
    if not isinstance(given, str):
        OUT.print(f"calibration: {_shares(given, plan.calibration['samples'], 'windows')}")
    for trained in plan.training:
        through = " through every layer" if trained.method == "block" else ""
        if trained.added_bytes:
            through += f"; adds up to {size_text(trained.added_bytes)} to the sizes below"
        if trained.steps is None:
            budget = f"{trained.minutes:g} minutes"
        else:
            budget = f"{trained.steps:,} steps, {trained.tokens:,} tokens"
        source = trained.options["source"] or given
        if not isinstance(source, str):
            shares = f" ({_shares(source, trained.tokens, 'tokens')})"
            through += shares
        OUT.print(f"{trained.kind}, {trained.method}: {budget}{through}")
    if plan.model.unchanged:
        kept = (f"{p.name} ({p.kind}, {size_text(p.bytes)})" for p in plan.model.unchanged)
        OUT.print(f"only the language model is compressed; unchanged: {', '.join(kept)}")
    _print_sizes(plan)
    if plan.elastic:
        _print_budgets(plan.elastic)
    print_pairs(plan.pairs)
    times = predicted_times(plan)
    if times is not None:
        print_times(times.to_json(), times.place, pending=times.pending)
    print_warnings(plan)
    parts = ", ".join(f"{stage} {seconds:.0f} s" for stage, seconds in expected.seconds.items())
    gpu = "" if expected.peak_gpu is None else f", GPU memory {size_text(expected.peak_gpu)}"
    each = f" of each of {expected.processes} processes" if expected.processes > 1 else ""
    OUT.print(
        f"estimate: {parts}; memory {size_text(expected.peak_host)}{gpu}{each}, disk "
        f"{size_text(expected.peak_disk)} while it runs"
    )
    if expected.not_estimated:
        OUT.print(f"not estimated: {', '.join(expected.not_estimated)}")


def _print_experts(plan: Plan) -> None:
    """Print how much of the calibration text is expected to reach an expert, or has."""
    experts = plan.experts
    if experts is None:
        return
    tokens = plan.calibration["samples"] * plan.calibration["length"]
    measured = plan_coverage(plan)
    text = (
        f"experts: {experts.experts} in each of {experts.layers} layers, {experts.per_token} per "
        "token"
    )
    if measured is not None:
        text += f"; {measured.text}"
    elif experts.needed:
        text += (
            f"; on average {experts.expected(tokens):,.0f} of {tokens:,} calibration tokens each, "
            f"{experts.needed:,} needed"
        )
    OUT.print(text)


def print_unmeasured(products: int, device: str) -> None:
    """Print what has to be measured before a budget in time can be divided."""
    OUT.print(
        f"pending: `lrc compress` first measures {products} products on this machine ({device}); "
        "`lrc latency` makes a table of their times for 'latency_table'"
    )


def print_times(times: dict[str, Any], place: str, *, pending: bool = False) -> None:
    """Print the predicted times of the targeted matrices."""
    dense, used = times["dense_seconds"], times["seconds"]
    OUT.print(
        f"predicted time of the targeted matrices per step: {1e3 * dense:.3g} ms -> "
        f"{'at most ' if pending else ''}{1e3 * used:.3g} ms ({used / dense:.1%}, "
        f"{dense / used:.2f}x as fast) on {place}"
    )
    for form in times["forms"]:
        OUT.print(
            f"  {form['form']}: {form['weights']} matrices, {1e3 * form['dense_seconds']:.3g} ms "
            f"-> {1e3 * form['seconds']:.3g} ms"
        )
    if times["slower_forms"]:
        slower = (f"{form} ({count} matrices)" for form, count in times["slower_forms"].items())
        OUT.print(f"never faster than dense there, and not chosen: {', '.join(slower)}")


def _shares(source: dict[str, float], total: int | None, unit: str) -> str:
    """Return what a mixture takes from every source."""
    if total is None:
        return described(source)
    return ", ".join(f"{count:,} {unit} of {name}" for name, count in counts(source, total).items())


def _print_weights(plan: Plan, rows: list[WeightSummary], *, every: bool) -> None:
    methods = sorted({row.method for row in rows})
    one = f", {methods[0]}" if len(methods) == 1 else ""
    columns = ["weight", "layers", "shape", "method", "components", "structure", "MiB", "kept"]
    if one:
        columns.remove("method")
    model = plan.model
    tasks = {task.name: task for task in plan.all_tasks}
    table = new_table(f"{model.source} ({model.architecture}, {model.dtype}{one})", *columns)
    for column in table.columns:
        column.no_wrap = column.header not in ("weight", "components")
    alike: dict[tuple[str, ...], list[WeightSummary]] = {}
    for row in rows:
        cells = (
            row.name if every else _any_layer(row.name),
            f"{row.shape[0]} x {row.shape[1]}",
            row.method,
            _components(plan, tasks[row.owner], row),
            "pending" if row.allocator else row.config.description,
        )
        alike.setdefault(cells, []).append(row)
    for (name, shape, method, components, structure), group in alike.items():
        bits, dense_bits = sum(row.bits for row in group), sum(row.dense_bits for row in group)
        known = [f"{bits / 8 / MIB:.2f}", f"{bits / dense_bits:.1%}"]
        table.add_row(
            name,
            str(len(group)),
            shape,
            *([] if one else [method]),
            components,
            structure,
            *(["", ""] if group[0].allocator else known),
        )
    OUT.print(table)
    if plan.unmeasured:
        return
    for allocator in sorted({row.allocator for row in rows if row.allocator}):
        OUT.print(f"pending: the {allocator} allocator will choose within the budget")


def _any_layer(name: str) -> str:
    """Replace the numbers of the layer and of the expert in a name."""
    return EXPERT_NUMBER.sub(".*.", LAYER_NUMBER.sub(".*.", name, count=1))


def print_warnings(plan: Plan) -> None:
    """Print the warnings of a plan."""
    for warning in plan.warnings:
        OUT.print(f"[yellow]warning[/]: {warning}")


def print_report(report: dict[str, Any], output: str) -> None:
    """Print the summary of a finished run."""
    size = report["size"]
    table = new_table("size", "", "dense", "compressed", "kept")
    parameters, files = size["model"]["parameters"], size["model"]["file_bytes"]
    targeted = size["targeted"]
    stages = (options for stage in report["recipe"]["stages"] for options in stage.values())
    embedded = any(options.get("embeddings") for options in stages)
    targets = "targeted matrices, with the embedding" if embedded else "targeted matrices"
    rows: list[tuple[str, Callable[[int], str], int, int]] = [
        ("parameters", "{:,}".format, parameters["dense"], parameters["compressed"]),
        ("weight files", size_text, files["dense"], files["compressed"]),
        (targets, size_text, targeted["dense_bits"] // 8, targeted["bits"] // 8),
    ]
    for name, write, dense, compressed in rows:
        if dense:
            table.add_row(name, write(dense), write(compressed), f"{compressed / dense:.1%}")
    OUT.print(table)
    for record in report["slices"]:
        _print_slice(record)
    for record in report.get("training", []):  # reports of earlier versions have none
        _print_training(record)
    if size["source"]["quantized"]:
        OUT.print(f"the source file is itself quantized: {size_text(size['source']['file_bytes'])}")
    experts = report.get("experts")  # reports of earlier versions have none
    if experts and experts["coverage"]:
        OUT.print(Coverage(**experts["coverage"]).text)
    if times := report.get("latency"):  # reports of earlier versions have none
        print_times(times, times["place"])
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
        f"peak memory {size_text(report['memory']['peak_rss_bytes'])}"
    )
    if expected := report.get("estimate"):  # reports of earlier versions have none
        _print_estimate(expected, report["memory"])
    drawn = ", report.html" if Path(output, "report.html").expanduser().is_file() else ""
    OUT.print(f"checkpoint: {output}/checkpoint   report: {output}/report.json{drawn}")


def _print_estimate(expected: dict[str, Any], memory: dict[str, int | None]) -> None:
    """Print what was expected next to what was used."""
    names = {"host": "peak_rss_bytes", "gpu": "peak_gpu_bytes", "disk": "peak_disk_bytes"}
    parts = [
        f"{name} {size_text(guessed)} ({size_text(memory[key])} used)"
        for name, key in names.items()
        if (guessed := expected["peak"][f"{name}_bytes"]) is not None
    ]
    OUT.print(f"estimated: {sum(expected['seconds'].values()):.0f} s, {', '.join(parts)}")


def print_inspection(facts: dict[str, Any]) -> None:
    """Print the facts of a checkpoint."""
    columns = ("weight", "shape", "components", "structure") if facts["modules"] else ()
    table = new_table(f"{facts['path']} ({facts['architecture']})", *columns)
    for m in sorted(facts["modules"], key=lambda m: natural(m["name"])):
        patterns = [c["pattern"] for c in m["components"] if "pattern" in c]
        components = " ".join(filter(None, [m["types"], *patterns, m["quantization"]]))
        shape = f"{m['shape'][0]} x {m['shape'][1]}"
        table.add_row(m["name"], shape, components, m["description"])
    OUT.print(table if facts["modules"] else f"[bold]{table.title}[/]")
    for record in facts["slices"] or []:
        _print_slice(record)
    OUT.print(
        f"{facts['parameters']:,} parameters, {size_text(facts['file_bytes'])} of weights, format "
        f"version {facts['format_version']}"
        + (", every hash verified" if facts["verified"] else "")
    )
    if facts["totals"] and facts["modules"]:
        OUT.print(f"kept {facts['totals']['kept']:.1%} of the bits of the targeted matrices")
    if facts["elastic"]:
        _print_budgets(facts["elastic"])
    if facts["environment"]:
        versions = facts["environment"]["versions"]
        OUT.print(
            f"made from {facts['recipe']['model']['path']} with lrc {versions['lrc']}, torch "
            f"{versions['torch']}, transformers {versions['transformers']}"
        )
    fast = facts["fast_paths"]
    print_slow_forms(fast["slow_forms"], f"on {fast['device']} in {fast['dtype']}")
    if facts["speed"]:
        print_slower_models(facts["speed"])
    if facts["evaluation"]:
        print_comparison(facts["evaluation"])
        print_baselines(facts)


def print_pairs(pairs: Sequence[PredictedPair]) -> None:
    """Print the predicted speeds of drafters with their parent."""
    if not pairs:
        return
    columns = ("keep", "nats per token", "accepted", "step of parent", "drafts", "speed of pair")
    table = new_table("predicted speed of the parent with this drafter", *columns, "")
    for each in pairs:
        table.add_row(
            f"{each.keep:g}",
            f"{each.nats:.4f}",
            f"{each.acceptance:.1%}",
            f"{each.cost:.2f}",
            str(each.drafts or "none"),
            f"{each.speed:.2f}x",
            "chosen" if each.chosen else "",
        )
    OUT.print(table)


def _print_budgets(budgets: Sequence[float]) -> None:
    """Print the budgets of an elastic checkpoint."""
    listed = ", ".join(f"{keep:g}" for keep in budgets)
    OUT.print(f"elastic: can be cut to {listed}, see `lrc export`; sizes are those of the first")


def _components(plan: Plan, task: LayerTask, row: WeightSummary) -> str:
    """Return types, pattern and quantization of a weight, and the reason if it stays dense."""
    if task.allocation is not None:
        types = plan.allocations[task.allocation].types
        args = None if task.quantize is None else task.quantize.args
        text = " or ".join(types) if len(types) < 3 else "any"
        return " ".join(filter(None, [text, task.pattern, str(args or "")]))
    args = row.config.quantization
    patterns = [c.pattern for c in row.config.components if c.pattern]
    text = " ".join([row.config.types, *patterns, *([] if args is None else [str(args)])])
    return text if row.note is None else f"{text}: {row.note}"


def _print_slice(record: dict[str, Any]) -> None:
    """Print what a slicing stage changes in the config, and the size."""
    numbers = {key: each for key, each in record["config"].items() if isinstance(each[1], int)}
    changes = [f"{key} {before} -> {after}" for key, (before, after) in numbers.items()]
    shapes = record["config"].get("shapes", [None, None])[1]
    if shapes:
        changes.append(f"{len(shapes)} linears with individual shapes")
    for key, each in record["facts"].items():
        if isinstance(each, list) and len(each) == 2 and isinstance(each[1], list):
            changes.append(f"{key} {each[0]} -> {min(each[1])} to {max(each[1])}")
    sizes = " -> ".join(size_texts(*record["bytes"]))
    OUT.print(f"slice, {record['method']}: {', '.join(changes)}; {sizes}")
    if pending := record["facts"].get("pending"):
        OUT.print(f"pending: {pending}; shown is an even split of the same size")


def _print_training(record: dict[str, Any]) -> None:
    """Print what a stage that trains gained on text that it was not trained on."""
    OUT.print(
        f"heal, {record['method']}: {record['trainable']:,} numbers, {record['steps']:,} steps, "
        f"{record['tokens']:,} tokens, {record['seconds']:.0f} s{_speed(record)}; divergence from "
        f"dense on held-out text {_change(record)} nats per token"
        + (
            f", cross entropy {_change(record['cross_entropy'])}"
            if "cross_entropy" in record
            else ""
        )
        + ("" if record["kept"] else "; no step was better, so the weights are those before it")
    )
    for each in record.get("budgets", []):
        OUT.print(f"  budget {each['keep']:g}: {_change(each)}")


def _change(losses: dict[str, Any]) -> str:
    before, after = (
        "not finite" if losses[key] is None else f"{losses[key]:.4f}" for key in ("before", "after")
    )
    return f"{before} -> {after}"


def _speed(record: dict[str, Any]) -> str:
    speed = record.get("tokens_per_second")  # reports of earlier versions have none
    return "" if speed is None else f" at {speed:,.0f} tokens/s"


def _print_sizes(plan: Plan) -> None:
    if plan.all_tasks:
        kind = "budget" if any(task.pending for task in plan.tasks) else "kept"
        embedded = ", with the embedding" if plan.embeddings else ""
        sizes = " -> ".join(size_texts(plan.dense_bits // 8, plan.bits // 8))
        OUT.print(f"targeted matrices{embedded}: {sizes} ({kind} {plan.kept:.1%})")
    whole = f"whole model: {' -> '.join(size_texts(plan.dense_bytes, plan.compressed_bytes))}"
    # How many numbers fit into a budget depends on the bits that each will get.
    if not any(t.pending and plan.allocations[t.allocation or 0].quantization for t in plan.tasks):
        whole += f", {plan.dense_parameters:,} -> {plan.compressed_parameters:,} parameters"
    OUT.print(whole)
    if any(each.measure == GGUF for each in plan.allocations):
        OUT.print(
            "sizes above are those in a GGUF file; the checkpoint stores scales of super-blocks "
            "in 16 bits and is larger"
        )
    if plan.model.source_quantized:
        OUT.print(
            f"the source file is itself quantized and takes "
            f"{size_text(plan.model.source_file_bytes)}; sizes above compare with the model at "
            f"{plan.model.dtype}"
        )
