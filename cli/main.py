"""The `lrc` command. Heavy libraries are imported inside the commands: `lrc --help` is instant."""

import signal
import sys
from pathlib import Path
from typing import Annotated

import typer

from lrc.cli import console, streams, team
from lrc.cli.bench import bench
from lrc.cli.delta import delta_app
from lrc.cli.eval_command import evaluate
from lrc.cli.export import export
from lrc.cli.gate_results import (
    Junit,
    print_gates,
    write_junit,
)
from lrc.cli.latency import latency
from lrc.cli.options import (
    Checkpoint,
    Device,
    Json,
    Models,
    Overrides,
    Quiet,
    RecipeFile,
    TrustRemoteCode,
    known,
)
from lrc.cli.pages import report as report_pages
from lrc.cli.recipes import recipes_app
from lrc.cli.sweep import sweep
from lrc.compressors.io.gpu_allocator import use_expandable_segments
from lrc.configs.errors import EvaluationIncomplete, GateMissed, LrcError, Stopped, UsageError
from lrc.configs.export_types import SETTINGS

app = typer.Typer(
    name="lrc",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Compress a language model after training, from one YAML recipe, into a checkpoint that "
    "transformers loads.",
    epilog="Exit codes: 0 done, 1 failed, 2 wrong usage or recipe, 4 a quality gate was missed, "
    "75 stopped on a signal with the state saved.",
)
app.add_typer(recipes_app, name="recipes")
app.add_typer(delta_app, name="delta")


