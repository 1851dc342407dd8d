"""`lrc export`: write a checkpoint in the format of another program, or in another size."""

from pathlib import Path
from typing import Annotated, Any

import typer

from lrc.cli import console
from lrc.cli.options import Checkpoint, Json, Quiet, TrustRemoteCode, known, named
from lrc.configs.errors import UsageError
from lrc.configs.export_types import FORMATS, GGUF_TYPES
from lrc.configs.size import size_text

TYPES = "|".join(GGUF_TYPES)


def export(
    folder: Checkpoint,
    out: Annotated[
        Path, typer.Argument(help="Folder, or file NAME.gguf, to write.", show_default=False)
    ],
    form: Annotated[
        str,
        typer.Option(
            "--format",
            help="`dense`: a folder for transformers, also of a GGUF file; `gguf`: a file for "
            "llama.cpp; `int-quantized`: a folder of int8 weights, also with inputs in 8 bits; "
            "`remote-code`: a folder with the compressed weights and the code that "
            "loads them; `drafter`: a folder without the embedding, which is read from --parent.",
            show_default=False,
            metavar="|".join(FORMATS),
        ),
    ] = "",
    matrices: Annotated[
        str | None,
        typer.Option(
            "--type",
            help="Of gguf: type of matrices whose stored form GGUF lacks, and of dense ones.",
            metavar=TYPES,
            show_default=False,
        ),
    ] = None,
    embeddings: Annotated[
        str | None,
        typer.Option(
            "--embedding-type",
            help="Of gguf: the same for embedding and head.",
            metavar=TYPES,
            show_default=False,
        ),
    ] = None,
    tokenizer: Annotated[
        Path | None,
        typer.Option(
            help="Of gguf: folder or GGUF file with the tokenizer, if not that of the checkpoint.",
            show_default=False,
        ),
    ] = None,
    parent: Annotated[
        str | None,
        typer.Option(
            help="Of drafter: folder or Hub id of the model that it was made from.",
            callback=named,
            show_default=False,
        ),
    ] = None,
    keep: Annotated[
        float | None,
        typer.Option(
            help="Instead of --format: a budget of an elastic checkpoint, such as 0.7; nothing is "
            "calibrated.",
            show_default=False,
        ),
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write a checkpoint in another format, or with a smaller budget."""
    options = {"--type": matrices, "--embedding-type": embeddings, "--tokenizer": tokenizer}
    given = [name for name, value in options.items() if value is not None]
    if keep is not None:
        others = ["--format"] if form else [*given, *["--parent"] * (parent is not None)]
        _export_budget(folder, out, keep, others=others, as_json=as_json)
        return
    if not form:
        raise UsageError(
            f"--format: missing; give {', '.join(FORMATS[:-1])} or {FORMATS[-1]}, or --keep for a "
            "budget of an elastic checkpoint"
        )
    known("--format", form, FORMATS)
    if form != "gguf" and given:
        raise UsageError(f"{given[0]}: is an option of --format gguf; leave it out")
    if (form == "drafter") != (parent is not None):
        remedy = "leave it out" if parent else "give the folder or Hub id of the dense model"
        what = "is an option of" if parent else "is needed by"
        raise UsageError(f"--parent: {what} --format drafter; {remedy}")
    for name in ("--type", "--embedding-type"):
        if options[name] is not None:
            known(name, str(options[name]), GGUF_TYPES)
    _check_paths(folder, out, form, tokenizer)
    from lrc.cli.option_names import options_in_errors
    from lrc.compressors.export.stored_weights import StoredWeights
    from lrc.compressors.io.files import new_file, new_folder, one_writer

    console.quiet_transformers()
    facts: dict[str, Any] = {"format": form, "path": str(out)}
    with console.Steps(quiet=quiet).running() as steps, options_in_errors(), one_writer(out):
        if form == "remote-code":
            from lrc.compressors.export.remote_code import RemoteCodeExport

            with_code = RemoteCodeExport(folder, trust_remote_code=trust_remote_code)
            facts["notes"] = with_code.notes
            with new_folder(out) as partial:
                with_code.write(partial, steps)
        elif form == "drafter":
            from lrc.compressors.export.drafter_folder import write_drafter

            assert parent is not None
            with new_folder(out) as partial:
                shared = write_drafter(folder, parent, partial, steps)
            facts["notes"] = [f"{' and '.join(shared)}: read from {parent} when loaded"]
        elif folder.suffix == ".gguf":
            from lrc.compressors.export.dense_folder import write_gguf_as_dense

            with new_folder(out) as partial:
                write_gguf_as_dense(folder, partial)
            facts["notes"] = []
        elif form == "dense":
            from lrc.compressors.export.dense_folder import write_dense

            weights = StoredWeights(folder, trust_remote_code=trust_remote_code)
            with new_folder(out) as partial:
                facts["notes"] = write_dense(weights, partial, steps)
        elif form == "int-quantized":
            from lrc.compressors.export.int_quantized import write_int_quantized

            weights = StoredWeights(folder, trust_remote_code=trust_remote_code)
            with new_folder(out) as partial:
                facts["notes"] = write_int_quantized(weights, partial, steps)
        else:
            from lrc.compressors.export.gguf_export import GgufExport, GgufOptions

            weights = StoredWeights(folder, trust_remote_code=trust_remote_code)
            exported = GgufExport(weights, GgufOptions(matrices, embeddings, tokenizer))
            with new_file(out) as partial:
                exported.write(partial, steps)
            facts |= exported.to_json()
    _print(facts, out, as_json=as_json)


def _export_budget(
    folder: Path, out: Path, keep: float, *, others: list[str], as_json: bool
) -> None:
    if others:
        raise UsageError(
            f"{others[0]}: cannot be combined with --keep; export the budget first, and then the "
            "result in another format"
        )
    _check_paths(folder, out)
    from lrc.compressors.checkpoint.budget_export import export_budget
    from lrc.compressors.io.files import one_writer

    console.quiet_transformers()
    with one_writer(out):
        export_budget(folder, out, keep, key="--keep")
    _print({"format": "lrc", "path": str(out), "keep": keep, "notes": []}, out, as_json=as_json)


def _check_paths(folder: Path, out: Path, form: str = "", tokenizer: Path | None = None) -> None:
    """Reject paths that cannot work, before a library is imported."""
    if folder.is_file() and folder.suffix == ".gguf":
        if form != "dense":
            raise UsageError(
                f"{folder}: a GGUF file can only be exported with --format dense; other formats "
                "need the folder of a checkpoint"
            )
    elif not folder.is_dir():
        raise UsageError(
            f"{folder}: no such folder; the checkpoint of a run is its folder OUTPUT/checkpoint"
        )
    if out.exists() or out.is_symlink():
        raise UsageError(f"{out}: exists already; choose another name, or delete it")
    if out.resolve().is_relative_to(folder.resolve()):
        raise UsageError(f"{out}: must not be inside the checkpoint; choose another folder")
    if form == "gguf" and out.suffix != ".gguf":
        raise UsageError(f"{out}: the name of a GGUF file must end in .gguf; use {out.name}.gguf")
    if tokenizer is not None and not tokenizer.exists():
        raise UsageError(f"--tokenizer: no file or folder {tokenizer}; check the path")


def _print(facts: dict[str, Any], out: Path, *, as_json: bool) -> None:
    files = out.rglob("*") if out.is_dir() else [out]
    facts["bytes"] = sum(file.stat().st_size for file in files if file.is_file())
    if as_json:
        console.print_json(facts)
        return
    typer.echo(f"{facts['path']}: {facts['format']}, {size_text(facts['bytes'])}")
    for name, entry in facts.get("types", {}).items():
        size = size_text(entry["bytes"])
        typer.echo(f"  {name:<5} {entry['tensors']:>5} tensors {size:>14}")
    for note in facts["notes"]:
        typer.echo(f"note: {note}")
