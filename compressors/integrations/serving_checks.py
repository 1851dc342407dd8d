"""What a serving engine does not support of a checkpoint, and what it must have loaded."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lrc.compressors.checkpoint.format import COPY_AGAIN, PARENT
from lrc.compressors.io.shortened import shortened
from lrc.compressors.layers import (
    ComponentConfig,
    QuantizationArgs,
    TensorSpec,
    TensorSpecs,
    WeightConfig,
    layer_tensors,
    sentinel,
)
from lrc.compressors.layers.model_shapes import SHAPES
from lrc.compressors.layers.residual_basis import BIASES, NORMS
from lrc.configs.errors import CheckpointError

UNSUPPORTED = "unsupported-by-engine"
"""Code of errors about valid checkpoints that an engine cannot run."""
TABLES = {
    SHAPES: (
        "layers have other widths than config.json states",
        "slice with a uniform width (modegpt without 'uniform: false') to serve the model",
    ),
    BIASES: (
        "layers have biases that the architecture lacks",
        "slice with a method that adds none to serve the model",
    ),
    NORMS: (
        "blocks use their own bases of the residual stream",
        "slice with 'rotations: global' to serve the model",
    ),
    PARENT: (
        "weights are read from the parent of the drafter",
        "serve the checkpoint that 'lrc export --format drafter' has read",
    ),
}
"""Table of a checkpoint's config -> what it says, and what to do."""


def check_supported(
    tables: Mapping[str, Any], modules: Mapping[str, WeightConfig], engine: str
) -> None:
    """Reject a checkpoint that an engine cannot run.

    Parameters
    ----------
    tables : mapping
        The ``quantization_config``.
    modules : mapping of str to WeightConfig
    engine : str
        For the message.

    Raises
    ------
    CheckpointError
    """
    where = "config.json: quantization_config"
    for key, (what, remedy) in TABLES.items():
        if tables.get(key):
            example = next(
                iter(tables[key].get("tensors", ()) if key == PARENT else tables[key]), ""
            )
            raise CheckpointError(
                f"{where}.{key}: {what} ({example}), which {engine} does not support; {remedy}, or "
                "use transformers",
                code=UNSUPPORTED,
            )
    for name, config in modules.items():
        if config.shares is not None:
            raise CheckpointError(
                f"{where}.modules[{name!r}]: shares a factor with {config.shares}, which {engine} "
                "does not support; compress with svd-llm or kfac instead of basis-sharing, or use "
                "transformers",
                code=UNSUPPORTED,
            )


def check_version_of(
    package: str, version: str, first: tuple[int, int], after: tuple[int, int]
) -> None:
    """Reject versions of an engine with which lrc was not tested.

    Parameters
    ----------
    package, version : str
    first, after : tuple of int
        The first version that is supported, and the first after it that is not.

    Raises
    ------
    CheckpointError
    """
    numbers = tuple(int(part) if part.isdigit() else 0 for part in version.split(".")[:2])
    if not first <= numbers < after:
        oldest, newest = (".".join(map(str, each)) for each in (first, after))
        raise CheckpointError(
            f"{package}: must be at least {oldest} and older than {newest} to serve a checkpoint "
            f"of lrc, got {version}; install such a version, or serve a plain checkpoint (slicing, "
            "or integers without factors)",
            code=UNSUPPORTED,
        )


def fused_names(prefix: str, mapping: Mapping[str, Sequence[str]]) -> list[str]:
    """Return the names of the layers that an engine fuses into one.

    >>> fused_names("model.layers.0.mlp.gate_up_proj", {"gate_up_proj": ["gate_proj", "up_proj"]})
    ['model.layers.0.mlp.gate_proj', 'model.layers.0.mlp.up_proj']
    """
    parent, dot, leaf = prefix.rpartition(".")
    return [f"{parent}{dot}{name}" for name in mapping.get(leaf, [leaf])]


