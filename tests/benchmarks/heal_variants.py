"""Train one compressed model in many ways, and measure each: which options of `heal` gain most.

usage: python tests/benchmarks/heal_variants.py RECIPE FOLDER NAME [VARIANT ...]

RECIPE gives model, calibration text and evaluation, as tests/benchmarks/protocol_a.yaml does; tasks
are not run. NAME is a compressed model of the table of `table_rows.healed`, such as "kfac 0.6",
which is made once in FOLDER. VARIANT is a name or a pattern of those below; by default all, the
most promising ones first. A line is printed for every variant as soon as it is measured, and one
that FOLDER has measured already is left out.
"""

import gc
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from fnmatch import fnmatchcase
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from table_rows import healed
from torch import Tensor, nn

from lrc.compressors.calibrate.batch_size import BATCH_TOKENS
from lrc.compressors.corpus.tokens import default_bos
from lrc.compressors.evaluate.agreement import kl_divergence, log_probabilities
from lrc.compressors.evaluate.scores import evaluate_model
from lrc.compressors.heal import descent as descent_module
from lrc.compressors.heal.block_fit import fit_blocks
from lrc.compressors.heal.budget import StepBudget
from lrc.compressors.heal.descent import Descent
from lrc.compressors.heal.divergence import Predictor, mean_divergence
from lrc.compressors.heal.extended_text import extended
from lrc.compressors.heal.gradient_step import GradientStep
from lrc.compressors.heal.held_out import TrainingText, mixed, text_requests, training_text
from lrc.compressors.heal.hidden_states import hidden_distance, recorded
from lrc.compressors.heal.pace import Pace
from lrc.compressors.heal.parameters import TrainedParameters
from lrc.compressors.heal.schedule import batch_rows
from lrc.compressors.heal.stored import StoredModel
from lrc.compressors.heal.trained_files import folder as trained_folder
from lrc.compressors.heal.work import HealWork, coordinates_of, deterministic, select
from lrc.compressors.io.journal import Journal
from lrc.compressors.io.machine import Machine, peak_resident_bytes
from lrc.compressors.planning.plan import Plan
from lrc.compressors.prepare import prepare
from lrc.compressors.session import Session, open_session
from lrc.compressors.stages import STAGES
from lrc.configs.heal import Block, Distill
from lrc.configs.load import load_recipe

BATCH_OF_BETA = 8
"""Windows of 1,024 tokens per step for which Adam's second factor is 0.95."""


@dataclass(frozen=True)
class Variant:
    """A way to train. Options of `heal` first, then those that only this script has."""

    batch: int = 4
    rate: float = 1e-3
    precondition: bool = True
    optimizer: str = "adam"
    hidden: float = 0.0
    divergence: str = "forward"
    tokens: int = 1_200_000
    length: int | None = None
    source: Any = None
    micro_batch: int | None = None
    held_out: int = 16384
    extend: bool = False
    restart: bool = True
    """Start again with a lower rate, as `Descent` does."""
    warm_up: int = 10
    """Steps."""
    decay: str = "cosine"
    """Or linear."""
    half_life: bool = False
    """Whether Adam's second factor has the same half-life in tokens at every batch size."""
    average: float = 0.0
    """Over which fraction of the steps values are averaged."""
    labels: float = 0.0
    """Weight of the cross entropy of the text itself; the divergence has weight one."""
    temperature: float = 1.0
    embeddings: bool = False
    """Whether the embedding, and a head tied to it, is trained too."""
    block: float = 0.0
    """Rate of a fit of every layer first; 0 for none."""
    profile: bool = False
    """Whether the kernels of a few more steps are listed."""


