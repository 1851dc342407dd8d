"""Models that `lrc eval` and `lrc generate` load as a whole."""

import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from transformers import AutoConfig

from lrc.compressors.checkpoint.reader import load_checkpoint, load_tokenizer
from lrc.compressors.evaluate.scores import Scores, evaluate_model, unmeasured
from lrc.compressors.evaluate.side_by_side import evaluate_pair, refuse_pair, unmeasured_pair
from lrc.compressors.evaluate.streaming_rule import why_too_large
from lrc.compressors.io.machine import OnStep
from lrc.compressors.models import source as models
from lrc.compressors.models.model_kinds import kind_of
from lrc.compressors.models.same_tokens import Tokens
from lrc.configs.recipe import Evaluate, Model


@dataclass(frozen=True)
class Skeleton:
    """A checkpoint of which no weight is in memory."""

    path: str
    model: Any
    """On the meta device, in its original shapes."""
    tokenizer: Any
    warnings: list[str]

    @property
    def tokens(self) -> Tokens:
        """The meaning of its token ids."""
        return Tokens.of(self.model.config, self.tokenizer)

    def has_vocabulary_of(self, other: "Skeleton") -> bool:
        """Return whether its tokens are those of another checkpoint."""
        return self.tokens == other.tokens

    def bytes_on(self, device: str) -> int:
        """Return the memory that the whole model takes at least."""
        stored = file_bytes(self.path)
        if stored is not None and getattr(self.model.config, "quantization_config", None):
            return stored
        dtype = getattr(self.model.config, "dtype", None) or torch.bfloat16
        # On a CPU, models run in float32.
        itemsize = 4 if torch.device(device).type == "cpu" else dtype.itemsize
        return int(itemsize * sum(p.numel() for p in self.model.parameters()))


@dataclass(frozen=True)
class WholeModel:
    """Measures what needs a whole model in memory."""

    skeleton: Skeleton
    first: Skeleton
    """The checkpoint with which it is compared."""
    request: Evaluate
    device: str
    seed: int
    trusted: bool
    on_step: OnStep

    def measure(self, *, compare: bool) -> tuple[Scores, Scores | None]:
        """Return the scores of the checkpoint and, if requested, of both."""
        model, tokenizer = self._load(self.skeleton), self.skeleton.tokenizer
        options: Any = {"on_step": self.on_step}
        found = evaluate_model(model, tokenizer, self.request, seed=self.seed, **options)
        if not (compare and self.request.compared_texts):
            return found, None

        def both() -> tuple[Any, Any]:
            refuse_pair(self.first.bytes_on(self.device), self.device)
            return self._load(self.first), model

        missing = unmeasured_pair(self.request)
        return found, evaluate_pair(both, tokenizer, self.request, missing, **options)

    def add_tasks(self, scores: Scores) -> Scores:
        """Add the scores of tasks, or the reason why there are none."""
        tasks = self.request.model_copy(update={"perplexity": []})
        wanted = {*scores["missing"]} & {*unmeasured(tasks)["missing"]}
        if not wanted:
            return scores
        n_bytes = self.skeleton.bytes_on(self.device)
        if reason := why_too_large(n_bytes, self.skeleton.path, self.device):
            return scores | {"missing": scores["missing"] | dict.fromkeys(wanted, reason)}
        return evaluate_model(
            self._load(self.skeleton),
            self.skeleton.tokenizer,
            tasks,
            seed=self.seed,
            on_step=self.on_step,
            scores=scores,
        )

    def _load(self, skeleton: Skeleton) -> Any:
        return load_model(skeleton.path, self.device, trusted=self.trusted)


def file_bytes(path: str) -> int | None:
    """Return the size of the weight files of a folder or a GGUF file; None of a Hub id."""
    place = Path(path).expanduser()
    files = [place] if place.is_file() else place.glob("*.safetensors")
    return sum(each.stat().st_size for each in files) if place.exists() else None


def load_skeleton(path: str, warnings: list[str], *, trusted: bool = False) -> Skeleton:
    """Load the tokenizer and the config of a checkpoint."""
    folder = Path(path)
    if folder.is_dir():
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trusted)
    else:
        config = models.locate(Model(path=path, trust_remote_code=trusted)).config
    tokenizer = find_tokenizer(path, trusted=trusted)
    with init_empty_weights():
        model = kind_of(config).auto_class.from_config(config, trust_remote_code=trusted)
    return Skeleton(path, model, tokenizer, warnings)


def find_tokenizer(path: str, *, trusted: bool = False) -> Any:
    """Load the tokenizer of a folder, Hub id or GGUF file."""
    folder = Path(path)
    if folder.is_dir():
        return load_tokenizer(folder, trust_remote_code=trusted)
    return models.load_tokenizer(models.locate(Model(path=path, trust_remote_code=trusted)))


def load_model(path: str, device: str, *, trusted: bool = False) -> Any:
    """Load a model: a folder as it is stored, a Hub id or GGUF file as in a recipe."""
    dtype = torch.float32 if device == "cpu" else None
    load = partial(load_checkpoint, dtype=dtype, device=device, trust_remote_code=trusted)
    folder = Path(path)
    if folder.is_dir():
        return load(folder)
    found = models.locate(Model(path=path, trust_remote_code=trusted))
    if found.gguf is None:
        return load(found.folder)
    # It imports the package gguf, which takes a third of a second.
    from lrc.compressors.checkpoint.gguf_conversion import convert_gguf

    with tempfile.TemporaryDirectory() as converted:
        convert_gguf(found, Path(converted))
        return load(Path(converted))