def embedding_name(
    prefix: str, shape: tuple[int, int], modules: Mapping[str, WeightConfig]
) -> str | None:
    """Return the name of a quantized embedding or head in the checkpoint; None if it is neither.

    Some classes of engines do not state the name of the input embedding. It is then the only module
    of this shape that is not an output head.
    """
    if prefix:
        return prefix if prefix in modules else None
    found = [name for name, c in modules.items() if c.shape == shape and "head" not in name]
    return found[0] if len(found) == 1 else None


class LayerTensors:
    """The stored tensors of one layer, collected while an engine reads the files.

    Parameters
    ----------
    name : str
        For messages.
    config : WeightConfig, QuantizationArgs or None
        None for a layer that is not compressed; integers of a plain checkpoint, whose tensors have
        other names.
    shape : tuple of int
        ``(d_out, d_in)`` of the whole weight.
    """

    def __init__(
        self, name: str, config: WeightConfig | QuantizationArgs | None, shape: tuple[int, int]
    ) -> None:
        self.plain = isinstance(config, QuantizationArgs)
        if isinstance(config, QuantizationArgs):
            config = WeightConfig(shape, (ComponentConfig("dense", {}, config),))
        self.name, self.config, self.shape = name, config, shape
        self.found: dict[str, Tensor] = {}
        if config is not None and config.shape != shape:
            raise CheckpointError(
                f"config.json: quantization_config.modules[{name!r}]: shape must be "
                f"{list(shape)}, got {list(config.shape)}; the config was edited, or belongs to "
                "another model",
                code="invalid-config",
            )

    @property
    def expected(self) -> TensorSpecs:
        """The tensors by their names within the layer, without a bias."""
        if self.config is None:
            return {"weight": TensorSpec(list(self.shape))}
        specs = layer_tensors(self.config)
        specs.pop("bias", None)
        if self.plain:
            del specs["weight"]  # a plain checkpoint has no sentinels
            specs = {leaf.removeprefix("dense."): spec for leaf, spec in specs.items()}
        return specs

    def add(self, leaf: str, tensor: Tensor) -> None:
        """Keep a tensor.

        Raises
        ------
        CheckpointError
            If the layer has no such tensor, or it has another shape or dtype.
        """
        spec = self.expected.get(leaf)
        if spec is None:
            raise self.damaged(f"{leaf}: expected nothing, found {list(tensor.shape)}")
        number = spec.dtype is None and tensor.is_floating_point()
        if list(tensor.shape) != spec.shape or not (number or tensor.dtype == spec.dtype):
            expected = "floating-point numbers" if spec.dtype is None else spec.dtype
            raise self.damaged(
                f"{leaf}: expected {spec.shape}, {expected}, found {list(tensor.shape)}, "
                f"{tensor.dtype}"
            )
        self.found[leaf] = tensor

    def take(self, device: torch.device) -> dict[str, Tensor]:
        """Return all tensors on a device by the names of `layer_tensors`, and forget them.

        Raises
        ------
        CheckpointError
            If some are missing.
        """
        missing = [leaf for leaf in self.expected if leaf not in self.found]
        if missing:
            raise self.damaged(f"missing: {shortened(missing, ', ')}")
        found, self.found = self.found, {}
        if self.plain:
            found = {"weight": sentinel(), **{f"dense.{leaf}": t for leaf, t in found.items()}}
        return {leaf: tensor.to(device) for leaf, tensor in found.items()}

    def damaged(self, what: str) -> CheckpointError:
        """Return the error about damaged or missing tensors."""
        return CheckpointError(
            f"{self.name}: the tensors do not match config.json: {what}; {COPY_AGAIN}",
            code="tensor-mismatch",
        )


def check_used(modules: Iterable[str], used: Iterable[str], engine: str) -> None:
    """Reject a checkpoint with compressed layers that the model of an engine does not have.

    Raises
    ------
    CheckpointError
    """
    lost = sorted({*modules} - {*used})
    if lost:
        raise CheckpointError(
            f"{engine} has no linear layer or embedding for {shortened(lost, ', ')}; its class for "
            "this architecture builds them in another way: compress without them ('ignore'), or "
            "use transformers",
            code=UNSUPPORTED,
        )
