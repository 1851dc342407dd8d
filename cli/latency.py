"""`lrc latency`: measure the times that budgets in time are computed from."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lrc.cli import console
from lrc.cli.bench import DTYPES
from lrc.cli.options import Device, Json, Overrides, Quiet, RecipeFile, known
from lrc.configs.errors import UsageError

if TYPE_CHECKING:
    from lrc.compressors.latency.latency_table import LatencyTable


def latency(
    recipe: RecipeFile,
    overrides: Overrides = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="File to write, for `latency_table`.", show_default=False
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="`float32`, `bfloat16` or `float16`; by default float32 on a CPU, that of the "
            "model on a GPU."
        ),
    ] = None,
    device: Device = "auto",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure the times of all products that stages with `measure: latency` may choose."""
    if output is None:
        raise UsageError("--output: missing; name the file to write, such as latency.json")
    if output.exists() or output.is_symlink():
        raise UsageError(f"--output: {output} exists already; name another file, or delete it")
    if dtype is not None:
        known("--dtype", dtype, DTYPES)
    from lrc.configs.load import load_recipe

    loaded = load_recipe(recipe, overrides or [])
    timed = [o for o in loaded.recipe.stages_of("decompose").values() if o.measure == "latency"]
    if not timed:
        raise UsageError(
            "lrc latency: measures times for 'decompose' stages with measure: latency, but the "
            "recipe has none; add stages.0.decompose.measure=latency"
        )
    import torch

    from lrc.compressors.io.files import new_file, one_writer
    from lrc.compressors.io.machine import Machine
    from lrc.compressors.latency.product_timing import measure_table
    from lrc.compressors.prepare import prepare
    from lrc.compressors.stages import STAGES
    from lrc.compressors.stages.measured_times import without_tables

    console.quiet_transformers()
    # The file is opened first: one that cannot be written costs no measurement.
    steps = console.Steps(quiet=quiet)
    with one_writer(output), new_file(output) as partial, steps.running():
        partial.touch()
        machine = Machine(device, on_step=steps, on_warning=steps.warn)
        prepared = prepare(without_tables(loaded.recipe), STAGES, weights=False)
        chosen: torch.dtype = prepared.source.dtype
        if dtype is not None:
            chosen = getattr(torch, dtype)
        elif machine.chosen == "cpu":
            chosen = torch.float32  # as in `lrc bench`
        with machine.current():
            table = measure_table(
                prepared.products,
                device=machine.chosen,
                dtype=chosen,
                rows=timed[0].rows,
                on_step=machine.on_step,
            )
        partial.write_text(json.dumps(table.to_json(), indent=1) + "\n", encoding="utf-8")
    if as_json:
        console.print_json(table.to_json())
        return
    print_table(table)
    console.say(f"wrote {output}; name it under 'latency_table'")


def print_table(table: "LatencyTable") -> None:
    """Print the times of every form relative to the dense matrix."""
    from lrc.cli.quality import OUT, new_table
    from lrc.compressors.latency.latency_table import DENSE

    shapes = sorted({shape for shape, _ in table.curves})
    printed = new_table(f"time of a product on {table.place}", "form", *map(_by, shapes))
    dense = [f"{table.dense(shape) / 1e3:.1f} us" for shape in shapes]
    printed.add_row(DENSE, *dense)
    for form in sorted({form for _, form in table.curves} - {DENSE}):
        curves = [table.curves.get((shape, form)) for shape in shapes]
        printed.add_row(
            form, *(_range(c, table.dense(s)) for c, s in zip(curves, shapes, strict=True))
        )
    OUT.print(printed)
    OUT.print("relative to dense, from the smallest to the largest size that was measured")


def _by(shape: tuple[int, int]) -> str:
    return f"{shape[0]} x {shape[1]}"


def _range(curve: Any, dense: int) -> str:
    if curve is None:
        return ""
    ends = dict.fromkeys(f"{each / dense:.2f}" for each in (curve.fitted[0], curve.fitted[-1]))
    return " - ".join(ends)
