"""Measure models over the grid: in every round each model takes its turn, the dense one twice.

If not all models fit into memory, they are loaded one after the other instead, and each is measured
over the whole grid while it is loaded.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

import torch

from lrc.compressors.benchmark.decoders import (
    DECODERS,
    Decoder,
    StaticDecoder,
    check_steps,
    random_tokens,
)
from lrc.compressors.benchmark.fast_paths import SlowForm, slow_forms
from lrc.compressors.benchmark.grid import Mode, Point, Settings, turn_order
from lrc.compressors.benchmark.loading import (
    OUT_OF_MEMORY,
    Loaded,
    Loading,
    load,
    turns_together,
)
from lrc.compressors.benchmark.measured_models import Target
from lrc.compressors.benchmark.memory import Meter
from lrc.compressors.benchmark.timing import Timer, rounds
from lrc.compressors.io.machine import Machine, release_memory
from lrc.compressors.models.configuration import first_line
from lrc.configs.errors import LrcError, Stopped

T = TypeVar("T")
IN_TURN = (
    "the models do not fit into memory together, so that they were loaded and measured one after "
    "the other: ratios include changes of the speed of the machine in between"
)


@dataclass
class Samples:
    """What was measured of one model at one point."""

    prefill: list[float] = field(default_factory=list)
    """Seconds of reading the prompts, one entry per round."""
    decode: list[float] = field(default_factory=list)
    """Seconds of all steps after them, one entry per round."""
    peak_bytes: int | None = None
    """Memory of the model, its cache and activations, at most, while it runs."""
    failed: str | None = None
    """Why nothing or not every round was measured."""


@dataclass
class Measured:
    """Everything that was measured. A slot is a turn in the order of `turn_order`."""

    order: list[int]
    """Slot -> index of its model."""
    points: list[Point]
    loading: dict[int, Loading]
    """Slot -> what loading took; the repeated model has an entry only if it was loaded again."""
    samples: dict[tuple[int, Point], Samples]
    together: bool
    """Whether all models were in memory at the same time."""
    slow: dict[int, list[SlowForm]] = field(default_factory=dict)
    """Slot -> its weights without a fast path, those included whose kernel failed meanwhile."""


@dataclass
class Benchmark:
    """Runs a benchmark on one machine.

    Parameters
    ----------
    targets : sequence of Target
        With `dense`, the first is the one that the others are compared with.
    dtype : torch.dtype
        Precision to run in.
    timer : Timer, optional
        For tests.
    """

    targets: Sequence[Target]
    settings: Settings
    machine: Machine
    dtype: torch.dtype
    dense: bool
    trusted: bool = False
    timer: Timer | None = None

    def __post_init__(self) -> None:
        self._device = self.machine.chosen
        self._meter = Meter(self._device)
        self._timer = self.timer or Timer(self._device)
        self._points = self.settings.points()

    @torch.no_grad()
    def run(self) -> Measured:
        """Measure all models at all points.

        Raises
        ------
        CheckpointError, ModelError
            If a model cannot be loaded, and all are loaded before anything is measured.
        """
        order = turn_order(len(self.targets), dense=self.dense)
        if turns_together(self.targets, self.dtype, self._meter):
            with suppress(*OUT_OF_MEMORY):
                return self._run_together(order)
        release_memory()
        return self._run_in_turn(order)

    def _run_together(self, order: list[int]) -> Measured:
        models = []
        for number, target in enumerate(self.targets, start=1):
            models.append(self._load(target))
            self.machine.on_step("load", number, len(self.targets))
        loading = {slot: each.loading for slot, each in enumerate(models)}
        found = Measured(order, self._points, loading, {}, together=True)
        slots = {slot: models[index] for slot, index in enumerate(order)}
        for point in self._points:
            found.samples |= self._measure(point, slots, str(point))
        found.slow = {slot: slow_forms(each.model) for slot, each in enumerate(models)}
        return found

    def _run_in_turn(self, order: list[int]) -> Measured:
        found = Measured(order, self._points, {}, {}, together=False)
        for slot, index in enumerate(order):
            target = self.targets[index]
            try:
                loaded = self._load(target)
            except Stopped:
                raise
            except (LrcError, *OUT_OF_MEMORY) as error:
                reason = f"not loaded: {reason_of(error)}"
                found.samples |= {(slot, p): Samples(failed=reason) for p in self._points}
                continue
            found.loading[slot] = loaded.loading
            for point in self._points:
                title = f"{target.name}: {point}"
                found.samples |= self._measure(point, {slot: loaded}, title)
            found.slow[slot] = slow_forms(loaded.model)
            del loaded
            release_memory()
        return found

    def _load(self, target: Target) -> Loaded:
        return load(
            target,
            device=self._device,
            dtype=self.dtype,
            meter=self._meter,
            timer=self._timer,
            trusted=self.trusted,
        )

    def _measure(
        self, point: Point, slots: Mapping[int, Loaded], title: str
    ) -> dict[tuple[int, Point], Samples]:
        """Measure the models in `slots`, which are in memory, at one point."""
        samples = {slot: Samples() for slot in slots}
        decoders: dict[int, Decoder] = {}  # by the identity of their models
        for slot, loaded in slots.items():
            twin = next((s for s in samples if s < slot and slots[s] is loaded), None)
            if twin is not None:  # the dense model again
                samples[slot].peak_bytes = samples[twin].peak_bytes
                samples[slot].failed = samples[twin].failed
                continue
            decoder = self._prepare(point, loaded, samples[slot])
            if decoder is not None:
                decoders[id(loaded)] = decoder
        turns = [
            partial(self._take_turn, decoders[id(loaded)], samples[slot])
            for slot, loaded in slots.items()
            if id(loaded) in decoders
        ]
        for done, _ in enumerate(
            rounds(
                turns,
                self.settings.repeats if turns else 0,
                seconds=self.settings.seconds,
                clock=self._timer.clock,
            ),
            start=1,
        ):
            self.machine.on_step(title, done, self.settings.repeats)
        decoders.clear()
        turns.clear()
        if point.mode is Mode.COMPILE:
            torch.compiler.reset()
        release_memory()
        return {(slot, point): each for slot, each in samples.items()}

    def _prepare(self, point: Point, loaded: Loaded, samples: Samples) -> Decoder | None:
        """Make a decoder, run it once, and compare it with plain forwards."""
        model = loaded.model
        config = model.config.get_text_config(decoder=True)

        def prepare() -> Decoder:
            prompt, following = random_tokens(point, config.vocab_size, model.device)
            with self._meter.peak() as peak:
                decoder = DECODERS[point.mode](model, prompt, point.tokens)
                decoder.prefill()
                decoder.decode()
            samples.peak_bytes = peak.grown + loaded.loading.resident_bytes
            if isinstance(decoder, StaticDecoder):
                check_steps(decoder, following)
            return decoder

        return _attempt(prepare, samples)

    def _take_turn(self, decoder: Decoder, samples: Samples) -> None:
        if samples.failed is not None:
            return

        def run() -> None:
            seconds = self._timer(decoder.prefill), self._timer(decoder.decode)
            samples.prefill.append(seconds[0])
            samples.decode.append(seconds[1])

        _attempt(run, samples)


def reason_of(error: BaseException) -> str:
    """Return one line about an error of a model or of a library."""
    if isinstance(error, OUT_OF_MEMORY):
        return "out of memory"
    return str(error).partition("\n")[0] if isinstance(error, LrcError) else first_line(error)


def _attempt(run: Callable[[], T], samples: Samples) -> T | None:
    """Return the result of `run`, or record why there is none."""
    try:
        return run()
    except Stopped:
        raise
    except Exception as error:  # compilers, kernels and models raise nearly anything
        samples.failed = reason_of(error)
        return None
