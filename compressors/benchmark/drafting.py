"""Measure a drafter with its parent: acceptance, speed, exactness and memory."""

import statistics
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from itertools import count
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from lrc.compressors.benchmark.decoders import (
    BOUND_PER_ROUNDING,
    GraphDecoder,
    StaticDecoder,
)
from lrc.compressors.benchmark.memory import weight_bytes
from lrc.compressors.benchmark.speculative import SpeculativeDecoder, acceptance_by_position
from lrc.compressors.benchmark.timing import Timer
from lrc.compressors.io.machine import OnStep
from lrc.compressors.layers.shared_ends import shared_bytes

ALONE, PAIR = "parent", "pair"


@dataclass(frozen=True)
class DraftSettings:
    """What is generated, and how often."""

    drafts: int = 4
    """Tokens that the drafter proposes in a round."""
    prompts: int = 4
    """Of every text, at most."""
    prompt_tokens: int = 128
    tokens: int = 64
    """New tokens after a prompt, at least two."""
    repeats: int = 3
    """Timed repetitions of all prompts."""

    @classmethod
    def defaults(cls, device: str) -> "DraftSettings":
        """Return those for a device. On a CPU, a repetition takes minutes."""
        return cls(repeats=1) if torch.device(device).type == "cpu" else cls()


@dataclass(frozen=True)
class Generated:
    """New tokens after one prompt."""

    tokens: list[int]
    seconds: float
    """From the end of the prefill, with which the first tokens come, to the end."""
    timed: int
    """Tokens that were generated in that time."""


@dataclass
class Loop:
    """A way to generate, by the parent alone and by the pair."""

    name: str
    runs: Mapping[str, Callable[[Tensor, int], Generated]]
    """``parent`` and ``pair`` -> a function of a prompt [1, n] and a number of new tokens."""
    speeds: dict[str, list[float]] = field(default_factory=lambda: {ALONE: [], PAIR: []})
    """Tokens per second, one entry per repetition of all prompts."""

    def add(self, done: Mapping[str, list[Generated]]) -> None:
        """Add the speeds of a repetition, in which the parent and the pair took turns."""
        for who, texts in done.items():
            seconds = sum(each.seconds for each in texts)
            self.speeds[who].append(sum(each.timed for each in texts) / seconds)

    def to_json(self) -> dict[str, Any]:
        """Return median tokens per second, and the median over repetitions of their ratio."""
        alone, pair = self.speeds[ALONE], self.speeds[PAIR]
        return {
            "loop": self.name,
            "parent_tokens_per_second": statistics.median(alone),
            "pair_tokens_per_second": statistics.median(pair),
            "ratio": statistics.median(p / a for a, p in zip(alone, pair, strict=True)),
        }


