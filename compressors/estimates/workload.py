"""The sizes of a run, counted from the plan and the shapes of the model."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from math import prod

import torch

from lrc.compressors.calibrate.batch_size import backward_bytes, batch_tokens
from lrc.compressors.calibrate.calibration_passes import head_tokens
from lrc.compressors.calibrate.segments import (
    VALUE_BYTES,
    Segments,
    differentiates,
    statistics_bytes,
)
from lrc.compressors.checkpoint.writer import MAX_SHARD_BYTES
from lrc.compressors.evaluate.side_by_side import compared_windows, unmeasured_pair
from lrc.compressors.evaluate.streaming_rule import ModelBytes, streams
from lrc.compressors.models.architecture import Architecture, Linear
from lrc.compressors.planning.plan import Plan
from lrc.compressors.planning.required_statistics import required_statistics
from lrc.compressors.planning.tasks import LayerTask
from lrc.compressors.prepare import Prepared
from lrc.compressors.statistic_division import state_width, statistic_segments
from lrc.configs.recipe import Calibration, Evaluate, Perplexity
from lrc.configs.size import GIB


@dataclass(frozen=True)
class Workload:
    """What a prepared recipe computes and stores on a device; sizes are in bytes."""

    prepared: Prepared
    device: str
    processes: int = 1
    """Number of processes that divide the work."""

    @property
    def kind(self) -> str:
        """``cpu`` or ``cuda``."""
        return torch.device(self.device).type

    @property
    def plan(self) -> Plan:
        """The plan before allocation."""
        return self.prepared.plan

    @property
    def architecture(self) -> Architecture:
        """The model that is decomposed."""
        return self.prepared.architecture

    @property
    def evaluate(self) -> Evaluate:
        """Options of the evaluation."""
        return self.prepared.recipe.evaluate

    @cached_property
    def calibration(self) -> Calibration:
        """Options of the calibration."""
        return Calibration.model_validate(self.plan.calibration)

    @property
    def memory_limit(self) -> int:
        """Hidden states of a process that are larger than this are on disk."""
        return int(self.calibration.memory_limit_gib * GIB / self.processes)

    def share(self, pieces: int) -> float:
        """Return the part of equal pieces of work that the process with most of them has."""
        return math.ceil(pieces / self.processes) / max(pieces, 1)

    @property
    def window_share(self) -> float:
        """Part of the calibration windows that a process has: whole batches."""
        return self.share(math.ceil(self.tokens / self.batch)) if self.tokens else 1.0

    @cached_property
    def tokens(self) -> int:
        """Calibration tokens; 0 if no text is read."""
        reads = self.statistics or self.plan.slices or self.compensated
        return self.calibration.samples * self.calibration.window if reads else 0

    @property
    def batch(self) -> int:
        """Tokens that a layer is applied to at a time."""
        samples, window = self.calibration.samples, self.calibration.window
        return self.whole_windows(batch_tokens(self.architecture, self.kind, samples, window))

    @property
    def backward_bytes(self) -> int:
        """What a backward pass through a layer keeps for a token."""
        return backward_bytes(self.architecture, self.kind, self.calibration.window)

    @property
    def head_batch(self) -> int:
        """Tokens whose logits exist at a time while gradients are taken."""
        return min(self.batch, self.whole_windows(head_tokens(self.kind, self.vocabulary)))

    def whole_windows(self, most: int) -> int:
        """Return the tokens of as many windows as fit into `most`, at least of one."""
        length = self.calibration.window
        return min(self.tokens, max(1, most // length) * length)

    @property
    def itemsize(self) -> int:
        """Bytes of a number as the source is read."""
        return self.prepared.source.dtype.itemsize

    @cached_property
    def width(self) -> int:
        """Size of a hidden state."""
        return state_width(self.prepared)

    @cached_property
    def vocabulary(self) -> int:
        """Number of logits of a token."""
        return int(self.prepared.source.config.get_text_config().vocab_size)

    @cached_property
    def layers(self) -> list[int]:
        """Parameters of every decoder layer."""
        return [sum(p.numel() for p in layer.parameters()) for layer in self.architecture.layers]

    @cached_property
    def dense_layers(self) -> list[int]:
        """Parameters of every decoder layer of the source."""
        layers = self.prepared.dense.layers
        return [sum(p.numel() for p in layer.parameters()) for layer in layers]

    @cached_property
    def used_share(self) -> float:
        """Part of the parameters of all layers that a token uses: only some experts receive it."""
        unused = 0.0
        for linears in self.linears:
            of_experts = [linear for linear in linears.values() if linear.expert is not None]
            if number := len({linear.name.rpartition(".")[0] for linear in of_experts}):
                share = max(0.0, 1 - self.experts_of_token / number)
                unused += share * sum(linear.d_out * linear.d_in for linear in of_experts)
        return 1 - unused / max(sum(self.layers), 1)

    def pass_operations(self, layers: list[int], length: int) -> float:
        """Return the operations of all products for a token that passes through layers.

        `layers` are their numbers of parameters, and `length` is that of a window.
        """
        return 2 * self.used_share * sum(layers) + 4 * length * self.width * len(layers)

    @property
    def experts_of_token(self) -> int:
        """Number of experts that receive a token; 2 if the config does not say so."""
        config = self.prepared.source.config.get_text_config()
        found = getattr(config, "num_experts_per_tok", None)
        return found if isinstance(found, int) else 2

    @cached_property
    def embedding(self) -> int:
        """Parameters of the input embedding."""
        return int(self.architecture.model.get_input_embeddings().weight.numel())

    @cached_property
    def dense_embedding(self) -> int:
        """Parameters of the input embedding of the source."""
        return int(self.prepared.dense.model.get_input_embeddings().weight.numel())

    @cached_property
    def widest(self) -> int:
        """Width of the widest output of a linear."""
        return max(linear.d_out for each in self.linears for linear in each.values())

    @cached_property
    def largest(self) -> int:
        """Numbers of the largest matrix of a layer."""
        return max(one.d_out * one.d_in for each in self.linears for one in each.values())

    @property
    def attention_heads(self) -> int:
        """Heads of a layer whose weights of all pairs of tokens are computed; 0 if unknown."""
        config = self.architecture.model.config.get_text_config()
        return int(getattr(config, "num_attention_heads", 0) or 0)

    @cached_property
    def largest_file(self) -> int:
        """Bytes of the largest file of weights that is loaded whole: of the source or the result.

        Pages of a file that is loaded to a GPU stay in memory until all of it is.
        """
        dense, result = self.plan.dense_bytes, min(self.plan.compressed_bytes, MAX_SHARD_BYTES)
        source = self.prepared.source
        if source.gguf is not None or not source.weights_local:
            return max(min(dense, MAX_SHARD_BYTES), result)
        sizes = (file.stat().st_size for file in source.folder.glob("*.safetensors"))
        return max([result, *(min(size, dense) for size in sizes)])

    @cached_property
    def heads(self) -> int:
        """Parameters of the output embedding of the source; 0 if it is that of the input."""
        dense = self.prepared.dense
        head = dense.model.get_output_embeddings()
        if head is None:
            return 0
        names = [name for name, module in dense.model.named_modules() if module is head]
        tied = any(f"{name}.weight" in dense.tied for name in names)
        return 0 if tied else int(head.weight.numel())

    @cached_property
    def linears(self) -> list[dict[str, Linear]]:
        """Linears of every layer by name."""
        found: list[dict[str, Linear]] = [{} for _ in self.layers]
        for linear in self.architecture.linears:
            found[linear.layer][linear.name] = linear
        return found

    @property
    def tasks(self) -> list[LayerTask]:
        """Tasks that change a weight."""
        return [task for task in self.plan.tasks if task.compressed]

    @property
    def pending(self) -> list[LayerTask]:
        """Tasks whose configuration an allocator will choose."""
        return [task for task in self.tasks if task.pending]

    @cached_property
    def stored_type(self) -> str | None:
        """Type of most numbers in a GGUF source; None for another source."""
        source = self.prepared.source
        if source.gguf is None:
            return None
        from lrc.compressors.io.gguf_file import read_gguf  # imports gguf, which takes 0.3 s

        counts: Counter[str] = Counter()
        for header in read_gguf(source.folder / source.gguf)[1].values():
            counts[header.dtype] += prod(header.shape)
        return counts.most_common(1)[0][0]

    @property
    def columnwise(self) -> int:
        """Number of matrices that are quantized column by column."""
        found = [task.quantize for task in self.tasks if task.quantize is not None]
        return sum(each.quantizer != "rtn" for each in found)

    @cached_property
    def compensated(self) -> list[LayerTask]:
        """Tasks that compensate for errors of the layers before."""
        return [task for task in self.plan.tasks if task.compensate is not None]

    @cached_property
    def compensated_experts(self) -> Counter[tuple[int, int]]:
        """Number of experts whose inputs compensation measures, by layer and width of the input."""
        inputs = {
            (task.layer, task.name.rpartition(".")[0], task.shape[1])
            for task in self.compensated
            if task.compensate is not None and task.compensate.routed
        }
        return Counter((layer, d_in) for layer, _, d_in in inputs)

    @cached_property
    def statistics(self) -> dict[str, tuple[str, ...]]:
        """Statistics that calibration collects, by linear."""
        return required_statistics(self.plan.tasks)

    @cached_property
    def differentiates(self) -> bool:
        """Whether calibration has a backward pass."""
        return differentiates(self.statistics)

    @cached_property
    def statistics_bytes(self) -> list[int]:
        """Statistics of every layer on disk."""
        return statistics_bytes(self.architecture, self.statistics, stored=True)

    @cached_property
    def sum_bytes(self) -> list[int]:
        """Statistics of every layer in memory, where second moments are whole matrices."""
        return statistics_bytes(self.architecture, self.statistics, stored=False)

    @cached_property
    def segments(self) -> Segments | None:
        """How the layers are divided if their statistics do not fit on the disk together."""
        return statistic_segments(self.prepared)

    @property
    def sum_products(self) -> int:
        """Multiplications of a token for all second moments, of each of which one triangle."""
        return sum(each // VALUE_BYTES for each in self.statistics_bytes)

    @property
    def states(self) -> int:
        """Hidden states of the calibration windows of a process after one layer."""
        return int(VALUE_BYTES * self.tokens * self.width * self.window_share)

    @property
    def checkpoints(self) -> list[int]:
        """Inputs of the layers that a backward pass goes through; empty without one."""
        numbers = int(self.tokens * self.width * self.window_share)
        layers = len(self.layers)
        if self.segments is not None:
            layers = max(b - a for a, b in pairwise(self.segments.ends))
        return [numbers * max(2, self.itemsize)] * (layers if self.differentiates else 0)

    @cached_property
    def results(self) -> list[int]:
        """Compressed tensors of every layer on disk."""
        found = [0] * len(self.layers)
        for task in self.plan.tasks:
            if task.compressed or task.compensate is not None:
                found[task.layer] += task.bits // 8
        return found

    def scored(self, spec: Perplexity) -> int | None:
        """Return the tokens of an evaluation text; None if they are not known before it is read."""
        counts = [spec.windows, None if spec.tokens is None else spec.tokens // spec.window]
        known = [count for count in counts if count is not None]
        return min(known) * spec.window if known else None

    @property
    def scored_tokens(self) -> int:
        """Tokens of all evaluation texts, as far as they are known."""
        return sum(self.scored(spec) or 0 for spec in self.evaluate.perplexity)

    @property
    def compared_tokens(self) -> int:
        """Tokens on which the predictions of both models are compared."""
        return sum(
            min(self.scored(spec) or 0, compared_windows(spec, self.evaluate) * spec.window)
            for spec in self.evaluate.compared_texts
        )

    @property
    def scored_share(self) -> float:
        """Part of the windows of the evaluation texts that a process has."""
        counts = [(self.scored(spec) or 0) // spec.window for spec in self.evaluate.perplexity]
        return max((self.share(count) for count in counts if count), default=1.0)

    @property
    def model_itemsize(self) -> int:
        """Bytes of a number of the models that are evaluated; CPUs compute in float32."""
        return 4 if self.kind == "cpu" else self.itemsize

    @cached_property
    def model_bytes(self) -> ModelBytes:
        """Memory of the weights of the dense and the compressed model."""
        dense = self.plan.dense_parameters * self.model_itemsize
        quantized = [task for task in self.tasks if task.quantize is not None]
        if not quantized or any(task.pending for task in quantized):
            compressed = self.plan.compressed_bytes * self.model_itemsize // self.itemsize
        elif all(task.config.types == "dense" for task in quantized):  # expanded by transformers
            compressed = dense
        else:
            compressed = self.plan.compressed_bytes
        return ModelBytes(dense, compressed)

    def streams(self, free: int) -> bool:
        """Return whether models are evaluated layer by layer, for `free` bytes of memory."""
        translates = self.prepared.dense.kind.translates  # its models are always whole
        return not translates and streams(self.evaluate, self.model_bytes, free)

    @property
    def compares(self) -> bool:
        """Whether both models are in memory together."""
        return bool(unmeasured_pair(self.evaluate)["missing"])


def by_layer(tasks: Sequence[LayerTask]) -> list[list[LayerTask]]:
    """Return the tasks of each layer."""
    layers = sorted({task.layer for task in tasks})
    return [[task for task in tasks if task.layer == layer] for layer in layers]


def sides(task: LayerTask) -> tuple[int, int]:
    """Return the shorter and the longer side of a task's matrix."""
    return min(task.stacked_shape), max(task.stacked_shape)


def numbers(task: LayerTask) -> int:
    """Return the numbers of a task's dense matrix."""
    return prod(task.stacked_shape)
