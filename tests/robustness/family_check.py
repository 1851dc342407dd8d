"""Take one model family through the pipeline, and compare the results with plain transformers.

The reference of every comparison is the source model in memory, with its weights replaced by those
that the executed plan and the stored tensors give; lrc's loader has no part in it.
"""

import json
import os
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file
from tests.robustness.tiny_models import NotBuilt, auto_class_of, causal_families, tiny_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from lrc.compressors.calibrate import batch_size, layer_executor
from lrc.compressors.compress.group import stored_weight
from lrc.compressors.io.machine import Machine
from lrc.compressors.pipeline import compress
from lrc.compressors.planning.plan import Plan
from lrc.compressors.prepare import Prepared, prepare
from lrc.compressors.session import open_session
from lrc.compressors.stages import STAGES
from lrc.configs.errors import LrcError
from lrc.configs.load import load_recipe

SAMPLES, LENGTH = 5, 32
STAGES_OF = {
    "svd-llm": {"decompose": {"method": "svd-llm", "keep": 0.7}},
    "rtn": {"quantize": {"method": "rtn", "bits": 8}},
    "drop": {"slice": {"method": "drop", "keep": 0.75}},
}
# Of the standard deviation of the logits. Rounding to 8 bits changes them by 0.01 to 0.05, and by
# more where it changes which experts a token selects.
EXACT, CLOSE, CLOSE_WITH_EXPERTS = 1e-4, 0.15, 0.6


@dataclass
class Outcome:
    """What became of a family."""

    family: str
    model: str = ""
    """Name of the class."""
    status: str = "served"
    """`served`, `rejected`, `not built` or `failed`."""
    reason: str = ""
    """Why it was rejected, or no tiny model could be built."""
    seconds: float = 0.0
    """Without building the model."""
    compressed: float = 0.0
    """Fraction of the parameters of the decoder layers that are compressed."""
    drop: str = ""
    """Why whole layers cannot be removed; empty if they can."""
    failures: list[str] = field(default_factory=list)
    """Crashes, wrong results and refusals that came only after the plan."""


