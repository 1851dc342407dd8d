"""Linear layers and embeddings of vLLM whose weights are those of a compressed checkpoint.

vLLM makes one layer of several that receive the same input, reads the files once, and gives every
tensor to the `weight_loader` of the parameter with its name. The parameters made here are empty:
their loaders keep the tensors of every fused layer separately, which may have different forms.
After all files are read, products for them are made.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import LinearMethodBase, QKVParallelLinear
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

from lrc.compressors.integrations.serving_checks import UNSUPPORTED, LayerTensors
from lrc.compressors.integrations.terms import FusedProduct, Matrix, Term, terms_of
from lrc.compressors.integrations.vllm_products import make_product
from lrc.compressors.layers import (
    CompressedLinear,
    QuantizationArgs,
    TensorSpec,
    TensorSpecs,
    WeightConfig,
)
from lrc.configs.errors import CheckpointError

SHARDS = {"q": 0, "k": 1, "v": 2}
"""Names that vLLM uses for some of the layers that it fuses, and their numbers."""
Report = Callable[[Sequence[str], Sequence[str], int, int], None]
"""Called when a layer of vLLM is ready: names of its compressed layers, what of them was expanded
to dense matrices, and bytes in the file and of the dense weights."""


class CompressedLinearMethod(LinearMethodBase):  # type: ignore[misc, unused-ignore]
    """How vLLM stores and multiplies by one or several fused layers.

    Parameters
    ----------
    names : sequence of str
        Full names of the fused layers, in the order of their outputs.
    configs : sequence of WeightConfig, QuantizationArgs or None
        Integers of a plain checkpoint, or None for those that are not compressed.
    report : callable
        Called when the layer is ready.
    """

    def __init__(
        self,
        names: Sequence[str],
        configs: Sequence[WeightConfig | QuantizationArgs | None],
        report: Report,
    ) -> None:
        self.names, self.configs, self.report = names, configs, report

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **_: Any,
    ) -> None:
        """Give a layer empty parameters under the names of all tensors of its parts."""
        self.dtype = params_dtype
        self.columns = None
        if input_size_per_partition != input_size:
            start = layer.tp_rank * input_size_per_partition
            self.columns = slice(start, start + input_size_per_partition)
        self.rows: list[slice | None] = [None] * len(self.names)
        d_outs = [output_size]
        divided = sum(output_partition_sizes) != output_size
        if divided or len(self.names) > 1:
            d_outs = self._divide(layer, output_partition_sizes, divided)
        self.parts = [
            LayerTensors(name, config, (d_out, input_size))
            for name, config, d_out in zip(self.names, self.configs, d_outs, strict=True)
        ]
        for part in self.parts:
            if part.config is not None and part.config.bias and not layer.has_bias:
                raise CheckpointError(
                    f"{part.name}: has a bias that the {type(layer).__name__} of vLLM lacks; "
                    "compress with another method than lord, or use transformers",
                    code=UNSUPPORTED,
                )
        specs: TensorSpecs = {"weight": TensorSpec([0])}  # in plain checkpoints there is none
        specs |= {leaf: spec for part in self.parts for leaf, spec in part.expected.items()}
        for leaf, spec in specs.items():
            *path, last = leaf.split(".")
            owner = layer
            for child in path:
                if child not in owner._modules:
                    owner.add_module(child, nn.Module())
                owner = owner._modules[child]
            empty = nn.Parameter(torch.empty(0, dtype=spec.dtype or params_dtype), False)
            empty.weight_loader = partial(self._keep, leaf)  # type: ignore[attr-defined]
            owner.register_parameter(last, empty)
        self.placeholders = sorted({leaf.split(".")[0] for leaf in specs} - {"weight"})

    def _divide(self, layer: Any, sizes: list[int], divided: bool) -> list[int]:
        """Set the rows of each part that this process computes; return the rows of whole parts."""
        if len(sizes) != len(self.names):
            raise CheckpointError(
                f"{self.names[0]}: vLLM divides this layer into {len(sizes)} parts, which the "
                "checkpoint stores as one; serve it without tensor parallelism",
                code=UNSUPPORTED,
            )
        if not divided:
            return sizes
        whole = []
        for i, size in enumerate(sizes):
            # Several devices have the same heads of k and v if there are fewer heads than devices.
            grouped = isinstance(layer, QKVParallelLinear) and i > 0
            copies = layer.num_kv_head_replicas if grouped else 1
            start = layer.tp_rank // copies * size
            self.rows[i] = slice(start, start + size)
            whole.append(size * layer.tp_size // copies)
        return whole

    def _keep(self, leaf: str, _: nn.Parameter, tensor: Tensor, shard: Any = None) -> None:
        part = 0 if shard is None else SHARDS.get(shard, shard)
        self.parts[part].add(leaf, tensor)

    @torch.no_grad()
    def process_weights_after_loading(self, layer: Any) -> None:
        """Make the products; release the stored tensors."""
        device = layer.weight.device
        layers: list[list[Term]] = []
        expanded: list[str] = []
        stored = 0
        for part, rows in zip(self.parts, self.rows, strict=True):
            tensors = part.take(device)
            stored += sum(tensor.nbytes for tensor in tensors.values())
            if part.config is None:
                terms = [Term(Matrix(tensors["weight"].to(self.dtype)))]
            else:
                terms, types = terms_of(_loaded(part, tensors, self.dtype))
                expanded += types
            del tensors
            if rows is not None:
                terms = [term.rows(rows) for term in terms]
            if self.columns is not None:
                terms = [term.columns(self.columns) for term in terms]
            layers.append(terms)
        for name in self.placeholders:
            delattr(layer, name)
        empty = torch.empty(0, dtype=self.dtype, device=device)
        layer.weight = nn.Parameter(empty, requires_grad=False)
        with device:
            layer.compressed = FusedProduct(layers, make_product)
        expanded += map(str, layer.compressed.dequantized)
        size = sum(rows * columns for rows, columns in (part.shape for part in self.parts))
        names = [part.name for part in self.parts if part.config is not None]
        self.report(names, expanded, stored, size * self.dtype.itemsize)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Map ``x`` [..., d_in] to [..., d_out]."""
        y: Tensor = layer.compressed(x)
        return y if bias is None else y + bias


