"""Run-time layers of compressed weights: sums of components whose tensors may be quantized."""

from lrc.compressors.layers.block_sparse import BlockSparse
from lrc.compressors.layers.component import Component, ComponentConfig, Sizes
from lrc.compressors.layers.compressed_embedding import CompressedEmbedding, TiedHead
from lrc.compressors.layers.compressed_linear import (
    CompressedLinear,
    layer_tensors,
    reconstruct,
    sentinel,
)
from lrc.compressors.layers.config import COMPONENTS, WeightConfig
from lrc.compressors.layers.quantization_args import QuantizationArgs, TensorSpec, TensorSpecs

__all__ = [
    "COMPONENTS",
    "BlockSparse",
    "Component",
    "ComponentConfig",
    "CompressedEmbedding",
    "CompressedLinear",
    "QuantizationArgs",
    "Sizes",
    "TensorSpec",
    "TensorSpecs",
    "TiedHead",
    "WeightConfig",
    "layer_tensors",
    "reconstruct",
    "sentinel",
]
