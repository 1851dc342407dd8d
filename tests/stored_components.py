"""Checkpoints of a tiny model that is compressed by hand, one for each type of component."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from lrc.compressors.layers import ComponentConfig, WeightConfig
from lrc.compressors.layers.chain_shape import ChainShape
from lrc.compressors.layers.tensor_train import multiply_out
from lrc.compressors.solvers.chain_fit import tensor_train_svd
from lrc.compressors.solvers.spectrum import spectrum

OWNER, V_PROJ = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.v_proj"
Q_PROJ, UP_PROJ = "model.layers.1.self_attn.q_proj", "model.layers.1.mlp.up_proj"
DOWN_PROJ = "model.layers.1.mlp.down_proj"
SHAPES = {
    OWNER: (32, 32),
    Q_PROJ: (32, 32),
    V_PROJ: (16, 32),
    UP_PROJ: (48, 32),
    DOWN_PROJ: (32, 48),
}
QUANTIZED = {"dense", "block_sparse"}  # always: test_quantize, test_embeddings


def component(kind: str, *, shares: str | None = None, **sizes: int) -> ComponentConfig:
    return ComponentConfig(kind, sizes, shares=shares)


def chain(pattern: str, bond: int) -> ComponentConfig:
    return ComponentConfig("tensor_train", {"bond": bond}, pattern=pattern)


# Enough of each type to meet its special cases: components of layers, and the layer with a bias.
TABLES: dict[str, tuple[dict[str, list[ComponentConfig]], str | None]] = {
    "low_rank": (
        {OWNER: [component("low_rank", rank=8)], DOWN_PROJ: [component("low_rank", rank=5)]},
        DOWN_PROJ,
    ),
    "pivoted_low_rank": (
        {
            OWNER: [component("pivoted_low_rank", rank=8)],
            V_PROJ: [component("pivoted_low_rank", rank=16)],  # all its rows
            DOWN_PROJ: [component("pivoted_low_rank", rank=5)],
        },
        DOWN_PROJ,
    ),
    "shared low_rank": (
        {
            Q_PROJ: [component("low_rank", rank=8, shares=OWNER)],
            UP_PROJ: [component("low_rank", rank=8, shares=OWNER)],
            OWNER: [component("low_rank", rank=8)],
        },
        UP_PROJ,
    ),
    "sparse": (
        {
            OWNER: [component("sparse", nonzeros=500)],
            DOWN_PROJ: [component("sparse", nonzeros=700)],
        },
        DOWN_PROJ,
    ),
    "semi_structured": (
        {
            OWNER: [component("semi_structured", n=5)],
            V_PROJ: [component("semi_structured", n=8)],
            DOWN_PROJ: [component("semi_structured", n=1)],
        },
        DOWN_PROJ,
    ),
    "pivoted_low_rank+sparse": (
        {
            OWNER: [component("pivoted_low_rank", rank=3), component("sparse", nonzeros=400)],
            V_PROJ: [
                component("pivoted_low_rank", rank=16),  # all its rows
                component("sparse", nonzeros=1),
            ],
            DOWN_PROJ: [component("pivoted_low_rank", rank=1), component("sparse", nonzeros=700)],
        },
        DOWN_PROJ,
    ),
    "dictionary": (
        {
            # With a mask, and multiplied out for many tokens.
            OWNER: [component("dictionary", atoms=30, nonzeros=9)],
            V_PROJ: [component("dictionary", atoms=7, nonzeros=7)],
            DOWN_PROJ: [component("dictionary", atoms=20, nonzeros=1)],  # a list of indices
        },
        DOWN_PROJ,
    ),
    "shared dictionary": (
        {
            # With a mask, and multiplied out for many tokens.
            Q_PROJ: [component("dictionary", atoms=24, nonzeros=9, shares=OWNER)],
            # With a list of indices.
            UP_PROJ: [component("dictionary", atoms=24, nonzeros=1, shares=OWNER)],
            OWNER: [component("dictionary", atoms=24, nonzeros=12)],
        },
        UP_PROJ,
    ),
    "tensor_train": (
        {
            OWNER: [chain("4x8,8x4", 20)],  # multiplied out for many tokens
            V_PROJ: [chain("4x4,4x8", 1)],
            DOWN_PROJ: [chain("4x2x4,4x3x4", 9)],
        },
        DOWN_PROJ,
    ),
}


@dataclass(frozen=True)
class Stored:
    """A checkpoint with one type of components, and the dense model of the same function."""

    folder: Path
    dense: Any
    modules: dict[str, WeightConfig]

    def load(self, **options: Any) -> Any:
        options = {"dtype": torch.float32, **options}
        return AutoModelForCausalLM.from_pretrained(self.folder, **options).eval()


def contents(
    name: str, config: WeightConfig, W: Tensor, shared: dict[str, Tensor]
) -> tuple[list[dict[str, Tensor]], Tensor]:
    """Return arguments of `encode` that approximate `W`, and the weight that they represent."""
    sizes = config.sizes
    if config.types == "sparse":
        mask = largest(W.flatten(), sizes["nonzeros"]).view_as(W)
        return [{"W_hat": W * mask, "mask": mask}], W * mask
    if config.types == "semi_structured":
        mask = largest(W.abs().unflatten(1, (-1, 8)), sizes["n"]).flatten(1)
        return [{"W_hat": W * mask, "mask": mask}], W * mask
    if config.types == "pivoted_low_rank+sparse":
        low = spectrum(W).truncate(sizes["rank"])
        E = W - low.B @ low.A
        mask = largest(E.abs().flatten(), sizes["nonzeros"]).view_as(W)
        parts = [{"B": low.B, "A": low.A}, {"W_hat": E * mask, "mask": mask}]
        return parts, low.B @ low.A + E * mask
    if config.types == "dictionary":
        atoms = torch.randperm(len(W), generator=torch.Generator().manual_seed(0))[: sizes["atoms"]]
        D = W[atoms].T if config.shares is None else shared[config.shares]  # [d_in, atoms]
        shared[name] = D
        S = torch.linalg.lstsq(D, W.T).solution  # [atoms, d_out]
        mask = largest(S.abs().T, sizes["nonzeros"]).T
        return [{"D": D, "S": S * mask, "mask": mask}], (D @ (S * mask)).T
    if config.types == "tensor_train":
        cores = tensor_train_svd(W, ChainShape.of(*W.shape, config.components[0].pattern, **sizes))
        return [{f"core{k}": c for k, c in enumerate(cores, start=1)}], multiply_out(cores)
    factors = spectrum(W).truncate(sizes["rank"])
    B, A = factors.B, factors.A
    if config.shares is not None:
        A = shared[config.shares]
        B = W @ torch.linalg.pinv(A)
    shared[name] = A
    return [{"B": B, "A": A}], B @ A


def largest(scores: Tensor, count: int) -> Tensor:
    where = scores.topk(count, dim=-1).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, where, True)
