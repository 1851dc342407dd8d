"""`lrc bench`: the speed and memory of several models, side by side."""

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lrc.cli import console
from lrc.cli.gate_results import (
    GateTexts,
    Junit,
    gates_json,
    missed_gates,
    print_gates,
    read_gates,
    write_junit,
)
from lrc.cli.options import (
    Device,
    Json,
    Models,
    Quiet,
    TrustRemoteCode,
    all_positive,
    known,
    named,
    positive,
)
from lrc.compressors.benchmark.grid import Mode, Settings, default_modes
from lrc.configs.errors import BenchmarkIncomplete, GateMissed, UsageError

if TYPE_CHECKING:
    from lrc.compressors.evaluate.gates import GateResult
    from lrc.configs.recipe import Gate

PHASE_NAMES = ("prefill", "decode")
"""What gates are about: tokens per second, or with x relative to dense."""
DTYPES = ("float32", "bfloat16", "float16")


def bench(
    models: Models,
    against: Annotated[
        str | None,
        typer.Option(
            help="The dense model to compare with; the source of the models if left out.",
            metavar="DENSE",
            callback=named,
            show_default=False,
        ),
    ] = None,
    batch: Annotated[
        list[int], typer.Option(callback=all_positive, help="Sequences at a time; repeatable.")
    ] = [1, 16],  # noqa: B006  # typer copies it
    prompt: Annotated[
        list[int], typer.Option(callback=all_positive, help="Tokens of a prompt; repeatable.")
    ] = [1024],  # noqa: B006
    tokens: Annotated[int, typer.Option(callback=positive, help="New tokens after a prompt.")] = 64,
    mode: Annotated[
        list[str] | None,
        typer.Option(
            help="`eager`, `compile` or, on a GPU, `graph` (one CUDA graph per step); repeatable. "
            "By default eager, on a GPU also graph."
        ),
    ] = None,
    repeats: Annotated[int, typer.Option(callback=positive, help="Measurements, in turn.")] = 7,
    seconds: Annotated[
        float | None,
        typer.Option(
            help="Start no further measurement of a batch size and prompt after this time.",
            show_default=False,
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="`float32`, `bfloat16` or `float16`; by default float32 on a CPU, bfloat16 on a "
            "GPU."
        ),
    ] = None,
    report: Annotated[
        bool,
        typer.Option(
            "--report",
            help="Add the results to report and model card of the checkpoints that lrc compressed.",
        ),
    ] = False,
    gate: GateTexts = None,
    junit: Junit = None,
    trust_remote_code: TrustRemoteCode = False,
    device: Device = "auto",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure how fast models read prompts and generate, next to the dense model."""
    gates = read_gates(gate)
    for each in gates:
        known("--gate", each.metric, PHASE_NAMES)
    modes = [known("--mode", each, [*Mode]) for each in mode or []]
    if dtype is not None:
        known("--dtype", dtype, DTYPES)
    if seconds is not None and not seconds > 0:
        raise UsageError(f"--seconds: must be above 0, got {seconds:g}; raise it")
    from lrc.cli.bench_tables import print_benchmark
    from lrc.compressors.benchmark.measured_models import is_same
    from lrc.compressors.benchmark.results import failures
    from lrc.compressors.benchmark.run_report import add_speed, find_reports, read_report
    from lrc.compressors.io.machine import Machine
    from lrc.compressors.page.page_file import PAGE, write_page

    console.quiet_transformers()
    others = [name for name in models if against is None or not is_same(name, against)]
    reports = find_reports(others) if report else {}
    with console.Steps(quiet=quiet).running() as steps:
        machine = Machine(device, on_step=steps, on_warning=steps.warn)
        if "graph" in modes and not machine.chosen.startswith("cuda"):
            raise UsageError(
                f"--mode: graph must run on a GPU, and the device is {machine.chosen}; use eager "
                "or compile, or --device cuda"
            )
        settings = Settings(
            tuple(map(Mode, modes)) or default_modes(machine.chosen),
            tuple(batch),
            tuple(prompt),
            tokens,
            repeats,
            seconds,
        )
        found = run(
            models,
            against,
            settings,
            machine,
            dtype=dtype,
            trusted=trust_remote_code,
            compared=any(each.relative for each in gates),
        )
    results = check_speeds(gates, found)
    if as_json:
        shown = found | {"gates": gates_json(results)} if gates else found
        console.print_json(shown)
    else:
        print_benchmark(found)
        print_gates(results)
    if junit is not None:
        write_junit(junit, "bench", results)
    for name, folder in reports.items():
        written = add_speed(folder, name, found)
        output = folder.resolve().parent
        if output / "report.json" in written:
            drawn = write_page(output, read_report(folder), console.warn)
            written += [output / PAGE] if drawn else []
        if not quiet:
            console.say(f"added the results to {', '.join(map(str, written))}")
    if missing := failures(found):
        raise BenchmarkIncomplete("\n".join(missing))
    if sentences := missed_gates(results):
        raise GateMissed(sentences, found)


def run(
    names: list[str],
    against: str | None,
    settings: Settings,
    machine: Any,
    *,
    dtype: str | None,
    trusted: bool = False,
    compared: bool = False,
) -> dict[str, Any]:
    """Find all models, measure them, and return the results as JSON.

    With `compared`, a dense model is required.

    Raises
    ------
    UsageError
        If there is no such model, or the models cannot read the same prompts.
    CheckpointError, ModelError
        If a model is damaged.
    """
    import torch

    from lrc.cli.option_names import options_in_errors
    from lrc.compressors.benchmark.measure import Benchmark
    from lrc.compressors.benchmark.measured_models import (
        check_targets,
        find_dense,
        find_target,
        is_same,
    )
    from lrc.compressors.benchmark.results import results_json

    notes = []
    if against is None:
        against, note = find_dense(names)
        if note is not None:
            notes.append(f"no ratios: {note}")
    if compared and against is None:
        raise UsageError(
            "--gate: x compares with the dense model, and none was found; name it with --against"
        )
    if against is not None:
        dense = against
        names = [dense, *(name for name in names if not is_same(name, dense))]
    with (
        tempfile.TemporaryDirectory() as scratch,
        options_in_errors(),
        machine.current(),
    ):
        targets = [find_target(name, Path(scratch), trusted=trusted) for name in names]
        check_targets(targets, settings)
        chosen = dtype or ("float32" if machine.chosen == "cpu" else "bfloat16")
        run_in: torch.dtype = getattr(torch, chosen)
        benchmark = Benchmark(
            targets, settings, machine, run_in, dense=against is not None, trusted=trusted
        )
        measured = benchmark.run()
        return results_json(
            measured,
            targets,
            settings,
            device=machine.chosen,
            dtype=run_in,
            dense=against is not None,
            notes=notes,
        )


def check_speeds(gates: "list[Gate]", found: dict[str, Any]) -> "dict[str, list[GateResult]]":
    """Return the gates of every model but the dense one, at every point that was measured."""
    from lrc.cli.option_names import options_in_errors
    from lrc.compressors.evaluate.gates import check_gates

    results = {}
    for each in found["results"] if gates else ():
        if each["repeated"] or each["failed"] is not None or each["model"] == found["against"]:
            continue
        metrics = {}
        for phase in PHASE_NAMES:
            speed = each[phase]
            dense = speed["median"] / speed["ratio"] if speed["ratio"] else None
            metrics[phase] = {"compressed": speed["median"], "dense": dense}
        place = f"{each['model']}, {each['mode']}, batch {each['batch']}, prompt {each['prompt']}"
        with options_in_errors():
            results[place] = check_gates(gates, metrics)
    return results
