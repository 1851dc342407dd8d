"""Perplexities, divergences and baselines of models of which one layer is in memory.

The hidden states of all windows of all texts go through one model after the other, layer by layer.
While a layer is in memory, its baselines are made of it one after the other, each with its own
hidden states; so each layer of a model is read once.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate, pairwise
from math import prod
from typing import Any

import torch
from torch import Tensor

from lrc.compressors.calibrate.activation_cache import ActivationCache, live_file
from lrc.compressors.calibrate.calibration_context import CalibrationContext
from lrc.compressors.corpus.windows import Windows, evaluation_windows
from lrc.compressors.distributed.processes import ALONE, Processes
from lrc.compressors.evaluate.agreement import agreement_of
from lrc.compressors.evaluate.baselines import Baseline
from lrc.compressors.evaluate.perplexity import check_fit, perplexity_of
from lrc.compressors.evaluate.scores import Scores, attempt, perplexity_scores
from lrc.compressors.evaluate.side_by_side import agreement_scores, compared_windows
from lrc.compressors.evaluate.streaming_rule import Unmeasured
from lrc.compressors.io.journal import Journal
from lrc.compressors.io.machine import OnStep, release_memory
from lrc.compressors.streamed.streamed_model import ModelFiles, StateLogits, StreamedModel
from lrc.configs.errors import LrcError, ModelError

BUFFER = "evaluation"
"""Name of the buffer of hidden states."""


@dataclass(frozen=True)
class _Run:
    """Hidden states that pass through the layers of a model, or of a baseline made from it."""

    name: str
    model: str
    """Name of the model whose layers are read."""
    texts: Mapping[str, StreamedModel]
    baseline: Baseline | None
    states: dict[str, Tensor]
    """Text -> states [n_windows, length, d_model]; empty if the baseline cannot be made."""

    @contextmanager
    def weights(self) -> Iterator[None]:
        """Let the weights in memory be those of the baseline, if it is one."""
        first = next(iter(self.texts.values())).architecture
        with ExitStack() as stack:
            if self.baseline is not None and self.states:
                try:
                    stack.enter_context(self.baseline.applied(first.model, first.tied))
                except ModelError:
                    self.states.clear()
            yield

    def logits(self, text: str) -> StateLogits:
        """Return the reader of the logits on a text."""
        return StateLogits(self.texts[text], self.states[text])


@dataclass(frozen=True)
class StreamedEvaluation:
    """Evaluates models one layer at a time."""

    models: Mapping[str, Callable[[], ModelFiles]]
    """Name -> opens the model."""
    journal: Journal
    device: str
    memory_limit_gib: float
    """For the hidden states of all texts; what is larger goes to disk."""
    on_step: OnStep
    processes: Processes = ALONE
    """Processes that divide the windows of every text."""

    @torch.no_grad()
    def measure_(self, wanted: Unmeasured) -> None:
        """Measure what is missing; see `Streaming`.

        Raises
        ------
        LrcError
            If a model cannot be read.
        """
        names, base = wanted.unmeasured_models(), wanted.reference
        read = dict.fromkeys([*([base] if wanted.baselines else []), *names])
        models = {name: self.models[name]() for name in read}
        windows = {}
        for name in wanted.texts():
            found = self._windows(name, wanted, models.values())
            if found is not None:
                windows[name] = found
        if not windows:
            return
        made = {name: self._on_texts(files, windows) for name, files in models.items()}
        runs = [_Run(name, name, made[name], None, {}) for name in names]
        runs += [_Run(name, base, made[base], each, {}) for name, each in wanted.baselines.items()]
        try:
            self._allocate(runs)
            self._pass_layers(runs)
            self._score(runs, windows, wanted)
        finally:
            for run in runs:
                run.states.clear()
            release_memory()
            self.journal.forget(live_file(BUFFER, self.processes.rank))

    def _windows(self, name: str, wanted: Unmeasured, models: Any) -> Windows | None:
        """Read a text; if that fails, note the reason for everything that needs it."""
        (spec,) = (each for each in wanted.options.perplexity if each.name == name)

        def read() -> dict[str, Windows]:
            windows = evaluation_windows(spec, wanted.tokenizer)
            for files in models:
                check_fit(files.architecture.model, windows.tokens, bos=windows.bos)
            return {"windows": windows}

        reasons = {name: "to be read"}
        found = attempt(reasons, name, read, LrcError)
        if not found:
            for scores in (*wanted.models.values(), *wanted.pairs.values()):
                for key in {f"perplexity.{name}", f"kl.{name}"} & {*scores["missing"]}:
                    scores["missing"][key] = reasons[name]
            return None
        result: Windows = found["windows"]
        return result

    def _on_texts(
        self, files: ModelFiles, windows: Mapping[str, Windows]
    ) -> dict[str, StreamedModel]:
        def context(tokens: Tensor) -> CalibrationContext:
            return CalibrationContext(
                files.architecture,
                files.reader,
                lambda: tokens,
                self.journal,
                self.device,
                self.memory_limit_gib,
                seed=0,  # nothing is random
                on_step=self.on_step,
                processes=self.processes,
            )

        return {name: StreamedModel(context(each.tokens), files) for name, each in windows.items()}

    def _allocate(self, runs: list[_Run]) -> None:
        """Give every run its hidden states, which are parts of one buffer."""
        shapes = [(run, name, text.shape) for run in runs for name, text in run.texts.items()]
        ends = [0, *accumulate(prod(shape) for _, _, shape in shapes)]
        context = next(iter(runs[0].texts.values())).context
        flat = ActivationCache(context, BUFFER, (1, 1, ends[-1])).tensor.view(-1)
        for (run, name, shape), (start, end) in zip(shapes, pairwise(ends), strict=True):
            run.states[name] = flat[start:end].view(shape)

    def _pass_layers(self, runs: list[_Run]) -> None:
        """Replace all states by the output of the last layer."""
        on_step = partial(self.on_step, "evaluate layer by layer")
        names = dict.fromkeys(run.model for run in runs)
        by_model = [[run for run in runs if run.model == name] for name in names]
        total = sum(len(_model(each).architecture.layers) for each in by_model)
        done = 0
        for sharing in by_model:
            model = _model(sharing)
            with model.around_layers(ahead=0):
                _each(sharing, lambda text, states: text.embed_resident_(states))
            for index in range(len(model.architecture.layers)):
                with model.layer(index):
                    _each(sharing, partial(_advance_, index))
                done += 1
                on_step(done, total)

    def _score(self, runs: list[_Run], windows: Mapping[str, Windows], wanted: Unmeasured) -> None:
        """Measure everything from the final states."""
        whole = {run.name: run for run in runs if run.baseline is None}
        reference = whole.get(wanted.reference)
        with ExitStack() as head:
            if reference is not None:
                head.enter_context(_model([reference]).around_logits())
                self._score_run(reference, None, windows, wanted)
            for run in whole.values():
                if run is not reference:
                    with _model([run]).around_logits():
                        self._score_run(run, reference, windows, wanted)
        baselines = [run for run in runs if run.baseline is not None]
        if baselines:
            with _model(baselines).around_logits():  # of the reference, which is read once for all
                for run in baselines:
                    wanted.baseline_scores[run.name] = self._baseline(run, windows, wanted)

    def _score_run(
        self, run: _Run, reference: _Run | None, windows: Mapping[str, Windows], wanted: Unmeasured
    ) -> None:
        """Measure what is missing of a model, whose head is in memory, and of the pair."""
        for name, each in windows.items():
            perplexity = partial(self._perplexity, run, name, each)
            _fill_(wanted.models[run.name], "perplexity", name, perplexity)
            if reference is not None and run.name in wanted.pairs:
                agreement = partial(self._agreement, (reference, run), name, each, wanted)
                _fill_(wanted.pairs[run.name], "kl", name, agreement)

    def _baseline(
        self, run: _Run, windows: Mapping[str, Windows], wanted: Unmeasured
    ) -> dict[str, Scores | None]:
        """Return the perplexities of a baseline; None where they are not finite.

        The head of its model is in memory.
        """
        found: dict[str, Scores | None] = {s.name: None for s in wanted.options.perplexity}
        with run.weights():
            for name in run.states:
                with suppress(ModelError):
                    found[name] = self._perplexity(run, name, windows[name])
        return found

    def _perplexity(self, run: _Run, name: str, windows: Windows) -> Scores:
        on_window = partial(self.on_step, f"evaluate {run.name}: perplexity {name}")
        found = perplexity_of(run.logits(name), windows, on_window=on_window)
        return perplexity_scores(found, windows)

    def _agreement(
        self, pair: tuple[_Run, _Run], name: str, windows: Windows, wanted: Unmeasured
    ) -> Scores:
        (spec,) = (each for each in wanted.options.perplexity if each.name == name)
        first = replace(windows, tokens=windows.tokens[: compared_windows(spec, wanted.options)])
        both = " and ".join(run.name for run in pair)
        on_window = partial(self.on_step, f"evaluate {both}: KL {name}")
        p, q = (run.logits(name) for run in pair)
        return agreement_scores(agreement_of(p, q, first, on_window=on_window), first)


def _model(runs: list[_Run]) -> StreamedModel:
    """Return the model, on any text, of runs that share its layers."""
    return next(iter(runs[0].texts.values()))


def _advance_(index: int, text: StreamedModel, states: Tensor) -> None:
    text.advance_(index, states)


def _each(runs: list[_Run], apply: Callable[[StreamedModel, Tensor], None]) -> None:
    """Call a function with the states of every run and text, and the weights of the run."""
    for run in runs:
        with run.weights():
            for name, states in run.states.items():
                apply(run.texts[name], states)


def _fill_(scores: Scores, kind: str, name: str, measure: Callable[[], Scores]) -> None:
    found = attempt(scores["missing"], f"{kind}.{name}", measure, LrcError)
    scores[kind] |= {name: found} if found else {}