P: dict[str, Any] = {"half_life": True, "warm_up": 30}
VARIANTS: dict[str, Variant] = {
    "extend": Variant(extend=True, profile=True),
    "extend, hidden 1": Variant(extend=True, hidden=1.0),
    "extend, rate 0.002": Variant(extend=True, rate=2e-3),
    "extend, labels 0.3": Variant(extend=True, labels=0.3),
    "extend, batch 2": Variant(extend=True, batch=2, rate=7e-4),
    "extend, half-life": Variant(extend=True, **P),
    "extend, rate 0.0005": Variant(extend=True, rate=5e-4),
    "hidden 1": Variant(hidden=1.0),
    "extend, no coordinates": Variant(extend=True, precondition=False, rate=3e-4),
    "extend, muon": Variant(extend=True, optimizer="muon"),
    "extend, 3 million": Variant(extend=True, tokens=3_000_000),
    "extend, embeddings": Variant(extend=True, embeddings=True, batch=2, rate=7e-4),
    "extend, batch 8": Variant(extend=True, batch=8),
    "extend, average": Variant(extend=True, average=0.2),
    "extend, both": Variant(extend=True, divergence="both"),
    "extend, hidden 5": Variant(extend=True, hidden=5.0),
    "block first": Variant(block=5e-3),
    "length 2048": Variant(length=2048, batch=2),
    "batch 4": Variant(),
    "batch 2": Variant(batch=2, rate=7e-4),
}
"""Names may be combined on the command line: "labels 0.3 + batch 2" has the changes of both."""


def main() -> None:
    """Compress, then train and measure the variants."""
    recipe, target, name, *patterns = sys.argv[1:]
    stage = dict(healed())[f"before healing: {name}"][0]
    base = Path(target)
    heal: Any = {"heal": {"method": "distill", "tokens": 1_200_000}}
    loaded = load_recipe(
        recipe,
        [
            f"stages={json.dumps([stage, heal])}",
            "evaluate.tasks={}",
            f"output={base / name.replace(' ', '-')}",
        ],
    )
    base.mkdir(parents=True, exist_ok=True)
    results = base / f"{name.replace(' ', '-')}.jsonl"
    done = {json.loads(line)["name"] for line in _lines(results)}
    started = time.monotonic()
    with open_session(prepare(loaded.recipe, STAGES), Machine()) as session:
        plan = session.prepared.plan
        for kind in ("slice", "decompose", "quantize"):
            if session.prepared.recipe.stages_of(kind):
                plan = STAGES[kind].run(session, plan)
        print(f"{name}: compressed in {time.monotonic() - started:.0f} s", flush=True)
        trainer = Trainer(session, plan, Journal(base / "texts"))
        if "before" not in done:
            _write(results, trainer.before())
        for label, variant in _chosen(patterns):
            if label in done:
                continue
            try:
                facts = trainer.run(label, variant)
            except Exception as error:  # the other variants go on
                print(f"{label}: {type(error).__name__}: {str(error)[:500]}", flush=True)
                continue
            _write(results, facts)


def _chosen(patterns: list[str]) -> Iterator[tuple[str, Variant]]:
    if not patterns:
        yield from VARIANTS.items()
    for pattern in patterns:
        names = [part.strip() for part in pattern.split("+")]
        if len(names) > 1:
            yield pattern, _combined(names)
            continue
        for label, variant in VARIANTS.items():
            if fnmatchcase(label, pattern):
                yield label, variant
        if "=" in pattern:
            yield pattern, _combined([pattern])


def _combined(names: list[str]) -> Variant:
    """Return a variant with the changes of all; a name may also be a field=value."""
    usual, found = asdict(Variant()), Variant()
    for name in names:
        if "=" in name:
            key, _, value = name.partition("=")
            found = replace(found, **{key: json.loads(value)})
        else:
            changes = asdict(VARIANTS[name])
            found = replace(found, **{k: v for k, v in changes.items() if v != usual[k]})
    return found


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.is_file() else []


def _write(path: Path, facts: dict[str, Any]) -> None:
    with path.open("a") as file:
        file.write(json.dumps(facts) + "\n")
    print(facts["line"], flush=True)


