"""`lrc eval`: load what is pointed at, and measure it."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from lrc.compressors.io.machine import OnStep
from lrc.configs.errors import DataError, ModelError, RecipeError
from lrc.configs.recipe import Evaluate, Perplexity, Tasks

OPTIONS = {
    "evaluate.perplexity.source": "--perplexity",
    "evaluate.perplexity.window": "--window",
    "evaluate.tasks.names": "--tasks",
    "evaluate.tasks.include_path": "--include-path",
    "model.path: ": "",
}


def build_request(
    perplexity: list[str],
    tasks: str,
    include_path: str | None,
    limit: int | None,
    window: int,
    windows: int | None,
) -> Evaluate:
    """Turn the options of the command into what a recipe would say under `evaluate`.

    Raises
    ------
    RecipeError
        Nothing asked, or a number out of range.
    """
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    if not names and not perplexity:
        raise RecipeError(
            ["lrc eval: nothing to measure; give --perplexity python-docs or --tasks arc_easy,piqa"]
        )
    numbers = {"--window": window, "--windows": windows, "--limit": limit}
    wrong = [
        f"{option}: must be a whole number >= 1, got {value}"
        for option, value in numbers.items()
        if value is not None and value < 1
    ]
    if wrong:
        raise RecipeError(wrong)
    return Evaluate(
        perplexity=[Perplexity(source=s, window=window, windows=windows) for s in perplexity],
        tasks=Tasks(names=names, include_path=include_path, limit=limit),
    )


def run(
    checkpoints: list[str], request: Evaluate, *, seed: int, device: str, on_step: OnStep
) -> dict[str, Any]:
    """Measure every checkpoint; return checkpoint -> block of results."""
    from lrc.compressors.corpus import check_source
    from lrc.compressors.evaluate import check_tasks, evaluate_model
    from lrc.compressors.io.machine import Machine

    with _as_options():
        for spec in request.perplexity:
            check_source(spec.source, part="evaluation")
        check_tasks(request.tasks)
        for checkpoint in checkpoints:
            _look_at(checkpoint)
        chosen = Machine(device=device).chosen
        blocks = {}
        for checkpoint in checkpoints:

            def step(stage: str, done: int, total: int, name: str = checkpoint) -> None:
                on_step(f"{name}: {stage}", done, total)

            model, tokenizer = _load(checkpoint, chosen)
            blocks[checkpoint] = evaluate_model(model, tokenizer, request, seed=seed, on_step=step)
            del model
    return blocks


@contextmanager
def _as_options() -> Iterator[None]:
    """Say the name of the option where an error names the key of a recipe."""
    try:
        yield
    except RecipeError as error:
        found = error.problems
        raise RecipeError(
            [replace(p, where=_in_options(p.where), message=_in_options(p.message)) for p in found]
        ) from error
    except (ModelError, DataError) as error:
        raise type(error)(_in_options(str(error)), code=error.code) from error


def _in_options(text: str) -> str:
    for key, option in OPTIONS.items():
        text = text.replace(key, option)
    return text


def _look_at(checkpoint: str) -> None:
    """Refuse a checkpoint that cannot be loaded, before another one is measured for hours."""
    from lrc.compressors.checkpoint.reader import check_files, read_config
    from lrc.compressors.models.source import locate
    from lrc.configs.recipe import Model

    if Path(checkpoint).is_dir():
        read_config(Path(checkpoint))
        check_files(Path(checkpoint))
    else:
        locate(Model(path=checkpoint))


def _load(path: str, device: str) -> tuple[Any, Any]:
    """Load a folder as it is stored; a Hub id or GGUF file as a recipe would."""
    import tempfile

    import torch

    from lrc.compressors.checkpoint.reader import load_checkpoint, load_tokenizer
    from lrc.compressors.models import source as models
    from lrc.configs.recipe import Model

    dtype = torch.float32 if device == "cpu" else None
    if Path(path).is_dir():
        folder = Path(path)
        return load_checkpoint(folder, dtype=dtype, device=device), load_tokenizer(folder)
    found = models.locate(Model(path=path))
    tokenizer = models.load_tokenizer(found)
    if found.gguf is None:
        return load_checkpoint(found.folder, dtype=dtype, device=device), tokenizer
    with tempfile.TemporaryDirectory() as folder_name:
        models.convert_gguf(found, Path(folder_name))
        return load_checkpoint(Path(folder_name), dtype=dtype, device=device), tokenizer
