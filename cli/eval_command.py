"""The command `lrc eval`; heavy libraries are imported inside."""

from dataclasses import replace
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
from lrc.cli.options import Device, Json, Models, Quiet, TrustRemoteCode, known, named, positive
from lrc.configs.errors import GateMissed, LrcError, Stopped, UsageError

STREAMING: tuple[Literal["auto", "always", "never"], ...] = ("auto", "always", "never")
OF_TASKS = ("include_path", "limit", "seed")
OF_TEXTS = ("window", "windows", "kl_tokens")
OF_DRAFT = ("draft_tokens", "prompts", "prompt", "tokens", "repeats")
"""In the order of `DraftSettings`."""


def evaluate(
    context: typer.Context,
    checkpoints: Models,
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
        str,
        typer.Option(
            metavar="|".join(STREAMING),
            help="Whether to read models one decoder layer at a time, without tasks: if they do "
            "not fit into memory (auto), always or never.",
        ),
    ] = "auto",
    seed: Annotated[int, typer.Option(help="Seed of lm-eval's few-shot sampling.")] = 0,
    draft: Annotated[
        str | None,
        typer.Option(
            help="Instead of scores: speculative decoding of the model with this compressed one as "
            "its drafter, on prompts from the --perplexity texts.",
            metavar="COMPRESSED",
            callback=named,
            show_default=False,
        ),
    ] = None,
    draft_tokens: Annotated[
        int | None, typer.Option(callback=positive, help="Of --draft: drafts in a round [4].")
    ] = None,
    prompts: Annotated[
        int | None, typer.Option(callback=positive, help="Of --draft: prompts per text [4].")
    ] = None,
    prompt: Annotated[
        int | None, typer.Option(callback=positive, help="Of --draft: tokens of a prompt [128].")
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(callback=positive, help="Of --draft: new tokens [64].")
    ] = None,
    repeats: Annotated[
        int | None,
        typer.Option(callback=positive, help="Of --draft: timed repetitions [3, on a CPU 1]."),
    ] = None,
    gate: GateTexts = None,
    junit: Junit = None,
    trust_remote_code: TrustRemoteCode = False,
    device: Device = "auto",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure perplexity, KL divergence from the first, and lm-eval tasks of several models."""
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    if draft is not None:
        others = ("tasks", *OF_TASKS, *OF_TEXTS, "streaming", "gate", "junit")
        _refuse(context, others, "cannot be combined with --draft; leave it out")
        _evaluate_drafter(
            checkpoints,
            draft,
            perplexity or [],
            [context.params[name] for name in OF_DRAFT],
            trusted=trust_remote_code,
            device=device,
            as_json=as_json,
            quiet=quiet,
        )
        return
    _refuse(context, OF_DRAFT, "is an option of --draft; leave it out, or give --draft")
    if not names and not perplexity:
        raise UsageError(
            "lrc eval: nothing to measure; give --perplexity python-docs or --tasks arc_easy,piqa"
        )
    if not names:
        _refuse(context, OF_TASKS, "is an option of --tasks; leave it out, or give --tasks")
    if not perplexity:
        _refuse(context, OF_TEXTS, "is an option of --perplexity; leave it out, or give a text")
    with console.importing():
        from lrc.cli.evaluate import check_eval_gates, raise_if_missing, run
        from lrc.cli.quality import print_evaluation
        from lrc.compressors.io.machine import Machine
        from lrc.configs.recipe import Evaluate, Perplexity, Tasks

        console.quiet_transformers()

    request = Evaluate(
        perplexity=[Perplexity(source=s, window=window, windows=windows) for s in perplexity or []],
        tasks=Tasks(names=names, include_path=include_path, limit=limit),
        kl_tokens=kl_tokens,
        streaming=known("--streaming", streaming, STREAMING),
        gates=read_gates(gate),
    )
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


def _refuse(context: typer.Context, names: tuple[str, ...], why: str) -> None:
    """Refuse options that were given and have no effect, by the names of their parameters."""
    for parameter in context.command.params:
        source = context.get_parameter_source(parameter.name or "")
        # Not the class of click, of which some versions of typer have a copy.
        if parameter.name in names and source is not None and source.name == "COMMANDLINE":
            raise UsageError(f"{parameter.opts[0]}: {why}")


def _evaluate_drafter(
    checkpoints: list[str],
    drafter: str,
    texts: list[str],
    numbers: list[int | None],
    *,
    trusted: bool,
    device: str,
    as_json: bool,
    quiet: bool,
) -> None:
    """Measure a drafter with its parent; `numbers` are the fields of `DraftSettings`, or None."""
    if len(checkpoints) != 1:
        raise UsageError(
            f"--draft: needs one model, the parent, got {len(checkpoints)}; leave the others out"
        )
    if not texts:
        raise UsageError("--draft: needs a text for prompts; give --perplexity python-docs")
    with console.importing():
        from lrc.cli.eval_draft import run
        from lrc.cli.eval_draft_tables import print_drafting
        from lrc.compressors.benchmark.drafting import DraftSettings
        from lrc.compressors.io.machine import Machine

        console.quiet_transformers()
    machine = Machine(device)
    chosen = [
        default if number is None else number
        for number, default in zip(
            numbers, vars(DraftSettings.defaults(machine.chosen)).values(), strict=True
        )
    ]
    settings = DraftSettings(*chosen)
    if settings.tokens < settings.drafts + 2:
        raise UsageError(
            f"--tokens: must be at least {settings.drafts + 2} with {settings.drafts} drafts in a "
            f"round, so that there is a second one, got {settings.tokens}; raise it"
        )
    with console.Steps(quiet=quiet).running() as steps:
        machine = replace(machine, on_step=steps, on_warning=steps.warn)
        found = run(checkpoints[0], drafter, texts, settings, machine, trusted=trusted)
    if as_json:
        console.print_json(found)
    else:
        print_drafting(found)
