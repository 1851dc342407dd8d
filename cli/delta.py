"""`lrc delta`: compress the difference between a tuned model and its base, and apply it."""

from pathlib import Path
from typing import Annotated

import typer

from lrc.cli import console
from lrc.cli.options import Device, Json, Quiet, known, named
from lrc.configs.errors import UsageError
from lrc.configs.size import size_text

METHODS = ("ternary", "low-rank", "int", "sparse")
MEANT = {
    **dict.fromkeys(("svd", "svd-llm", "lora", "factors", "kfac", "basis-sharing"), "low-rank"),
    **dict.fromkeys(("quantize", "rtn", "gptq", "integers", "int8", "int4", "dense"), "int"),
    **dict.fromkeys(("prune", "topk", "top-k", "magnitude", "masks"), "sparse"),
    **dict.fromkeys(("compeft", "signs", "sign", "bitdelta", "binary"), "ternary"),
}
"""Names of similar methods, of recipes and of papers -> the method for deltas."""

delta_app = typer.Typer(
    no_args_is_help=True,
    help="Compressed differences between a tuned model, or a LoRA adapter, and its base model.",
)
Base = Annotated[
    str,
    typer.Argument(help="Folder or Hub id of the base model.", callback=named, show_default=False),
]
Out = Annotated[Path, typer.Argument(help="Folder to write.", show_default=False)]


@delta_app.command()
def make(
    base: Base,
    tuned: Annotated[
        Path,
        typer.Argument(
            help="Folder of the tuned model, or of a LoRA adapter of PEFT.", show_default=False
        ),
    ],
    out: Out,
    options: Annotated[
        list[str] | None,
        typer.Argument(
            help="Options of the method. `ternary`: density, scale (least-squares, std), alpha. "
            "`low-rank`: rank, keep or size (2MiB), dtype, calibration.source (a text such as c4, "
            "or a file), calibration.samples, calibration.length, gradients. `int`: bits, "
            "group_size. `sparse`: density, values (exact, bfloat16). All but `low-rank`, for "
            "adapters: balance (measured, stored, even, rotated).",
            metavar="[KEY=VALUE]...",
        ),
    ] = None,
    method: Annotated[
        str,
        typer.Option(
            help="`ternary`: signs of the largest differences and a scale per tensor; `low-rank`: "
            "products of two factors; `int`: integers with scales; `sparse`: the largest "
            "differences.",
            metavar="|".join(METHODS),
        ),
    ] = "ternary",
    device: Device = "auto",
    every: Annotated[
        bool, typer.Option("--all", help="One row per tensor, even where layers are alike.")
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Compress what fine-tuning has changed."""
    known("--method", method, METHODS, MEANT)
    from lrc.configs.delta_methods import parse_delta_method

    chosen = parse_delta_method(method, options or [])
    _check_paths(tuned, out)
    from lrc.cli.delta_tables import print_delta
    from lrc.cli.option_names import options_in_errors
    from lrc.compressors.deltas.make_delta import make_delta
    from lrc.compressors.io.files import folder_bytes, new_folder, one_writer
    from lrc.compressors.io.machine import Machine

    console.quiet_transformers()
    steps = console.Steps(quiet=quiet)
    machine = Machine(device, on_step=steps)
    words = options_in_errors(runs_code=False)
    with steps.running(), words, one_writer(out), new_folder(out) as partial:
        facts = make_delta(base, tuned, partial, chosen, machine)
    facts = {"path": str(out), **facts, "file_bytes": folder_bytes(out)}
    if as_json:
        console.print_json(facts)
    else:
        print_delta(facts, every=every)


@delta_app.command()
def apply(
    base: Base,
    delta: Annotated[
        Path, typer.Argument(help="Folder that `lrc delta make` wrote.", show_default=False)
    ],
    out: Out,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write the tuned model as a dense folder, or the adapter as a folder of PEFT."""
    _check_paths(delta, out)
    from lrc.cli.option_names import options_in_errors
    from lrc.compressors.deltas.apply_delta import apply_delta
    from lrc.compressors.io.files import folder_bytes, new_folder, one_writer

    console.quiet_transformers()
    steps = console.Steps(quiet=quiet)
    words = options_in_errors(runs_code=False)
    with steps.running(), words, one_writer(out), new_folder(out) as partial:
        facts = apply_delta(base, delta, partial, steps)
    facts = {"path": str(out), **facts, "file_bytes": folder_bytes(out)}
    if as_json:
        console.print_json(facts)
    else:
        typer.echo(
            f"{out}: {facts['kind']}, {facts['tensors']} tensors from the delta, "
            f"{size_text(facts['file_bytes'])}"
        )


def _check_paths(source: Path, out: Path) -> None:
    """Reject paths that cannot work, before a library is imported."""
    if not source.is_dir():
        raise UsageError(f"{source}: no such folder; check the path")
    if out.exists() or out.is_symlink():
        raise UsageError(f"{out}: exists already; choose another name, or delete it")
    if out.resolve().is_relative_to(source.resolve()):
        raise UsageError(f"{out}: must not be inside {source}; choose another folder")