class DraftingBenchmark:
    """A parent and a drafter on the same device.

    Generation is greedy and does not stop at end-of-text tokens. The generation configurations of
    both models are replaced.

    Parameters
    ----------
    parent, drafter
        Causal language models of transformers with the same tokens, in eval mode.
    settings : DraftSettings
    generate : bool
        Whether to measure `transformers.generate` too, besides the loop of `SpeculativeDecoder`.

    Raises
    ------
    ValueError, RuntimeError
        As `SpeculativeDecoder` raises them.
    """

    def __init__(
        self, parent: Any, drafter: Any, settings: DraftSettings, *, generate: bool = True
    ) -> None:
        self._parent, self._drafter, self._settings = parent, drafter, settings
        device = parent.get_input_embeddings().weight.device
        self._timer = Timer(str(device))
        # Those of a model may sample, or penalize repetitions.
        parent.generation_config = GenerationConfig(do_sample=False)
        drafter.generation_config = GenerationConfig(
            do_sample=False,
            num_assistant_tokens=settings.drafts,
            num_assistant_tokens_schedule="constant",
            assistant_confidence_threshold=0.0,
        )
        self._prompt = torch.zeros(1, settings.prompt_tokens, dtype=torch.long, device=device)
        kind = GraphDecoder if self._prompt.is_cuda else StaticDecoder
        with torch.no_grad():
            self._alone = kind(parent, self._prompt, settings.tokens - 1)
            self._pair = SpeculativeDecoder(
                parent, drafter, self._prompt, tokens=settings.tokens, drafts=settings.drafts
            )
        own = "CUDA graphs" if self._prompt.is_cuda else "static caches"
        self.loops = [Loop(own, {ALONE: self._step_alone, PAIR: self._step_pair})]
        if generate:
            runs = {ALONE: self._generate, PAIR: self._generate_assisted}
            self.loops.insert(0, Loop("generate", runs))

    @torch.no_grad()
    def run(self, prompts: Mapping[str, Tensor], on_step: OnStep) -> dict[str, Any]:
        """Measure all prompts.

        Parameters
        ----------
        prompts : mapping of str to Tensor, shape [n, prompt_tokens]
            By the name of their text.

        Returns
        -------
        dict
            JSON values: ``acceptance`` by text, ``speed`` and ``exact`` by loop, ``memory``.
        """
        settings = self._settings
        accepted: dict[str, list[int]] = {name: [] for name in prompts}
        exact: dict[str, Any] = {loop.name: {"texts": 0, "differ": []} for loop in self.loops}
        texts = [
            (name, each[None].to(self._prompt.device))
            for name, found in prompts.items()
            for each in found
        ]
        turns = [(loop, who, run) for loop in self.loops for who, run in loop.runs.items()]
        for _, _, run in turns:  # chooses kernels, and compiles some of them
            run(texts[0][1], settings.drafts + 2)
        steps, total = count(1), settings.repeats * len(texts) * len(turns)
        for number in range(settings.repeats):
            done: dict[str, Any] = {loop.name: {ALONE: [], PAIR: []} for loop in self.loops}
            for name, prompt in texts:
                for loop, who, run in turns:
                    done[loop.name][who].append(run(prompt, settings.tokens))
                    on_step("drafting", next(steps), total)
                if number:
                    continue  # with the same tokens
                accepted[name] += self._pair.rounds
                for loop in self.loops:
                    alone, pair = (done[loop.name][who][-1].tokens for who in (ALONE, PAIR))
                    exact[loop.name]["texts"] += 1
                    exact[loop.name]["differ"] += self._differences(name, prompt, alone, pair)
            for loop in self.loops:
                loop.add(done[loop.name])
        return {
            "settings": asdict(settings),
            "acceptance": {
                name: acceptance(each, settings.drafts) for name, each in accepted.items()
            },
            "speed": [loop.to_json() for loop in self.loops],
            "exact": exact,
            "memory": memory_of(self._parent, self._drafter),
        }

    def _differences(
        self, text: str, prompt: Tensor, alone: list[int], pair: list[int]
    ) -> list[dict[str, Any]]:
        """Return where the pair first writes another token than the parent, if it does.

        Rounding depends on how many tokens are read at once, and decides between two tokens with
        nearly the same logit.
        """
        place = next((i for i, (a, b) in enumerate(zip(alone, pair, strict=True)) if a != b), None)
        if place is None:
            return []
        read = torch.cat([prompt, prompt.new_tensor([alone[:place]])], 1)
        logits = self._parent(input_ids=read).logits[0, -1]
        gap = float(logits[alone[place]] - logits[pair[place]])
        rounding = torch.finfo(logits.dtype).eps * float(logits.abs().max())
        return [
            {
                "text": text,
                "token": place,
                "gap": abs(gap),
                "rounding": rounding,
                "tie": abs(gap) <= BOUND_PER_ROUNDING * rounding,
            }
        ]

    def _generate(self, prompt: Tensor, tokens: int, assistant: Any = None) -> Generated:
        clock = _FirstTokens(self._timer)
        written = self._parent.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=tokens,
            do_sample=False,
            assistant_model=assistant,
            streamer=clock,
        )
        new = written[0, prompt.shape[1] :].tolist()
        return Generated(new, clock.end_time - clock.first_time, len(new) - clock.first)

    def _generate_assisted(self, prompt: Tensor, tokens: int) -> Generated:
        return self._generate(prompt, tokens, self._drafter)

    def _step_alone(self, prompt: Tensor, tokens: int) -> Generated:
        self._prompt.copy_(prompt)
        self._alone.prefill()
        new = [self._alone.token.clone()]

        def steps() -> None:
            for _ in range(tokens - 1):
                self._alone.step()
                new.append(self._alone.token.clone())

        seconds = self._timer(steps)
        return Generated(torch.cat(new, 1)[0].tolist(), seconds, len(new) - 1)

    def _step_pair(self, prompt: Tensor, tokens: int) -> Generated:
        self._prompt.copy_(prompt)
        self._pair.prefill()
        seconds = self._timer(lambda: self._pair.decode(tokens))
        return Generated(self._pair.new_tokens[:tokens].tolist(), seconds, self._pair.written - 1)


class _FirstTokens:
    """A streamer that notes when the first and the last tokens come, and how many come first."""

    def __init__(self, timer: Timer) -> None:
        self._clock = timer.clock
        self._calls, self.first, self.first_time, self.end_time = 0, 0, 0.0, 0.0

    def put(self, tokens: Tensor) -> None:
        """Receive tokens on the CPU: the prompt first, then those of every step."""
        self._calls += 1
        if self._calls == 2:
            self.first, self.first_time = tokens.numel(), self._clock()

    def end(self) -> None:
        """Note the time of the end."""
        self.end_time = self._clock()


def acceptance(accepted: list[int], drafts: int) -> dict[str, Any]:
    """Return JSON values about rounds, of which the numbers of accepted drafts are given.

    ``rate`` is the fraction of accepted drafts among those that were compared, the mean over all
    positions; ``tokens_per_round`` includes the parent's own token.
    """
    counts = acceptance_by_position(accepted, drafts)
    compared = sum(n for _, n in counts)
    return {
        "rounds": len(accepted),
        "rate": sum(accepted) / compared,
        "by_position": [hits / n if n else None for hits, n in counts],
        "tokens_per_round": 1 + sum(accepted) / len(accepted),
    }


def memory_of(parent: Any, drafter: Any) -> dict[str, int]:
    """Return the bytes of the weights of both models, and of those that they share."""
    own, other = weight_bytes(parent), weight_bytes(drafter)
    shared = shared_bytes(parent, drafter)
    return {"parent": own, "drafter": other, "shared": shared, "together": own + other - shared}
