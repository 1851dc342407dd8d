"""`lrc eval PARENT --draft COMPRESSED`: speculative decoding with a compressed model as drafter."""

from collections import Counter
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lrc.cli.evaluate import check_model
from lrc.cli.option_names import options_in_errors
from lrc.cli.whole_models import Skeleton, load_model, load_skeleton
from lrc.compressors.benchmark.drafting import DraftingBenchmark, DraftSettings
from lrc.compressors.benchmark.fast_paths import slow_forms
from lrc.compressors.benchmark.speculative import RewindableModel
from lrc.compressors.corpus.documents import check_source
from lrc.compressors.corpus.windows import evaluation_windows
from lrc.compressors.evaluate.side_by_side import refuse_pair
from lrc.compressors.io.machine import Machine
from lrc.compressors.layers.shared_ends import share_embeddings
from lrc.compressors.models.model_kinds import kind_of, refuse_encoder_decoder
from lrc.compressors.models.same_tokens import why_no_drafter
from lrc.configs.errors import ModelError, Problem, UsageError
from lrc.configs.recipe import Perplexity


def run(
    parent: str,
    drafter: str,
    sources: list[str],
    settings: DraftSettings,
    machine: Machine,
    *,
    trusted: bool = False,
) -> dict[str, Any]:
    """Measure a drafter with its parent on prompts from texts; return JSON values.

    Raises
    ------
    UsageError
        If the models have different tokens, or a text is too long for one of them.
    ModelError
        If they cannot be used for speculative decoding.
    """
    with options_in_errors(), machine.current():
        texts = [
            Perplexity(source=each, window=settings.prompt_tokens)
            for each in dict.fromkeys(sources)
        ]
        names = Counter(text.name for text in texts)
        for text in texts:
            check_source(text.source, part="evaluation")
        skeletons: dict[str, Skeleton] = {}
        warnings: list[str] = []
        for path in dict.fromkeys((parent, drafter)):
            found = check_model(path, trusted=trusted)
            skeletons[path] = load_skeleton(path, found, trusted=trusted)
            refuse_encoder_decoder(kind_of(skeletons[path].model.config), path, "--draft")
            warnings += [f"{path}: {each}" for each in found]
        for warning in warnings:
            machine.on_warning(warning)
        tokenizer = skeletons[parent].tokenizer
        _check_pair(parent, drafter, skeletons)
        prompts = {
            text.name if names[text.name] == 1 else text.source: _spread(
                evaluation_windows(text, tokenizer).tokens, settings.prompts
            )
            for text in texts
        }
        length = next(iter(prompts.values())).shape[1]  # with a BOS token, if there is one
        settings = replace(settings, prompt_tokens=length)
        _check_context(skeletons, settings)
        n_bytes = sum(each.bytes_on(machine.chosen) for each in skeletons.values())
        refuse_pair(n_bytes, machine.chosen)
        models = []
        for number, path in enumerate(skeletons, start=1):
            models.append(load_model(path, machine.chosen, trusted=trusted))
            machine.on_step("load", number, len(skeletons))
        for form in slow_forms(models[1]):
            some = f"{len(form.weights)} {'layer' if len(form.weights) == 1 else 'layers'}"
            warnings.append(
                f"{drafter}: {form.form} has no fast path on {machine.chosen} ({some}: "
                f"{form.reason}), so that the steps of the drafter are slow"
            )
            machine.on_warning(warnings[-1])
        shared = share_embeddings(models[1], models[0])
        try:
            # On a CPU, launching from Python is a small part of a step, and both loops are as fast.
            generate = machine.chosen != "cpu"
            benchmark = DraftingBenchmark(models[0], models[1], settings, generate=generate)
            scores = benchmark.run(prompts, machine.on_step)
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            raise ModelError(f"{parent} with {drafter}: {error}; use --device cpu") from error
    dtypes = [str(next(model.parameters()).dtype).removeprefix("torch.") for model in models]
    return {
        "parent": parent,
        "drafter": drafter,
        "device": machine.chosen,
        "dtype": dict(zip(("parent", "drafter"), dtypes, strict=True)),
        "shared": shared,
        **scores,
        "warnings": warnings,
    }


def _check_pair(parent: str, drafter: str, skeletons: dict[str, Skeleton]) -> None:
    """Reject models whose tokens differ, and those whose caches cannot go back."""
    if len(skeletons) == 1:
        raise UsageError(
            f"--draft: must be another model than the parent, got {drafter} twice; give the folder "
            "of a compressed checkpoint"
        )
    tokens = skeletons[parent].tokens, skeletons[drafter].tokens
    if (why := why_no_drafter(drafter, parent, tokens)) is not None:
        text = f"{why}; give a model that was compressed from {parent}"
        raise UsageError([Problem("other-tokenizer", "--draft", text)])
    for path, each in skeletons.items():
        try:
            RewindableModel(each.model, 1)
        except ValueError as error:
            raise ModelError(f"{path}: {error}") from error


def _check_context(skeletons: dict[str, Skeleton], settings: DraftSettings) -> None:
    needed = settings.prompt_tokens + settings.tokens + settings.drafts
    for path, each in skeletons.items():
        context = getattr(each.model.config.get_text_config(), "max_position_embeddings", None)
        if context is not None and needed > context:
            raise UsageError(
                f"--prompt: {settings.prompt_tokens:,} tokens, {settings.tokens:,} new ones and "
                f"{settings.drafts:,} drafts must be at most {context:,} together, the context of "
                f"{path}; lower --prompt or --tokens"
            )


def _spread(windows: Tensor, count: int) -> Tensor:
    """Return at most `count` windows [n, length] that are evenly spaced in a text."""
    count = min(count, len(windows))
    return windows[torch.arange(count) * len(windows) // count]