class FamilyCheck:
    """The check of one family in a folder; `run` returns the outcome."""

    def __init__(self, family: str, folder: Path) -> None:
        self.outcome, self.folder = Outcome(family), folder
        self.tokens = torch.randint(2, 256, (2, 40), generator=torch.Generator().manual_seed(1))

    def run(self) -> Outcome:
        """Build the model, then try every stage; no exception escapes."""
        start = time.monotonic()
        try:
            self._save()
            start = time.monotonic()
            self._try_all()
        except NotBuilt as error:
            self.outcome.status, self.outcome.reason = "not built", str(error)
        except LrcError as error:
            self.outcome.status, self.outcome.reason = "rejected", str(error)
        except Exception as error:
            self._failed("plan", error)
        self.outcome.seconds = time.monotonic() - start
        return self.outcome

    def _save(self) -> None:
        """Write source and tokenizer; transformers has to load what it has saved."""
        torch.manual_seed(0)
        model: Any = tiny_model(causal_families()[self.outcome.family], self.tokens)
        self.outcome.model = type(model).__name__
        model.save_pretrained(self.folder / "source")
        byte_tokenizer().save_pretrained(self.folder / "source")
        try:
            loaded = self.source
        except Exception as error:
            raise NotBuilt(f"transformers does not load what it saved: {error!r:.200}") from error
        if _distance(self._logits(loaded), self._logits(model)) > EXACT:
            raise NotBuilt("transformers loads other weights than it saved")

    def _try_all(self) -> None:
        dense = self._logits(self.source)
        names = tuple(f"{name}." for name in self.prepared.dense.layer_names)
        with self._collected("svd-llm"):
            report = compress(self._recipe("svd-llm"), Machine("cpu"))
            found = self._same_as_stored("svd-llm")
            assert _distance(found, dense) > EXACT, "nothing was compressed"
            parameters = self.source.named_parameters()
            in_layers = sum(p.numel() for name, p in parameters if name.startswith(names))
            targeted = report["size"]["targeted"]["dense_bits"] / 32
            self.outcome.compressed = targeted / in_layers
        with self._collected("rtn"):
            compress(self._recipe("rtn"), Machine("cpu"))
            distance = _distance(self._same_as_stored("rtn"), dense)
            close = CLOSE_WITH_EXPERTS if self.prepared.dense.experts else CLOSE
            assert distance <= close, f"int8 differs from the dense model by {distance:.2g}"
        with self._collected("layers in turn"):
            self._compare_layers_in_turn()
        with self._collected("drop"):
            try:
                prepare(self._recipe("drop").recipe, STAGES)
            except LrcError as error:
                self.outcome.drop = str(error)
            else:
                compress(self._recipe("drop"), Machine("cpu"))
                self._compare_without_layers()

    @cached_property
    def prepared(self) -> Prepared:
        """The plan; raises what the user is told about an unsupported model."""
        return prepare(self._recipe("svd-llm").recipe, STAGES)

    @cached_property
    def source(self) -> Any:
        return self._load("source")

    @contextmanager
    def _collected(self, what: str) -> Iterator[None]:
        """Collect a failure, so that the other stages are tried too."""
        try:
            yield
        except Exception as error:  # an LrcError too: the plan has accepted the model
            self._failed(what, error)

    def _failed(self, what: str, error: Exception) -> None:
        if os.environ.get("LRC_SWEEP_TRACEBACKS"):
            traceback.print_exception(error)
        frames = traceback.extract_tb(error.__traceback__)
        ours = [frame for frame in frames if "/compressors/" in frame.filename]
        places = dict.fromkeys(
            f"{Path(frame.filename).name}:{frame.lineno}" for frame in [*ours[-1:], *frames[-1:]]
        )
        text = " ".join(str(error).split())[:400]
        self.outcome.status = "failed"
        self.outcome.failures.append(
            f"{what}: {type(error).__name__} at {', '.join(places)}: {text}"
        )

    def _recipe(self, name: str, output: str = "") -> Any:
        text = __file__  # any text
        recipe: dict[str, Any] = {
            "model": {"path": str(self.folder / "source"), "dtype": "float32"},
            "calibration": {"source": "text.txt", "samples": SAMPLES, "length": LENGTH},
            "stages": [STAGES_OF[name]],
            "output": str(self.folder / (output or name)),
        }
        (self.folder / "text.txt").write_text(Path(text).read_text(encoding="utf-8"))
        recipe["calibration"]["source"] = str(self.folder / "text.txt")
        if name == "svd-llm":
            perplexity = {"source": recipe["calibration"]["source"], "window": LENGTH, "windows": 2}
            recipe["evaluate"] = {"perplexity": [perplexity], "baselines": []}
        path = self.folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
        return load_recipe(path)

    def _load(self, name: str) -> Any:
        """Load with transformers; nothing may be missing, left over or of another shape."""
        auto = auto_class_of(causal_families()[self.outcome.family])
        model, loading = auto.from_pretrained(
            self.folder / name, dtype=torch.float32, output_loading_info=True
        )
        problems = {key: sorted(map(str, value)) for key, value in loading.items() if value}
        assert not problems, problems
        return model.eval()

    @torch.no_grad()
    def _logits(self, model: Any) -> Tensor:
        logits: Tensor = model(input_ids=self.tokens, use_cache=False).logits
        return logits

    @torch.no_grad()
    def _same_as_stored(self, name: str) -> Tensor:
        """Compare a loaded result with the source that has its stored weights; return logits."""
        checkpoint = self.folder / name / "checkpoint"
        plan = Plan.from_json(json.loads((checkpoint / "lrc/plan.json").read_text()))
        tensors, modules = load_file(checkpoint / "model.safetensors"), plan.modules()
        if tensors.keys().isdisjoint(f"{name}.weight" for name in modules):  # a plain checkpoint
            tensors = {_with_component(key, modules): t for key, t in tensors.items()}
        model = deepcopy(self.source)
        for task in plan.all_tasks:
            result = plan.results[task.name]
            for weight in task.weights if result.config.compressed or result.refit else []:
                W_hat = stored_weight(task, result, weight.name, tensors.__getitem__)
                dense_weight(model, weight.name).copy_(W_hat)
        found = self._logits(self._load(f"{name}/checkpoint"))
        distance = _distance(found, self._logits(model))
        assert distance <= EXACT, f"the loaded model differs from its weights by {distance:.2g}"
        return found

    @torch.no_grad()
    def _compare_layers_in_turn(self) -> None:
        """Apply the layers one after the other, in batches of two windows, and one of one."""
        before = batch_size.BATCH_TOKENS["cpu"]
        batch_size.BATCH_TOKENS["cpu"] = 2 * LENGTH
        try:
            prepared = prepare(self._recipe("svd-llm", "turn").recipe, STAGES)
            with open_session(prepared, Machine("cpu")) as session:
                executor = layer_executor.LayerExecutor(session.models.calibration(0))
                states, tokens = executor.embedded(), executor.tokens
                for index in range(len(prepared.dense.layers)):
                    with executor.layer(index):
                        executor.advance_(index, states)
                with executor.around_layers(head=True):
                    logits = [executor.logits(states[b], tokens[b]) for b in executor.batches]
        finally:
            batch_size.BATCH_TOKENS["cpu"] = before
        expected = self.source(input_ids=tokens, use_cache=False).logits
        distance = _distance(torch.cat(logits), expected)
        assert distance <= EXACT, f"differ from the whole model by {distance:.2g}"

    def _compare_without_layers(self) -> None:
        """Compare the result of `drop` with the source whose dropped layers pass their input."""
        plan = json.loads((self.folder / "drop/checkpoint/lrc/plan.json").read_text())
        dropped = plan["slices"][0]["facts"]["dropped"]
        assert dropped, "no layer was removed"
        model = deepcopy(self.source)
        for index in dropped:
            layer = model.get_submodule(self.prepared.dense.layer_names[index])
            layer.forward = _passing(layer.forward)
        distance = _distance(self._logits(self._load("drop/checkpoint")), self._logits(model))
        assert distance <= EXACT, f"differs from the model without {dropped} by {distance:.2g}"


