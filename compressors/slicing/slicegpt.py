"""SliceGPT: with one rotation for the whole model what is left is a plain smaller model.

A rotation of its own for every block, see `blocks`, fits each better, but leaves a matrix on every
residual branch, which no stock class has. One rotation needs none: a smaller `hidden_size` is all
that changes.

The width of the norms. Fused, a norm of the dense model computes ``x / sqrt(|x|^2 / D + eps)``.
The slice ``z = Q_k^T x`` has k numbers, and the stock class would divide its squares by k. The
stream therefore carries ``y = sqrt(k / D) z``: then ``|y|^2 / k == |z|^2 / D``, and
``sqrt(D / k) y / sqrt(|y|^2 / k + eps) == z / sqrt(|z|^2 / D + eps)`` with the same `eps`. The
factor ``sqrt(D / k)`` goes into the linears behind the norm, rather than into its weight, whose
rounding to 16 bits all of them would share; norm weights become ones.
"""

import copy
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from lrc.compressors.layers.shapes import tables_of
from lrc.compressors.models.architecture import Architecture
from lrc.compressors.slicing.blocks import bytes_of, carve_blocks, rotated_config, tables
from lrc.compressors.slicing.channel_moments import stream_moment
from lrc.compressors.slicing.families import Family, find_family
from lrc.compressors.slicing.roles import Roles, times
from lrc.compressors.slicing.rotation import principal_axes
from lrc.compressors.slicing.slice_method import Budget, Sliced, SliceMethod, Work
from lrc.configs.errors import ModelError, RecipeError
from lrc.configs.slice import SliceBase
from lrc.configs.slice import Slicegpt as Options

PLAIN = ("llama", "mistral", "qwen2", "qwen3")
"""Families whose stock classes hold a sliced model: RMSNorm, and a `head_dim` of their own."""


class Slicegpt(SliceMethod):
    """Keeps the principal components of the residual stream.

    After [1]_, which rotates every block differently; see the module. For one rotation the second
    moment is summed over the inputs of all norms, each token divided by its root mean square: that
    is what the linears behind a norm see of it. The plain sum is that of the last layers and of a
    few tokens, whose states are a hundred times as large: the first 24 of the 61 norms of
    SmolLM2-135M add less than 0.1 % to it. Of its 576 dimensions 504 (432) then leave perplexity
    28.97 (64.32) on python-docs, and tokens that count alike 25.46 (44.34); dense it has 18.17.

    References
    ----------
    .. [1] S. Ashkboos et al., "SliceGPT: Compress Large Language Models by Deleting Rows and
       Columns", ICLR 2024. https://arxiv.org/abs/2401.15024
    """

    source = "SliceGPT, ICLR 2024, https://arxiv.org/abs/2401.15024"
    reads_text = True

    def plan(
        self, architecture: Architecture, options: SliceBase, budget: Budget
    ) -> PreTrainedConfig:
        """Return the config of the widest smaller model within the budget.

        Raises
        ------
        RecipeError
        """
        assert isinstance(options, Options)
        config = architecture.model.config
        family = _find_family(architecture, budget, plain=options.rotations == "global")
        roles = Roles(architecture, family)
        D, step = config.hidden_size, options.width_multiple

        def size(k: int) -> int:
            if options.rotations == "global":
                return roles.bytes(k)
            return bytes_of(architecture, family, tables(architecture, family, k))

        if options.rotations == "global" and config.model_type == "llama":
            # LlamaConfig refuses widths that are no multiple of heads.
            step = math.lcm(step, config.num_attention_heads)
        widths = [k for k in (*range(step, D, step), D) if size(k) <= budget.bytes]
        words = f"the dense model has {budget.dense_bytes} bytes"
        if roles.untied:
            words += (
                f", this one needs a head of its own, and so has {size(D)} at the full width of {D}"
            )
        if not widths:
            least = min(step, D)
            raise RecipeError(
                [
                    f"{budget.where}: at most {budget.bytes} bytes are allowed, but sliced to its "
                    f"smallest width of {least} (a multiple of {step}) the model has "
                    f"{size(least)}; {words}; allow more bytes, or slice with 'drop'"
                ]
            )
        k = widths[-1]
        if size(k) > budget.dense_bytes:
            raise RecipeError(
                [
                    f"{budget.where}: the model would only grow: the dense model has "
                    f"{budget.dense_bytes} bytes; sliced it needs a head of its own, and has "
                    f"{size(k)} at {k} of {D}, its widest within {budget.bytes}; allow at "
                    f"most {budget.dense_bytes} bytes, or slice with 'modegpt' or 'drop', which "
                    "leave the head tied"
                ]
            )
        if options.rotations == "block":
            return rotated_config(architecture, config, tables(architecture, family, k))
        return _narrowed(config, k)

    def passes(self, options: SliceBase, config: PreTrainedConfig) -> float:
        """Count a second pass where a layer has a basis for its second block to be found."""
        return 2.0 if tables_of(config) else 1.0

    def carry_out(self, work: Work, options: SliceBase, config: PreTrainedConfig) -> Sliced:
        """Find the axes on the calibration text, then slice one tensor after the other.

        Raises
        ------
        ModelError
            If the residual stream is not finite.
        """
        assert isinstance(options, Options)
        if tables_of(config):
            return carve_blocks(work, config)
        family = find_family(work.architecture.model)
        moment = stream_moment(work, family)
        Q, _ = principal_axes(moment)
        D, k = len(Q), config.hidden_size
        kept = (Q[:, :k] * (moment @ Q[:, :k])).sum() / moment.diagonal().sum()
        untied = f"{family.head}.weight" in work.architecture.tied
        facts = {
            "width": k,
            "dense_width": D,
            "stream_energy_kept": float(kept),
            "head_untied": untied,
        }
        final = _narrowed(work.architecture.model.config, k)
        return Sliced(final, _slice(work, family, Q[:, :k]), facts)


