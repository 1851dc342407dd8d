"""The command `lrc eval`; heavy libraries are imported inside."""

from typing import Annotated, Literal

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
from lrc.cli.options import Device, Json, Quiet, TrustRemoteCode, positive
from lrc.configs.errors import GateMissed, LrcError, RecipeError, Stopped


def evaluate(
    checkpoints: Annotated[
        list[str],
        typer.Argument(
            help="Folders, Hub ids or .gguf files; the others are compared with the first.",
            show_default=False,
        ),
    ],
    perplexity: Annotated[
        list[str] | None,
        typer.Option(help="A text: `python-docs`, `wikitext2`, `c4` or a path. Can be repeated."),
    ] = None,
    tasks: Annotated[str, typer.Option(help="lm-eval tasks, separated by commas.")] = "",
    include_path: Annotated[
        str | None, typer.Option(help="Folder with your own lm-eval task files.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(callback=positive, help="Documents per task, at most.")
    ] = None,
    window: Annotated[
        int, typer.Option(callback=positive, help="Tokens per perplexity window.")
    ] = 2048,
    windows: Annotated[
        int | None, typer.Option(callback=positive, help="Windows per text, at most.")
    ] = None,
    kl_tokens: Annotated[
        int,
        typer.Option(
            min=0,
            help="Tokens of every text on which predictions are compared with those of the first "
            "model: KL divergence, top-1 agreement. 0 compares none.",
        ),
    ] = 32768,
    streaming: Annotated[
        Literal["auto", "always", "never"],
        typer.Option(
            help="Whether to read models one decoder layer at a time, without tasks: if they do "
            "not fit into memory (auto), always or never."
        ),
    ] = "auto",
    seed: Annotated[int, typer.Option(help="Seed of lm-eval's few-shot sampling.")] = 0,
    gate: GateTexts = None,
    junit: Junit = None,
    trust_remote_code: TrustRemoteCode = False,
    device: Device = "auto",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure perplexity, KL divergence and lm-eval tasks of checkpoints, side by side."""
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    if not names and not perplexity:
        raise RecipeError(
            "lrc eval: nothing to measure; give --perplexity python-docs or --tasks arc_easy,piqa"
        )
    from lrc.cli.evaluate import check_eval_gates, raise_if_missing, run
    from lrc.cli.quality import print_evaluation
    from lrc.compressors.io.machine import Machine
    from lrc.configs.recipe import Evaluate, Perplexity, Tasks

    request = Evaluate(
        perplexity=[Perplexity(source=s, window=window, windows=windows) for s in perplexity or []],
        tasks=Tasks(names=names, include_path=include_path, limit=limit),
        kl_tokens=kl_tokens,
        streaming=streaming,
        gates=read_gates(gate),
    )

    console.quiet_transformers()
    with console.Steps(quiet=quiet).running() as steps:
        machine = Machine(device, on_step=steps, on_warning=steps.warn)
        try:
            blocks = run(checkpoints, request, machine, seed=seed, trusted=trust_remote_code)
            gates = check_eval_gates(request.gates, blocks)
        except Stopped:
            raise
        except LrcError as error:
            if junit is not None:
                write_junit(junit, "eval", {}, error)
            raise
    if as_json:
        console.print_json({"checkpoints": blocks, "gates": gates_json(gates)})
    else:
        print_evaluation(blocks)
        print_gates(gates)
    if junit is not None:
        write_junit(junit, "eval", gates)
    raise_if_missing(blocks)
    if sentences := missed_gates(gates):
        raise GateMissed(sentences, blocks)
