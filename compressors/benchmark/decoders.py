"""Greedy decoding with a model, in each of the modes.

What is timed is a call of `Decoder.prefill` and one of `Decoder.decode`. A static cache has its
final size from the start and is written in place; lengths and positions are tensors on the device,
so that one compiled or recorded step can be repeated.
"""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

from lrc.compressors.benchmark.grid import SEED, Mode, Point
from lrc.compressors.benchmark.rotary_tables import ConstantTables
from lrc.compressors.io.machine import release_memory
from lrc.compressors.models.configuration import first_line
from lrc.compressors.solvers.cuda_graphs import record

WARM_UP = 2
"""Plain steps before one is recorded: kernels are chosen and compiled at their first calls."""
SMALLEST_BOUND = {torch.float32: 1e-3}
"""Relative difference of logits that is always taken for rounding, per dtype. Between plain and
compiled steps of four layers of SmolLM2, 6e-7 was measured in float32 and 6e-3 in bfloat16."""
SMALLEST_BOUND_16_BIT = 0.1
BOUND_PER_ROUNDING = 4.0
LARGEST_BOUND = 0.7
"""Half of the difference between logits that have nothing to do with each other, about 1.4."""


class Decoder(ABC):
    """A model, its cache, and the token that it has generated last.

    Parameters
    ----------
    model
        A causal language model of transformers, in eval mode.
    prompt : Tensor, shape [batch, prompt]
        Token ids.
    tokens : int
        Steps of `decode`.
    """

    logits: Tensor
    """Of the last step [batch, vocabulary]."""
    token: Tensor
    """The input of the next step [batch, 1]."""

    def __init__(self, model: Any, prompt: Tensor, tokens: int) -> None:
        self.model, self.prompt, self.tokens = model, prompt, tokens
        names = inspect.signature(model.forward).parameters
        # transformers has renamed the argument; both names occur among the models of one version.
        self._cache_name = "cache" if "cache" in names else "past_key_values"
        self._options: dict[str, Any] = {"use_cache": True}
        if "logits_to_keep" in names:
            self._options["logits_to_keep"] = 1
        self._takes_positions = "position_ids" in names

    @abstractmethod
    def prefill(self) -> None:
        """Read the prompt into an empty cache, and choose the first token."""

    @abstractmethod
    def step(self) -> None:
        """Feed `token` to the model, set `logits`, and choose the next `token`."""

    def decode(self) -> None:
        """Take all steps after `prefill`."""
        for _ in range(self.tokens):
            self.step()

    def forward(self, tokens: Tensor, cache: Any, **options: Any) -> Tensor:
        """Return the logits [batch, vocabulary] of the last token."""
        cached = {self._cache_name: cache}
        done = self.model(input_ids=tokens, **cached, **self._options, **options)
        last: Tensor = done.logits[:, -1]
        return last


class EagerDecoder(Decoder):
    """Plain forwards, and a cache that grows with every token."""

    def prefill(self) -> None:
        """Read the prompt into a new cache."""
        self._cache = DynamicCache(config=self.model.config)
        self._accept(self.forward(self.prompt, self._cache))

    def step(self) -> None:
        """Run a plain forward."""
        self._accept(self.forward(self.token, self._cache))

    def _accept(self, logits: Tensor) -> None:
        self.logits, self.token = logits, logits.argmax(-1, keepdim=True)


