"""Budgets for the size of the weight files: what remains for the targeted matrices."""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from lrc.compressors.layers import QuantizationArgs, TensorSpecs, WeightConfig, layer_tensors
from lrc.compressors.methods.size_families import components_at
from lrc.compressors.planning.problems import Problems
from lrc.compressors.planning.tasks import LayerTask
from lrc.configs.size import least_text, most_text, parse_size, unit_of

SHARD_BYTES = 10**9
"""`write_weights` aims at 2e9 bytes and two neighbouring shards exceed that together."""


@dataclass(frozen=True)
class WholeModel:
    """The stored tensors of a whole dense model, on the meta device."""

    stored: Mapping[str, Tensor]
    embeddings: Sequence[LayerTask] = ()
    """Embedding and head that will be quantized, with known sizes."""

    @property
    def parameters(self) -> int:
        """Number of parameters; tied ones once."""
        return sum(t.numel() for t in self.stored.values())

    @property
    def bytes(self) -> int:
        """Bytes of the tensors, without the headers of the files."""
        return sum(t.numel() * t.element_size() for t in self.stored.values())

    def header_bytes(
        self,
        tasks: Collection[LayerTask],
        types: Collection[str] = (),
        schemes: Collection[QuantizationArgs] = (),
    ) -> int:
        """Return an upper bound of the headers of all safetensors files.

        Parameters
        ----------
        tasks : collection of LayerTask
            Whose weights may stay dense or get any of the components.
        types : collection of str
            Sums of component types that they may get.
        schemes : collection of QuantizationArgs
            Integers that they may get.
        """
        total = self.bytes

        def entry(name: str, dims: Sequence[int]) -> int:
            facts = {"dtype": "BF16", "shape": dims, "data_offsets": [total, total]}
            return len(json.dumps({name: facts}, separators=(",", ":")).encode())

        def entries(name: str, specs: TensorSpecs, widest: int) -> int:
            return sum(
                entry(f"{name}.{leaf}", [widest] * len(spec.shape)) for leaf, spec in specs.items()
            )

        header = sum(
            entries(task.name, layer_tensors(task.config), max(task.shape))
            for task in self.embeddings
        )
        possible = {w.name: (t, w) for t in tasks for w in t.weights}
        for name, tensor in self.stored.items():
            module, _, leaf = name.rpartition(".")
            largest = entry(name, list(tensor.shape))
            if module in possible and leaf == "weight":
                task, weight = possible[module]
                for config in _possible(task, types, schemes):
                    specs = layer_tensors(task.config_of(weight, config))
                    largest = max(largest, entries(module, specs, max(task.shape)))
            header += largest
        shards = total // SHARD_BYTES + 1
        # A length of 8 bytes, the metadata, and up to 7 spaces to a multiple of 8.
        return header + shards * (8 + entry("__metadata__", []) + 7)

    def budget_bits(
        self,
        size: str,
        tasks: Collection[LayerTask],
        where: str,
        problems: Problems,
        types: Collection[str],
        schemes: Collection[QuantizationArgs] = (),
    ) -> int:
        """Return the bits that remain for the weights of `tasks` in files of `size`.

        A size below what the rest of the model takes, or above that of the dense model, is a
        problem.
        """
        wanted = parse_size(size)
        dense = self.bytes + self.header_bytes([])
        rest = self.bytes - sum(t.dense_bits for t in tasks) // 8
        rest += self.header_bytes(tasks, types, schemes)
        rest -= sum(t.dense_bits - t.bits for t in self.embeddings) // 8
        if not rest < wanted < dense:
            unit = unit_of(size)
            problems.add(
                "infeasible-size",
                f"{where}.size",
                f"must be above {least_text(rest, unit)}, which the weights that are not targeted "
                f"take, and below the {most_text(dense, unit)} of the dense model, got {size}; "
                f"{'raise size or target more layers' if wanted <= rest else 'lower size'}",
            )
        return (wanted - rest) * 8


def _possible(
    task: LayerTask, types: Collection[str], schemes: Collection[QuantizationArgs]
) -> list[WeightConfig]:
    """Return one configuration for every set of tensor names that a weight may get."""
    # Tensor names depend on whether integers have zero points, not on bits and group size.
    shape, pattern = task.stacked_shape, task.pattern
    found = [components_at(each, 1, *shape, pattern=pattern) for each in types]
    quantized = [*found, components_at("dense", 1, *task.shape)]
    configs = [replace(task.config, components=each) for each in found]
    for args in {replace(s, bits=8, group_size=None) for s in schemes}:
        configs += [replace(task.config, components=each).quantized(args) for each in quantized]
    return configs
