"""Baselines for a compressed model: the same matrices compressed without calibration.

Either quantized by round-to-nearest or pruned to the largest entries of every row. A baseline is
made from the dense model in memory, or from the layers of it that are, one matrix at a time; its
size is that of a file.
"""

from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lrc.compressors.distributed.processes import ALONE, Processes
from lrc.compressors.evaluate.scores import Scores, check_same, perplexity_entry
from lrc.compressors.io.machine import OnStep
from lrc.compressors.layers import ComponentConfig, QuantizationArgs, WeightConfig
from lrc.compressors.layers.experts import split_experts_
from lrc.compressors.solvers.quantization_grid import ScaleOverflow
from lrc.compressors.solvers.quantized_matrix import NUMBERS, round_to_nearest
from lrc.configs.errors import ModelError
from lrc.configs.recipe import Evaluate

STEPS = 2**40  # of the fraction of kept entries: finer than one entry of any row


@dataclass(frozen=True)
class Targets:
    """The matrices that a run compresses, and the bytes of the whole model before and after."""

    shapes: Mapping[str, tuple[int, int]]
    """Linear -> [d_out, d_in] of its dense weight."""
    dtype: torch.dtype
    """Of the dense model in the file."""
    dense_bytes: int
    compressed_bytes: int

    @property
    def dense_bits(self) -> int:
        """Bits of the matrices in the dense model."""
        return sum(self.dtype.itemsize * 8 * m * n for m, n in self.shapes.values())

    @property
    def budget_bits(self) -> int:
        """Bits for the matrices in a model of as many bytes as the result."""
        return self.dense_bits - 8 * (self.dense_bytes - self.compressed_bytes)


