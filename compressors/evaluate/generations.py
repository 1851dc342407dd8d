"""Greedy continuations of prompts by the dense and the compressed model."""

from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any, cast

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lrc.compressors.corpus.documents import SUFFIXES, read_documents
from lrc.compressors.evaluate.logits import input_device
from lrc.compressors.models.model_kinds import kind_of
from lrc.configs.errors import DataError, RecipeError
from lrc.configs.recipe import Generations

FILE = "evaluate.generations.file"


@dataclass(frozen=True)
class Continuation:
    """What a model writes after a prompt."""

    tokens: list[int]
    """New tokens, with the end-of-text token if it was generated."""
    text: str
    """The same without special tokens."""


def read_prompts(generations: Generations) -> list[str]:
    """Return the prompts of the recipe and those in its file.

    Raises
    ------
    RecipeError
        If the file does not exist or has another suffix.
    DataError
        If it has no prompts or cannot be read.
    """
    if generations.file is None:
        return list(generations.prompts)
    path = Path(generations.file).expanduser()
    if path.suffix.lower() not in SUFFIXES:
        raise RecipeError(
            f"{FILE}: must be the path of a .jsonl or .txt file, got {generations.file!r}"
        )
    documents = read_documents(generations.file, part="evaluation", field="prompt", key=FILE)
    texts = [str(document) for document in documents]
    if path.suffix.lower() == ".txt":
        texts = "\n\n".join(texts).splitlines()
    found = [text for text in texts if text.strip()]
    if not found:
        raise DataError(f"{FILE} {generations.file}: holds no prompt; write one on every line")
    return [*generations.prompts, *found]


@torch.inference_mode()
def continue_greedily(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, tokens: int
) -> Continuation:
    """Return the greedy continuation of a prompt, at most `tokens` tokens long."""
    inputs = tokenizer(prompt, return_tensors="pt").to(input_device(model))
    # The class of `generate` is annotated with every kind of output.
    written = cast(Any, model).generate(**inputs, max_new_tokens=tokens, do_sample=False)[0]
    translates = kind_of(model.config).translates  # then only the start token is before the text
    new = written[1 if translates else inputs["input_ids"].shape[1] :].tolist()
    text = tokenizer.decode(new, skip_special_tokens=True)
    return Continuation(new, cast(str, text))


def compare_continuations(
    dense: PreTrainedModel,
    compressed: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    tokens: int,
) -> dict[str, Any]:
    """Continue a prompt with two models; return JSON values, in the shape of the report.

    `first_difference` is the number of new tokens before the first that differs; None if none does.
    """
    expected, found = (
        continue_greedily(model, tokenizer, prompt, tokens) for model in (dense, compressed)
    )
    pairs = enumerate(zip_longest(expected.tokens, found.tokens))
    return {
        "prompt": prompt,
        "dense": expected.text,
        "compressed": found.text,
        "new_tokens": {"dense": len(expected.tokens), "compressed": len(found.tokens)},
        "first_difference": next((i for i, (a, b) in pairs if a != b), None),
    }