def dense_weight(model: Any, name: str) -> Tensor:
    """Return the weight [d_out, d_in] of a linear or of an expert, a view of a 3-D parameter."""
    try:
        found: Tensor = model.get_submodule(name).weight
    except AttributeError:
        experts, number, leaf = name.rsplit(".", 2)
        module = model.get_submodule(experts)
        found = getattr(module, leaf)[int(number)]
        # Llama 4 does not state that its matrices are transposed.
        found = found.T if getattr(module, "is_transposed", True) else found
    return found


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token for every byte, which every vocabulary can hold."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["<s>", "</s>", *alphabet])}
    bpe = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", model_max_length=256
    )


def _passing(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Return a forward with the outputs of another, but the hidden states of its input."""

    def passing(*args: Any, **kwargs: Any) -> Any:
        out = forward(*args, **kwargs)
        hidden = args[0] if args else kwargs["hidden_states"]
        return (hidden, *out[1:]) if isinstance(out, tuple) else hidden

    return passing


def _with_component(name: str, modules: Any) -> str:
    """Return the name of a tensor of a plain checkpoint as those of lrc have it."""
    layer, _, leaf = name.rpartition(".")
    return f"{layer}.dense.{leaf}" if layer in modules else name


def _distance(a: Tensor, b: Tensor) -> float:
    """Return the root mean square of a - b over the standard deviation of b."""
    if a.shape != b.shape:
        return float("inf")
    return float((a - b).pow(2).mean().sqrt() / b.std().clamp_min(1e-9))