def _version(show: bool) -> None:
    if show:
        import lrc

        typer.echo(f"lrc {lrc.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    context: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
    verbose: Annotated[
        bool,
        typer.Option(
            "--verbose",
            help="Also say why something is computed in a slower way than usual.",
        ),
    ] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    if verbose:
        console.show_details()
    use_expandable_segments()
    team.refuse_several(context.invoked_subcommand)


@app.command()
def plan(
    recipe: RecipeFile,
    overrides: Overrides = None,
    device: Device = "auto",
    every: Annotated[
        bool, typer.Option("--all", help="One row per matrix, even where layers are alike.")
    ] = False,
    sensitivity: Annotated[
        bool,
        typer.Option(
            "--sensitivity",
            help="Calibrate, and show the predicted loss increase of every matrix at its planned "
            "size; `lrc compress` continues from there.",
        ),
    ] = False,
    profile: Annotated[
        int | None,
        typer.Option(
            help="Also check the predictions on this many calibration windows; implies "
            "--sensitivity. Loads the whole dense model in float32, and runs it over the windows "
            "twice per matrix.",
            show_default=False,
        ),
    ] = None,
    svg: Annotated[
        Path | None,
        typer.Option(
            help="Also draw the predicted loss of every matrix against its bits; implies "
            "--sensitivity.",
            metavar="FILE",
            show_default=False,
        ),
    ] = None,
    program: Annotated[
        str | None,
        typer.Option(
            "--format",
            help="Print the bit widths of the plan as settings of another program; implies "
            "--sensitivity.",
            metavar="|".join(SETTINGS),
            show_default=False,
        ),
    ] = None,
    processes: Annotated[
        int,
        typer.Option(
            min=1,
            help="Estimate a run of this many processes, as `torchrun --nproc-per-node` starts "
            "them: time, and memory of each.",
        ),
    ] = 1,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Show what a recipe would do; without --sensitivity no weight is read."""
    from lrc.configs.load import load_recipe

    loaded = load_recipe(recipe, overrides or [])
    if sensitivity or profile is not None or svg is not None or program is not None:
        if every:
            raise UsageError("--all: --sensitivity shows every matrix anyway; leave one out")
        if processes > 1:
            raise UsageError("--processes: --sensitivity runs in one process; leave one out")
        if program is not None:
            known("--format", program, SETTINGS)
        console.preparing(recipe, quiet=quiet)
        from lrc.cli.loss_predictions import run

        run(loaded, profile, device, svg=svg, program=program, as_json=as_json, quiet=quiet)
        return
    console.preparing(recipe, quiet=quiet)
    with console.importing():
        from lrc.cli import tables
        from lrc.compressors.estimates.estimate import estimate, refuse_too_large
        from lrc.compressors.io.machine import Machine
        from lrc.compressors.planning.predicted_times import predicted_times
        from lrc.compressors.prepare import prepare
        from lrc.compressors.session import check_division
        from lrc.compressors.stages import STAGES

        console.quiet_transformers()
    machine = Machine(device)
    prepared = prepare(loaded.recipe, STAGES, weights=False)
    check_division(prepared, processes)
    expected = estimate(prepared, machine.chosen, processes)
    refuse_too_large(expected, prepared, machine.chosen)
    found, unmeasured = prepared.plan, prepared.products if prepared.plan.unmeasured else []
    if as_json:
        times = predicted_times(found)
        console.print_json(
            found.to_json()
            | {"estimate": expected.to_json(), "products_to_measure": len(unmeasured)}
            | {"predicted_times": None if times is None else times.to_json()}
        )
    else:
        tables.print_plan(found, expected, every=every)
        if unmeasured:
            tables.print_unmeasured(len(unmeasured), machine.chosen)


@app.command()
def compress(
    recipe: RecipeFile,
    overrides: Overrides = None,
    device: Device = "auto",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Delete an earlier run in the output folder.")
    ] = False,
    junit: Junit = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Run a recipe to checkpoint and report; continues where an earlier run was stopped.

    Several processes, started by `torchrun -m lrc compress`, divide the work.
    """
    from lrc.configs.load import load_recipe

    several = team.join(device) if team.is_one_of_several() else None
    loaded = load_recipe(recipe, overrides or [])
    if several is not None and several.assists:
        several.assist(loaded)
        return
    console.preparing(recipe, quiet=quiet)
    with console.importing():
        from lrc.cli import tables
        from lrc.compressors.evaluate.gates import check_gates, metrics_of
        from lrc.compressors.io.machine import Machine
        from lrc.compressors.pipeline import compress as run

        console.quiet_transformers()
    missed: EvaluationIncomplete | GateMissed | None = None
    with console.Steps(quiet=quiet, lost=team.lost).running() as steps:
        try:
            machine = Machine(device, overwrite=overwrite, on_step=steps, on_warning=steps.warn)
            report = run(loaded, machine if several is None else several.machine(machine, loaded))
        except (EvaluationIncomplete, GateMissed) as error:
            missed, report = error, error.report
        except Stopped:
            raise
        except LrcError as error:
            if junit is not None:
                write_junit(junit, "compress", {}, error)
            raise
    output = loaded.recipe.output
    incomplete = isinstance(missed, EvaluationIncomplete)
    wanted = [] if incomplete else loaded.recipe.evaluate.gates
    gates = {output: check_gates(wanted, metrics_of(report))}
    if as_json:
        console.print_json(report)
    else:
        tables.print_report(report, output)
        print_gates(gates)
    if junit is not None:
        write_junit(junit, "compress", gates, missed if incomplete else None)
    if missed is not None:
        raise missed
    if not (steps.taken or quiet):
        console.say("finished earlier, nothing to do; --overwrite runs it again")


@app.command()
def generate(
    models: Models,
    prompt: Annotated[str, typer.Option(help="The text to continue.", show_default=False)],
    tokens: Annotated[int, typer.Option(help="Tokens to generate, at most.")] = 40,
    trust_remote_code: TrustRemoteCode = False,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Continue a prompt with several models, greedily, to compare the texts."""
    from lrc.cli.generate import run

    console.quiet_transformers()
    texts = run(models, prompt, tokens=tokens, device=device, trusted=trust_remote_code)
    if as_json:
        console.print_json({"prompt": prompt, "continuations": texts})
        return
    typer.echo(f"prompt: {prompt}")
    for path, text in texts.items():
        typer.echo(f"\n{path}:\n{text.strip()}")


app.command("eval")(evaluate)
app.command()(bench)
app.command()(latency)
app.command()(export)
app.command()(sweep)
app.command("report")(report_pages)


@app.command()
def inspect(
    checkpoint: Checkpoint,
    verify: Annotated[
        bool, typer.Option("--verify", help="Compare every file with its recorded hash.")
    ] = False,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Show what a checkpoint or delta contains, and what of it has no fast path on a device."""
    from lrc.cli import delta_tables, tables
    from lrc.cli.inspect import describe, describe_delta
    from lrc.compressors.deltas.delta_format import is_delta
    from lrc.compressors.io.machine import Machine

    chosen, delta = Machine(device).chosen, is_delta(checkpoint)
    facts = (
        describe_delta(checkpoint) if delta else describe(checkpoint, verify=verify, device=chosen)
    )
    if as_json:
        console.print_json(facts)
    elif delta:
        delta_tables.print_delta(facts)
    else:
        tables.print_inspection(facts)


@app.command()
def schema() -> None:
    """Print the JSON Schema of a recipe, for editors."""
    from lrc.configs.recipe import recipe_schema

    console.print_json(recipe_schema())


def main() -> None:
    """Run the command line and exit with its exit code."""
    streams.keep_writable()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C, from the first moment
    command = typer.main.get_command(app)
    try:
        # Not app(): it would exit with another code on Ctrl-C, and draw boxes around errors.
        with console.quiet_libraries(), command.make_context("lrc", sys.argv[1:]) as context:
            command.invoke(context)
        sys.stdout.flush()
    except typer.Exit as done:  # --help, --version
        sys.exit(done.exit_code)
    except (Exception, KeyboardInterrupt) as error:
        sys.exit(team.exit_code_of(error, debug="--debug" in sys.argv))
    team.end()
    sys.exit(0)