def _find_family(architecture: Architecture, budget: Budget, *, plain: bool) -> Family:
    where = f"{budget.where.rpartition('.')[0]}.method"
    try:
        family = find_family(architecture.model)
    except ModelError as error:
        raise RecipeError([f"{where}: {str(error).removeprefix('model: ')}"]) from error
    kind = architecture.model.config.model_type
    if plain and kind not in PLAIN:
        reason = (
            "its LayerNorm would subtract the mean of what is left of the residual stream"
            if family.layer_norm
            else "its classes compute with the width of the residual stream"
        )
        raise RecipeError(
            [
                f"{where}: 'slicegpt' gives plain models of {', '.join(PLAIN)} only, not of "
                f"{kind!r}: {reason}; set rotations: block, or slice with 'modegpt' or 'drop'"
            ]
        )
    return family


def _narrowed(config: Any, width: int) -> PreTrainedConfig:
    """Return the config of a sliced model; what was derived from the width is written out."""
    narrow = copy.deepcopy(config)
    heads = config.num_attention_heads
    narrow.head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    narrow.hidden_size = width
    narrow.tie_word_embeddings = False
    assert isinstance(narrow, PreTrainedConfig)
    return narrow


@torch.no_grad()
def _slice(work: Work, family: Family, Q: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Read one tensor of the dense model after the other; yield it on the axes `Q` [D, k]."""
    roles = Roles(work.architecture, family)
    D, k = Q.shape
    Q = Q.to(work.device)
    gauge = math.sqrt(k / D)
    for name, parameter in roles.dense.items():
        if name in roles.norms:
            yield name, torch.ones(k, dtype=parameter.dtype)
            continue
        W = work.reader.read(roles.source[name], device=work.device)
        if name in roles.behind:
            norm = work.reader.read(f"{roles.behind[name].name}.weight", device=work.device)
            scale = norm.double() + family.weight_offset  # [D]
            W = times(W, scale[:, None] * Q / gauge)  # [d_out, k]
        elif name in roles.embeddings:
            W = times(W, Q * gauge)  # [vocabulary, k]
        elif name in roles.writers:  # a bias as the one column it is
            columns = W[:, None] if W.ndim == 1 else W  # [D, d_in]
            W = times(columns.T, Q * gauge).T.reshape(k, *W.shape[1:])  # [k, d_in]
        yield name, W.cpu().contiguous()