class CompressedEmbeddingMethod(UnquantizedEmbeddingMethod):  # type: ignore[misc, unused-ignore]
    """An embedding, or an output head, whose rows are dequantized after loading.

    The parameters are those of `CompressedLinearMethod`.
    """

    def __init__(self, name: str, config: WeightConfig, report: Report) -> None:
        super().__init__()
        self.name, self.config, self.report = name, config, report

    def create_weights(self, layer: Any, *args: Any, **options: Any) -> None:
        """Give a layer its usual weight, and empty parameters for the stored tensors."""
        super().create_weights(layer, *args, **options)
        self.dtype = layer.weight.dtype
        self.part = LayerTensors(self.name, self.config, self.config.shape)
        self.load_rows = layer.weight.weight_loader
        layer.weight.weight_loader = self._keep("weight")
        layer.dense = nn.Module()
        for leaf, spec in self.part.expected.items():
            if leaf != "weight":
                empty = nn.Parameter(torch.empty(0, dtype=spec.dtype or self.dtype), False)
                empty.weight_loader = self._keep(leaf)  # type: ignore[attr-defined]
                layer.dense.register_parameter(leaf.removeprefix("dense."), empty)

    def _keep(self, leaf: str) -> Callable[[nn.Parameter, Tensor], None]:
        return lambda _, tensor: self.part.add(leaf, tensor)

    @torch.no_grad()
    def process_weights_after_loading(self, layer: Any) -> None:
        """Dequantize the rows into the weight, which a tied head uses, too."""
        tensors = self.part.take(layer.weight.device)
        stored = sum(tensor.nbytes for tensor in tensors.values())
        rows = _loaded(self.part, tensors, self.dtype).dense_weight().to(self.dtype)
        delattr(layer, "dense")
        self.load_rows(layer.weight, rows)
        what = f"embedding or head {self.config.quantization}"
        self.report([self.name], [what], stored, rows.nbytes)
        super().process_weights_after_loading(layer)


def _loaded(part: LayerTensors, tensors: dict[str, Tensor], dtype: torch.dtype) -> CompressedLinear:
    """Return the layer with these tensors; its values are checked."""
    assert part.config is not None
    device = tensors["weight"].device
    layer = CompressedLinear(part.config, device=device, dtype=dtype)
    layer.load_state_dict(tensors)
    problems = layer.problems()
    if problems:
        raise part.damaged("; ".join(problems))
    return layer