@dataclass(frozen=True)
class Baseline:
    """How every matrix is compressed, and the size of the result."""

    name: str
    how: str
    """Description for the report."""
    stored: Mapping[str, QuantizationArgs | int]
    """Linear -> how it is quantized, or how many entries of every row are kept."""
    bits: int
    """Of the matrices."""
    targets: Targets

    @property
    def bytes(self) -> int:
        """Bytes of the tensors of the whole model."""
        return self.targets.dense_bytes - (self.targets.dense_bits - self.bits) // 8

    @property
    def kept(self) -> float:
        """Bits of the matrices over those in the dense model."""
        return self.bits / self.targets.dense_bits

    def apply_(self, model: Any, on_matrix: Callable[[int, int], None]) -> None:
        """Compress the weights of a dense model in place.

        `on_matrix` is called with (done, total) after each and may raise to stop.
        """
        split_experts_(model)
        for done, (name, storage) in enumerate(self.stored.items(), 1):
            self._compress_(name, model.get_submodule(name).weight, storage)
            on_matrix(done, len(self.stored))

    @contextmanager
    def applied(self, model: Any, tied: Mapping[str, str]) -> Iterator[None]:
        """Compress the matrices of a dense model that are in memory, within the context.

        Those on the meta device are left out. `tied` maps a parameter to the one whose values it
        has, as in `Architecture`.

        Raises
        ------
        ModelError
            If a matrix cannot be quantized.
        """
        with ExitStack() as stack:
            for name, module in model.named_modules():
                full = f"{name}.weight"
                stored = tied.get(full, full).removesuffix(".weight")
                if stored in self.stored and not module.weight.is_meta:
                    weight = module.weight
                    own = nn.Parameter(weight.detach().clone(), requires_grad=False)
                    self._compress_(stored, own, self.stored[stored])
                    module.weight = own
                    stack.callback(setattr, module, "weight", weight)
            yield

    @torch.no_grad()
    def _compress_(self, name: str, weight: Tensor, storage: QuantizationArgs | int) -> None:
        for rows in weight.split(max(1, NUMBERS // weight.shape[1])):
            rows.copy_(_compressed(name, rows, storage, self.targets.dtype))


def plan_baseline(written: str, targets: Targets) -> Baseline:
    """Plan a baseline by its name in the recipe: ``int4-g64`` and the like, or ``sparse``."""
    if written == "sparse":
        return _sparse(targets)
    return _quantized(QuantizationArgs.parse(written), targets)


def _quantized(scheme: QuantizationArgs, targets: Targets) -> Baseline:
    stored: dict[str, QuantizationArgs | int] = {}
    bits = 0
    undivided: Counter[int] = Counter()
    for name, shape in targets.shapes.items():
        own = scheme
        if not scheme.divides(shape[1]):
            own = QuantizationArgs(scheme.bits, symmetric=scheme.symmetric)
            undivided[shape[1]] += 1
        stored[name] = own
        specs = own.matrix_specs("weight", list(shape)).values()
        bits += sum(8 * prod(s.shape) * (s.dtype or targets.dtype).itemsize for s in specs)
    how = "round to nearest, every scale covers the full range of its numbers"
    if undivided:
        rows = ", ".join(str(width) for width in sorted(undivided))
        how += (
            f"; one scale a row in {undivided.total()} of {len(stored)} matrices, whose rows of "
            f"{rows} numbers are not divisible into groups of {scheme.row_multiple}"
        )
    return Baseline(str(scheme), how, stored, bits, targets)


def _sparse(targets: Targets) -> Baseline:
    """Keep the same fraction of every row, as large as the bytes of the result allow."""
    bits = targets.dtype.itemsize * 8

    def entries(fraction: float) -> dict[str, int]:  # of a row; at least one, even if too large
        return {name: max(1, int(fraction * n)) for name, (_, n) in targets.shapes.items()}

    def size(kept: Mapping[str, int]) -> int:
        return sum(
            WeightConfig(
                (m, n), (ComponentConfig("sparse", {"nonzeros": m * kept[name]}),)
            ).stored_bits(bits)
            for name, (m, n) in targets.shapes.items()
        )

    steps = range(STEPS + 1)
    n_fitting = bisect_right(steps, targets.budget_bits, key=lambda i: size(entries(i / STEPS)))
    kept = entries(max(0, n_fitting - 1) / STEPS)
    n_kept = sum(kept[name] * m for name, (m, _) in targets.shapes.items())
    percent = 100 * n_kept / sum(m * n for m, n in targets.shapes.values())
    how = f"the largest {percent:.1f} % of the entries of every row, and a 1-bit mask"
    return Baseline("sparse, magnitude", how, kept, size(kept), targets)


def _compressed(
    name: str, weight: Tensor, storage: QuantizationArgs | int, dtype: torch.dtype
) -> Tensor:
    """Return the compressed weight [d_out, d_in]; `dtype` is that of scales in the file."""
    if isinstance(storage, QuantizationArgs):
        try:
            return round_to_nearest(weight, storage, dtype=dtype).weight()
        except ScaleOverflow as error:
            raise ModelError(f"{name}: cannot be quantized to {storage} ({error})") from error
    largest = weight.abs().topk(storage, dim=1, sorted=False).indices  # [d_out, storage]
    return torch.zeros_like(weight).scatter_(1, largest, weight.gather(1, largest))


def measure(
    baseline: Baseline,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    evaluate: Evaluate,
    on_step: OnStep,
    processes: Processes = ALONE,
) -> dict[str, Scores | None]:
    """Apply a baseline to a dense model, in place, and return its perplexities by text.

    None where the logits are not finite or the scales do not fit their precision: a run does not
    fail because a baseline does.
    """
    found: dict[str, Scores | None] = {spec.name: None for spec in evaluate.perplexity}
    with suppress(ModelError):
        baseline.apply_(model, partial(on_step, "weights"))
        for spec in evaluate.perplexity:
            with suppress(ModelError):
                found[spec.name] = perplexity_entry(model, tokenizer, spec, on_step, processes)
    return found


def record(
    baseline: Baseline, scores: Mapping[str, Scores | None], perplexity: Scores
) -> dict[str, Any]:
    """Return a baseline's entry in the report.

    `scores` are from `measure`, `perplexity` those of the result from `compare`: both must have
    been measured on the same texts.
    """
    for name, entry in scores.items():
        if name in perplexity:
            check_same(f"perplexity.{name}", entry, perplexity[name], what=baseline.name)
    return {
        "name": baseline.name,
        "how": baseline.how,
        "bytes": baseline.bytes,
        "kept": baseline.kept,
        "perplexity": {name: entry and entry["perplexity"] for name, entry in scores.items()},
    }