class StaticDecoder(Decoder):
    """A static cache, with steps that read and write the same tensors every time."""

    def __init__(self, model: Any, prompt: Tensor, tokens: int) -> None:
        super().__init__(model, prompt, tokens)
        batch, length = prompt.shape
        self.token, self.position = (prompt.new_zeros(batch, 1) for _ in range(2))
        # Also long enough for the steps before one is recorded.
        self._longest = length + max(tokens, WARM_UP + 1)
        self.cache = StaticCache(config=model.config, max_cache_len=self._longest)
        self._next: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = self._plain

    def prefill(self) -> None:
        """Read the prompt into the emptied cache, by a plain forward."""
        self.cache.reset()
        logits = self.forward(self.prompt, self.cache)
        if not hasattr(self, "logits"):
            self.logits = torch.empty_like(logits)
        self.logits.copy_(logits)
        self.token.copy_(logits.argmax(-1, keepdim=True))
        self.position.fill_(self.prompt.shape[1])

    def step(self) -> None:
        """Run a step and move on by one position."""
        logits, token = self._next(self.token, self.position)
        self.logits.copy_(logits)
        self.token.copy_(token)
        self.position.add_(1)

    def _plain(self, token: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        # A cache with a sliding window counts on the host; a recorded step would repeat its number.
        positions = {"position_ids": position} if self._takes_positions else {}
        logits = self.forward(token, self.cache, **positions)
        return logits, logits.argmax(-1, keepdim=True)


class CompiledDecoder(StaticDecoder):
    """A step compiled as one graph by `torch.compile`; on CUDA it is then recorded too."""

    def __init__(self, model: Any, prompt: Tensor, tokens: int) -> None:
        super().__init__(model, prompt, tokens)
        mode = "reduce-overhead" if prompt.is_cuda else None
        plain = self._plain

        def step(token: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
            return plain(token, position)

        # Compiled variants are stored per code object, and their number is limited. A copy for
        # every decoder keeps those of different models apart.
        own = FunctionType(step.__code__.replace(), globals(), closure=step.__closure__)
        self._next = torch.compile(own, fullgraph=True, mode=mode)
        self.prefill()  # allocates the cache, which compiled code would take for a new tensor
        self._tables = ConstantTables(model, self._longest)
        for _ in range(WARM_UP):
            self.step()

    def step(self) -> None:
        """Run the compiled step."""
        with self._tables.kept():
            super().step()


class GraphDecoder(StaticDecoder):
    """A step recorded as one CUDA graph."""

    def __init__(self, model: Any, prompt: Tensor, tokens: int) -> None:
        super().__init__(model, prompt, tokens)
        self.prefill()
        for _ in range(WARM_UP):
            super().step()
        with ConstantTables(model, self._longest).kept():
            self._repeat = recorded(super().step, prompt.device, "a step")

    def step(self) -> None:
        """Repeat the recorded step."""
        self._repeat()


def recorded(step: Callable[[], object], device: torch.device, name: str) -> Callable[[], object]:
    """Return a function that repeats a step as one CUDA graph.

    Parameters
    ----------
    step : callable
        Has run before, so that kernels are chosen and compiled.
    device : torch.device
    name : str
        What `step` is, for messages.

    Raises
    ------
    RuntimeError
        If it cannot be recorded.
    """
    # A decoder and its recording refer to each other, so that recordings of earlier decoders, and
    # their memory, are left until garbage is collected. The next recording may get the stream of
    # such a one, with which it would share the workspace of cuBLAS.
    release_memory()
    try:
        return record(step, device)
    except Exception as error:  # models and libraries raise nearly anything
        raise RuntimeError(f"{name} cannot be recorded ({first_line(error)})") from error


DECODERS: dict[Mode, Callable[[Any, Tensor, int], Decoder]] = {
    Mode.EAGER: EagerDecoder,
    Mode.COMPILE: CompiledDecoder,
    Mode.GRAPH: GraphDecoder,
}


def random_tokens(point: Point, vocabulary: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return a prompt [batch, prompt] and tokens to follow it [batch, tokens], from a fixed seed.

    They are not constant: the power that a GPU draws, and with it its clock rate, depends on data.
    """
    generator = torch.Generator().manual_seed(SEED)
    length = point.prompt + point.tokens
    ids = torch.randint(vocabulary, (point.batch, length), generator=generator).to(device)
    return ids[:, : point.prompt].contiguous(), ids[:, point.prompt :].contiguous()


def check_steps(decoder: StaticDecoder, tokens: Tensor) -> None:
    """Compare the logits of the last of several steps with those of plain forwards.

    A recorded step that depends on a number on the host, such as a length, repeats that of the
    recording, fast and wrong. Rounding differs too, and how much that changes the logits depends
    on the model: it is estimated by two plain forwards, with a static cache and with one that
    grows, which run different kernels.

    Parameters
    ----------
    tokens : Tensor, shape [batch, steps]
        The inputs of the steps.

    Raises
    ------
    ValueError
        If the difference is larger than rounding explains.
    """
    arguments = decoder.model, decoder.prompt, decoder.tokens
    found = logits_after(decoder, tokens)
    plain, growing = (
        logits_after(kind(*arguments), tokens) for kind in (StaticDecoder, EagerDecoder)
    )
    smallest = SMALLEST_BOUND.get(found.dtype, SMALLEST_BOUND_16_BIT)
    bound = max(smallest, BOUND_PER_ROUNDING * _difference(growing, plain))
    error = _difference(found, plain)
    if not error <= min(bound, LARGEST_BOUND):
        raise ValueError(
            f"its logits differ from those of plain forwards by {error:.2g} of their norm after "
            f"{tokens.shape[1]} steps, and rounding explains {min(bound, LARGEST_BOUND):.2g}: a "
            "step depends on numbers on the host, such as a length"
        )


def _difference(found: Tensor, expected: Tensor) -> float:
    """Return the relative difference of logits, of which only differences have a meaning."""
    centered = [each.double() - each.double().mean(-1, keepdim=True) for each in (found, expected)]
    return float((centered[0] - centered[1]).norm() / centered[1].norm())


def logits_after(decoder: Decoder, tokens: Tensor) -> Tensor:
    """Return the logits [batch, vocabulary] after the prompt and given tokens [batch, steps]."""
    decoder.prefill()
    for token in tokens.split(1, dim=1):
        decoder.token.copy_(token)
        decoder.step()
    return decoder.logits.clone()
