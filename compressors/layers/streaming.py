"""Long inputs without their wide activations: low-rank layers computed in tiles of tokens."""

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from lrc.compressors.layers.compressed_linear import CompressedLinear
from lrc.compressors.layers.low_rank import LowRank
from lrc.compressors.layers.pivoted_low_rank import PivotedLowRank
from lrc.compressors.layers.tiles import exceeds, in_tiles

TOKENS = 4096
"""Tokens of a tile by default: on an H200, tiles of this size are as fast as one product."""


def stream_low_rank(model: nn.Module, tokens: int | None = TOKENS) -> list[str]:
    """Compute low-rank layers in tiles of tokens, so that long prefills need less memory.

    An MLP then stores no activation of shape [all tokens, d_ff], and no layer stores the outputs of
    its first factor for all tokens. Results differ by the rounding of products. This has no effect
    where gradients are recorded, in code that is compiled for any number of tokens, and in MLPs
    whose layers have forward hooks. In an MLP, a component without a fast path next to the factors,
    such as a mask, builds its dense matrix for every tile.

    Parameters
    ----------
    model : nn.Module
        Changed in place. MLPs are recognized in evaluation mode.
    tokens : int, optional
        Largest number of tokens of a tile; None computes all at once again.

    Returns
    -------
    list of str
        Names of the modules that are computed in tiles: MLPs, and linear layers outside of them.

    Raises
    ------
    ValueError
        If `tokens` is less than 1.

    Notes
    -----
    After [1]_, which streams tiles through factors in a fused kernel. Here every tile is large
    enough that separate products are limited by arithmetic, as in the product of all tokens.

    References
    ----------
    .. [1] Z. Shao et al., "FlashSVD: Memory-Efficient Inference with Streaming for Low-Rank
       Models", 2025. https://arxiv.org/abs/2508.01506
    """
    if tokens is not None and tokens < 1:
        raise ValueError(f"tokens must be at least 1, got {tokens}")
    streamed: list[str] = []
    for module in model.modules():
        if isinstance(vars(module).get("forward"), _Tiled):
            del module.forward
        if isinstance(module, LowRank | PivotedLowRank):
            module.tile = tokens
    if tokens is None:
        return []
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in streamed)
        if isinstance(module, CompressedLinear):
            if not inside and _has_factors(module):
                streamed.append(name)
        elif not inside and _is_mlp(module):
            module.forward = _Tiled(module, tokens)
            streamed.append(name)
    return streamed


class _Tiled:
    """The `forward` of an MLP, applied to tiles of tokens."""

    def __init__(self, module: nn.Module, tokens: int) -> None:
        self.module, self.tokens = module, tokens

    def __call__(self, *args: Tensor, **named: Tensor) -> Any:
        (x,) = (*args, *named.values())  # models pass it by position or by name
        module = self.module
        whole = type(module).forward
        # A hook may expect to see all tokens at once.
        hooked = any(c._forward_hooks or c._forward_pre_hooks for c in module.children())
        if hooked or not exceeds(x, self.tokens):
            return whole(module, x)
        return in_tiles(lambda tile: whole(module, tile), x, self.tokens)


def _has_factors(layer: nn.Module) -> bool:
    return isinstance(layer, CompressedLinear) and any(
        isinstance(component, LowRank | PivotedLowRank) for component in layer.components
    )


def _is_mlp(module: nn.Module) -> bool:
    """Return whether a module has low-rank layers and maps every token independently.

    Its children are linear layers and modules without weights, its `forward` takes one tensor, and
    a token has the same output alone as after another token.
    """
    children = list(module.children())
    linear = [c for c in children if isinstance(c, nn.Linear | CompressedLinear)]
    if len(linear) < 2 or not any(map(_has_factors, linear)) or "forward" in vars(module):
        return False
    others = (c for c in children if not isinstance(c, nn.Linear | CompressedLinear))
    if any([*other.parameters()] for other in others):
        return False
    if len(inspect.signature(module.forward).parameters) != 1:
        return False
    like = next(linear[0].parameters())
    if like.is_meta or module.training:
        return False
    x = torch.arange(3.0 * linear[0].in_features, device=like.device).square().sin()
    x = x.to(like.dtype).view(1, 3, -1)
    with torch.no_grad():
        try:
            among, alone = module(x)[:, 1:2], module(x[:, 1:2])
        except (RuntimeError, IndexError, TypeError):
            return False
    if among.shape != alone.shape:
        return False
    close = 0.05 if like.dtype.itemsize == 2 else 1e-3
    return bool((among - alone).abs().max() <= close * among.abs().max())