class VariantDescent(Descent):
    """A descent that may keep its first rate, and average its values."""

    restarts: bool = True
    average: float = 0.0
    mean: list[Tensor] | None = None

    @property
    def _rises_no_more(self) -> bool:
        return self.restarts and super()._rises_no_more

    def update_(self) -> None:
        """Take a step, and update the average."""
        super().update_()
        if not self.average:
            return
        with torch.no_grad():
            if self.mean is None:
                self.mean = [p.detach().clone() for p in self._parameters]
            weight = 1 / min(self.done, max(1.0, self.average * self.steps / 2))
            torch._foreach_lerp_(self.mean, [p.detach() for p in self._parameters], weight)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Compute with the averages, inside the context."""
        if self.mean is None:
            yield
            return
        exact = {n: p.detach().clone() for n, p in self.trained.parameters.items()}
        self.trained.set_(dict(zip(exact, self.mean, strict=True)))
        try:
            yield
        finally:
            self.trained.set_(exact)


@dataclass
class Trainer:
    """The models of a run, and the texts."""

    session: Session
    plan: Plan
    texts: Journal
    _read: dict[str, TrainingText] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Load the models."""
        models = self.session.models
        self.stored = StoredModel(self.session, self.plan, 1)
        self.student = models.load_sliced(torch.float32)
        self.stored.compress_(self.student)
        self.start = {n: p.detach().clone() for n, p in self.student.named_parameters()}
        self.judged = models.load_sliced(models.dtype)
        self.stored.compress_(self.judged)
        self.teacher = models.load_dense(models.dtype).requires_grad_(False)
        self.names = models.architecture.layer_names

    @cached_property
    def device(self) -> torch.device:
        """Where all models are."""
        return torch.device(self.session.device)

    def before(self) -> dict[str, Any]:
        """Return the perplexities without training."""
        return self._facts("before", Variant(), {}, self._perplexities({}))

    def run(self, name: str, variant: Variant) -> dict[str, Any]:
        """Train a fresh copy; return its facts."""
        text = self._text(variant)
        self._reset_()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        started = time.monotonic()
        if variant.block:
            self._fit_blocks_(variant)
        tensors, facts = self._train(variant, text)
        facts["seconds"] = time.monotonic() - started
        facts["gib"] = self._peak() / 2**30
        self._reset_()
        return self._facts(name, variant, facts, self._perplexities(tensors))

    def _facts(
        self, name: str, variant: Variant, facts: dict[str, Any], scores: dict[str, float]
    ) -> dict[str, Any]:
        parts = [f"{name}:", *(f"{key} {value:.3f}" for key, value in scores.items())]
        if facts:
            before, after = facts["losses"][0][1], facts["best"]
            first, last = facts["train"]
            parts.append(f"| held out {before:.4f} -> {after:.4f}, train {first:.4f} -> {last:.4f}")
            parts.append(f"| {facts['seconds']:.1f} s, {facts['pace'] or 0:,.0f} tokens/s")
            parts.append(f"{facts['gib']:.1f} GiB | best step {facts['best_step']} of")
            parts.append(f"{facts['steps']}, rates {facts['rates']}")
        return {
            "name": name,
            "variant": asdict(variant),
            **facts,
            "scores": scores,
            "line": " ".join(parts),
        }

    def _peak(self) -> int:
        cuda = self.device.type == "cuda"
        return torch.cuda.max_memory_allocated() if cuda else peak_resident_bytes()

    def _options(self, variant: Variant) -> Distill:
        source = variant.source
        if isinstance(source, dict):
            own = self.session.calibration.source
            source = {own if key == "TEXT" else key: value for key, value in source.items()}
        return Distill(
            method="distill",
            batch=variant.batch,
            rate=variant.rate,
            tokens=variant.tokens,
            precondition=variant.precondition,
            optimizer=variant.optimizer,
            hidden=variant.hidden,
            divergence=variant.divergence,
            length=variant.length,
            source=source,
            micro_batch=variant.micro_batch,
            held_out=variant.held_out,
            extend=variant.extend,
        )

    def _text(self, variant: Variant) -> TrainingText:
        """Return the windows of a variant; those of the model itself are sampled once."""
        options = self._options(replace(variant, batch=8))  # the same for all batches
        key = f"{options.length}-{options.source}-{options.tokens}-{options.extend}"
        if key in self._read:
            return self._read[key]
        session = self.session
        journal = Journal(self.texts.output / "".join(c if c.isalnum() else "-" for c in key))
        journal.work.mkdir(parents=True, exist_ok=True)
        started = time.monotonic()
        requests = text_requests(
            "heal",
            options,
            session.calibration.model_copy(update={"samples": 1_000_000}),
            stage=1,
            seed=session.prepared.plan.seed,
            device=self.device.type,
        )
        embedding = session.prepared.dense.model.get_input_embeddings()
        found = [
            training_text(
                each,
                session.prepared.tokenizer,
                embedding,
                journal,
                partial(session.sampled_windows, seed=each.seed + 2),
            )
            for each in requests
        ]
        if options.extend:
            found = [
                extended(
                    text,
                    request,
                    journal,
                    bos=default_bos(session.prepared.tokenizer),
                    continue_=partial(session.continued_windows, seed=request.seed + 3),
                )
                for text, request in zip(found, requests, strict=True)
            ]
        text = self._read[key] = mixed(requests, found)
        seconds = time.monotonic() - started
        if seconds > 1:
            print(f"text {key}: {text.training.numel():,} tokens, {seconds:.1f} s", flush=True)
        return text

    @torch.no_grad()
    def _reset_(self) -> None:
        for name, parameter in self.student.named_parameters():
            parameter.requires_grad_(False).copy_(self.start[name])
            parameter.grad = None

    def _fit_blocks_(self, variant: Variant) -> None:
        """Fit every layer of the student, for as many tokens as windows are kept."""
        session, stage = self.session, 1
        folder = session.journal.path(trained_folder(stage))
        session.journal.forget(trained_folder(stage))
        folder.mkdir()
        options = Block(method="block", rate=variant.block, precondition=variant.precondition)
        text = self._text(replace(variant, source=None, length=None))
        work = HealWork(session, self.plan, stage, options, 100, text, Pace())
        facts = fit_blocks(work, options)
        print(f"block: {facts['before']:.4f} -> {facts['after']:.4f}", flush=True)
        parameters = dict(self.student.named_parameters())
        with torch.no_grad():
            for path in folder.glob("*.safetensors"):
                for name, tensor in load_file(path).items():
                    parameters[name].copy_(tensor)

    def _selected(self, variant: Variant) -> dict[str, nn.Parameter]:
        student = self.student
        ends = (student.get_input_embeddings(), student.get_output_embeddings())
        found: Any = select(student, self._options(variant), ends)
        if variant.embeddings:
            rows = student.get_input_embeddings().weight
            found |= {n: p for n, p in student.named_parameters() if p is rows}
        return found

    def _train(self, variant: Variant, text: TrainingText) -> tuple[dict[str, Tensor], Any]:
        options, device = self._options(variant), self.device
        selected = self._selected(variant)
        coordinates = coordinates_of(self.student, selected, options)
        trained = TrainedParameters(selected, self.stored.dtypes(selected), coordinates=coordinates)
        dense, compressed = (
            Predictor(
                model,
                text.held_out,
                dtype=self.session.models.dtype,
                layers=[model.get_submodule(name) for name in self.names] if variant.hidden else [],
            )
            for model in (self.teacher, self.student)
        )
        length = text.training.shape[1]
        together = min(options.batch, max(1, BATCH_TOKENS[device.type] // length))
        together = min(together, variant.micro_batch or together)
        pace = Pace()
        steps = options.number_of_steps(length) or 0
        with _optimizer(variant, length):
            descent = VariantDescent(
                trained, budget=StepBudget(steps), rate=options.rate, optimizer=options.optimizer
            )
            descent.average = variant.average
            descent.restarts = variant.restart and not variant.average
            add = GradientStep(
                partial(add_gradients, dense, compressed, variant, options.batch * length, length),
                [*trained.parameters.values()],
                device,
            )

            def measure(windows: Tensor = text.held_out) -> float:
                with descent.averaged(), trained.as_stored():
                    return mean_divergence(dense, compressed, windows, together=8)

            own = text.training[: len(text.held_out)]
            with deterministic(self.session.device):
                first = measure(own)
                descent.judge(measure())
                while descent.done < steps:
                    rows = batch_rows(
                        descent.done, n_windows=len(text.training), batch=options.batch, seed=1
                    )
                    windows = text.training[rows]
                    with pace.step(windows.numel()):
                        for part in windows.split(together):
                            add(part)
                        descent.update_()
                    if descent.is_judged:
                        better = descent.best_step
                        with descent.averaged():
                            descent.judge(mean_of(trained, dense, compressed, text.held_out))
                        assert descent.best_step >= better
                last = measure(own)
                if variant.profile:
                    with suppress(Exception):  # the result counts more
                        _profile(lambda: (add(part), descent.update_()))
        facts = {
            "losses": descent.losses,
            "best": descent.best_loss,
            "best_step": descent.best_step,
            "steps": descent.done,
            "rates": descent.rates,
            "train": [first, last],
            "pace": pace.tokens_per_second,
        }
        return {n: t.clone() for n, t in descent.best.items()}, facts

    @torch.no_grad()
    def _perplexities(self, tensors: dict[str, Tensor]) -> dict[str, float]:
        """Return the perplexities of the stored model with other tensors."""
        parameters = dict(self.judged.named_parameters())
        for name, start in self.start.items():
            parameters[name].copy_(tensors.get(name, start))
        evaluate = self.session.prepared.recipe.evaluate
        found = evaluate_model(self.judged, self.session.prepared.tokenizer, evaluate, seed=0)
        return {name: each["perplexity"] for name, each in found["perplexity"].items()}


def mean_of(
    trained: TrainedParameters, dense: Predictor, compressed: Predictor, windows: Tensor
) -> float:
    """Return the divergence with the values as they would be stored."""
    with trained.as_stored():
        return mean_divergence(dense, compressed, windows, together=8)


def add_gradients(
    dense: Predictor,
    compressed: Predictor,
    variant: Variant,
    positions: int,
    length: int,
    windows: Tensor,
) -> None:
    """Add the gradients of the loss of a variant on windows [n, length]."""
    with torch.no_grad(), recorded(dense.layers) as expected_states:
        expected = dense.features(windows)
    with recorded(compressed.layers) as states:
        found = compressed.features(windows)
    leaf = found.detach().requires_grad_(True)
    following = nn.functional.pad(windows[:, 1:], (0, 1), value=-100).flatten().to(leaf.device)
    for rows in compressed.pieces(len(found)):
        with torch.no_grad():
            logits = dense.logits(expected[rows])
        own = compressed.logits(leaf[rows])
        loss = _divergence(logits, own, variant)
        if variant.labels:
            entropy = nn.functional.cross_entropy(
                own.float(), following[rows], ignore_index=-100, reduction="sum"
            )
            loss = loss + variant.labels * entropy
        (loss / positions).backward()
    if not variant.hidden:
        found.backward(leaf.grad)
        return
    distance = variant.hidden * hidden_distance(expected_states, states) / positions
    torch.autograd.backward([found, distance], [leaf.grad, torch.ones_like(distance)])


def _divergence(dense: Tensor, compressed: Tensor, variant: Variant) -> Tensor:
    heat = variant.temperature
    log_p, log_q = log_probabilities(dense / heat), log_probabilities(compressed / heat)
    forward = kl_divergence(log_p, log_q).sum()
    if variant.divergence == "forward":
        return forward * heat**2
    return (forward + kl_divergence(log_q, log_p).sum()) / 2 * heat**2


def _profile(step: Callable[[], object], steps: int = 3, rows: int = 40) -> None:
    """Print where the time of a step goes."""
    with torch.profiler.profile() as found:
        started = time.perf_counter()
        for _ in range(steps):
            step()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds = time.perf_counter() - started
    print(f"profile: {1e3 * seconds / steps:.1f} ms a step", flush=True)
    kind = "self_device_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    events = [each for each in found.key_averages() if getattr(each, kind) > 0]
    for each in sorted(events, key=lambda each: -getattr(each, kind))[:rows]:
        milliseconds = getattr(each, kind) / 1e3 / steps
        print(f"  {milliseconds:8.2f} ms {each.count / steps:7.0f} x {each.key[:100]}", flush=True)


@contextmanager
def _optimizer(variant: Variant, length: int) -> Iterator[None]:
    """Change the constants of the descent."""
    beta = 0.95
    if variant.half_life:
        beta = 0.95 ** (variant.batch * length / (BATCH_OF_BETA * 1024))

    def rate(step: int, steps: int, highest: float) -> float:
        warm_up = max(1, min(variant.warm_up, steps // 10))
        if step < warm_up:
            return highest * (step + 1) / warm_up
        place = (step - warm_up) / (steps - warm_up)
        if variant.decay == "linear":
            return highest * (1 - place)
        return highest * (1 + math.cos(math.pi * place)) / 2

    changes: dict[str, Any] = {
        "BETAS": (0.9, beta),
        "WARM_UP": variant.warm_up,
        "learning_rate": rate,
    }
    with ExitStack() as stack:
        for key, value in changes.items():
            stack.callback(setattr, descent_module, key, getattr(descent_module, key))
            setattr(descent_module, key, value)
        yield


if __name__ == "__main__":
    main()
