"""Windows of text that a model writes itself, with the whole model or one layer in memory."""

import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from lrc.compressors.io.machine import OnStep
from lrc.compressors.models.architecture import Architecture
from lrc.compressors.models.weights import SkeletonFiller

SAMPLED_TOGETHER = 16
"""Largest number of windows in a batch, if the whole model is in memory of the host."""
SAMPLED_LOGITS = 2**26
"""Largest number of logits of a batch on a GPU, which takes nearly the same time for a step with
many windows as with few: 1,365 windows for a vocabulary of 49,152. Drawing takes 24 bytes each."""
CACHE_FRACTION = 0.5  # of the free memory; a layer, the embeddings and the logits need the rest


@torch.inference_mode()
def sample_windows(
    model: Any,
    shape: tuple[int, int],
    *,
    bos: int | None,
    generator: torch.Generator,
    on_step: OnStep,
    together: int = SAMPLED_TOGETHER,
    starts: Tensor | None = None,
) -> Tensor:
    """Sample windows of tokens (int64) of a shape [samples, length] at temperature 1.

    The idea of LLM-QAT (arXiv:2305.17888): generated text is close to the training data. The first
    token of every window is `bos`, or drawn uniformly from the vocabulary.

    Parameters
    ----------
    model : PreTrainedModel
    shape : tuple of int
    bos : int or None
    generator : torch.Generator
        On the CPU, so that every device samples from the same random numbers.
    on_step : callable
        Called after every token with the finished windows.
    together : int
        Number of windows in a batch. Random numbers do not depend on it.
    starts : Tensor, shape [samples, n], optional
        First tokens of every window, with BOS if there is one.
    """
    # transformers 5.24 calls it `cache` and warns about the name that it had before.
    parameters = inspect.signature(type(model).forward).parameters
    key = "cache" if "cache" in parameters else "past_key_values"
    samples, length = shape
    windows = torch.empty(samples, length, dtype=torch.int64)
    windows[:, 0] = torch.randint(model.config.vocab_size, (samples,), generator=generator)
    if bos is not None:
        windows[:, 0] = bos
    given = 1
    if starts is not None:
        given = starts.shape[1]
        windows[:, :given] = starts
    drawn = torch.rand(samples, length, generator=generator, dtype=torch.float64)
    for start in range(0, samples, together):
        rows, cache = slice(start, start + together), None
        for last in range(length - 1):
            ids = windows[rows, last : last + 1].to(model.device)
            out = model(ids, use_cache=True, **{key: cache})
            cache = out.past_key_values
            if last + 1 >= given:
                windows[rows, last + 1] = draw(out.logits[:, -1], drawn[rows, last])
            done = min(start + together, samples) - start
            on_step("sample", start + done * (last + 2) // length, samples)
    return windows


def draw(logits: Tensor, uniform: Tensor) -> Tensor:
    """Return the tokens [n] at which the cumulative probabilities exceed uniform numbers [n].

    `logits` are [n, vocabulary]. The result is on the CPU.
    """
    cumulative = logits.float().softmax(-1).double().cumsum(-1)  # [n, vocabulary]
    level = uniform.to(cumulative.device)[:, None] * cumulative[:, -1:]  # rounded sums are not 1
    return torch.searchsorted(cumulative, level, right=True)[:, 0].cpu()


@contextmanager
def loaded_by_layer(
    architecture: Architecture,
    reader: SkeletonFiller,
    *,
    device: str,
    dtype: torch.dtype,
) -> Iterator[Any]:
    """Yield the skeleton of a model as a model that loads every decoder layer when it is called.

    Everything outside the layers is in memory. Every call reads all layers.
    """
    names = architecture.layer_names
    with ExitStack() as stack:
        reader.fill_("", device=device, dtype=dtype, skip=names)
        stack.callback(reader.empty_, "")
        stack.callback(reader.read_ahead, "", device=device)
        following = [*names[1:], names[0]]  # for the next token
        for name, ahead, layer in zip(names, following, architecture.layers, strict=True):

            def load(*_: Any, name: str = name, ahead: str = ahead) -> None:
                reader.fill_(name, device=device, dtype=dtype)
                reader.read_ahead(ahead, device=device)

            def unload(*_: Any, name: str = name) -> None:
                reader.empty_(name)

            stack.enter_context(layer.register_forward_pre_hook(load))
            stack.enter_context(layer.register_forward_hook(unload))
        yield architecture.model


def windows_together(
    architecture: Architecture, length: int, *, dtype: torch.dtype, free: int
) -> int:
    """Return how many windows can be sampled at once if one layer is in memory: at least 1.

    `free` are the bytes of memory; keys and values of all layers take `CACHE_FRACTION` of it.
    """
    config = architecture.model.config.get_text_config(decoder=True)
    # Some architectures name or list heads in another way; no cache is wider than the hidden states
    # of all layers.
    heads = getattr(config, "num_attention_heads", None)
    kept = getattr(config, "num_key_value_heads", None) or heads
    if isinstance(heads, int) and isinstance(kept, int):
        width = kept * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    else:
        width = config.hidden_size
    per_window = 2 * width * length * len(architecture.layer_names) * dtype.itemsize
    return max(1, int(CACHE_FRACTION * free // per_window))
