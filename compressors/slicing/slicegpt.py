"""SliceGPT: reduce the width of the residual stream by rotation and truncation.

With one rotation for the whole model the result is a plain model with a smaller `hidden_size`. One
rotation per block loses less, but needs a matrix on every residual branch, which no stock class
has, see `rotated_weights`.

Width of the norms, with one rotation: a fused norm of the dense model computes
``x / sqrt(|x|^2 / D + eps)``. The slice ``z = Q_k^T x`` has k numbers, and the stock class divides
its squares by k. The stream therefore carries ``y = sqrt(k / D) z``: then
``|y|^2 / k == |z|^2 / D``, and ``sqrt(D / k) y / sqrt(|y|^2 / k + eps)`` equals
``z / sqrt(|z|^2 / D + eps)`` with the same `eps`. The linears after the norm are multiplied by
``sqrt(D / k)``, and norm weights become ones, because a rounded norm weight would give all of these
linears the same error.
"""

import math
from copy import deepcopy
from functools import partial
from typing import Any

from transformers import PreTrainedConfig

from lrc.compressors.calibrate.calibration_context import CalibrationContext
from lrc.compressors.layers.model_shapes import SHAPES, tables_of
from lrc.compressors.models.architecture import Architecture
from lrc.compressors.slicing.families import Family, find_family
from lrc.compressors.slicing.rotated_weights import StreamParameters, rotated_tensors
from lrc.compressors.slicing.slice_method import Budget, SlicedModel, SliceMethod, with_tables
from lrc.compressors.slicing.stream_bases import find_basis, find_block_bases
from lrc.configs.errors import ModelError, RecipeError
from lrc.configs.slice import Slicegpt as Options

PLAIN = ("llama", "mistral", "qwen2", "qwen3")
"""Families whose stock classes can load a sliced model: RMSNorm, and `head_dim` in the config."""


class Slicegpt(SliceMethod[Options]):
    """Keep the principal components of the residual stream.

    The paper uses one rotation per block. For a single rotation the second moment is summed over
    the inputs of all norms, with each token divided by its root mean square, because that is what
    the linears after a norm receive. The plain sum is dominated by the last layers and by few
    tokens with states a hundred times as large: the first 24 of the 61 norms of SmolLM2-135M
    contribute less than 0.1 %. With 504 (432) of its 576 dimensions, perplexity on python-docs is
    28.97 (64.32) for the plain sum and 25.46 (44.34) for normalised tokens; dense it is 18.17.

    References
    ----------
    S. Ashkboos et al., "SliceGPT: Compress Large Language Models by Deleting Rows and Columns",
    ICLR 2024. https://arxiv.org/abs/2401.15024
    """

    def plan(
        self, architecture: Architecture, options: Options, budget: Budget
    ) -> PreTrainedConfig:
        """Return the config of the widest smaller model within the budget."""
        config, per_block = architecture.model.config, options.rotations == "block"
        family = _find_family(architecture, budget, plain=not per_block)
        roles = StreamParameters(architecture, family)
        D, step = config.hidden_size, options.width_multiple
        if not per_block and config.model_type == "llama":
            # LlamaConfig refuses widths that are not a multiple of the number of heads.
            step = math.lcm(step, config.num_attention_heads)
        size = partial(roles.bytes, per_block=per_block)
        widths = [k for k in (*range(step, D, step), D) if size(k) <= budget.bytes]
        if not widths:
            least, untied = min(step, D), ""
            if roles.unties_head:
                full = budget.needed(size(D))
                untied = f", with an untied head {full} at the full width of {D}"
            raise budget.refusal(
                f"must be at least {budget.needed(size(least))}, the size of the model at its "
                f"smallest width of {least} (a multiple of {step}), got {budget.allowed}; the "
                f"dense model has {budget.needed(budget.dense_bytes)}{untied}; raise it, or slice "
                "with 'drop'"
            )
        k = widths[-1]
        if size(k) > budget.dense_bytes:
            raise budget.refusal(
                "the model would only grow: slicing unties the head; the dense model has "
                f"{budget.needed(budget.dense_bytes)}, the sliced one {budget.needed(size(k))} at "
                f"{k} of {D}, its widest within {budget.allowed}; lower it to the size of the "
                "dense model or less, or slice with 'modegpt' or 'drop', which keep the head tied"
            )
        return untied_config(config, roles.tables(k)) if per_block else _narrowed(config, k)

    def passes(self, options: Options, config: PreTrainedConfig) -> float:
        """Count two passes with one basis per block: a layer runs again for its second block."""
        return 2.0 if tables_of(config) else 1.0

    def apply(
        self, context: CalibrationContext, options: Options, config: PreTrainedConfig
    ) -> SlicedModel:
        """Find the bases on the calibration text, then slice one tensor after another."""
        architecture, tables = context.architecture, tables_of(config)
        dense, family = architecture.model.config, find_family(architecture.model)
        if tables:
            k, scale = tables[SHAPES][family.embeddings[0]][1], 1.0
            bases, final = find_block_bases(context, family, k), untied_config(dense, tables)
        else:
            k, scale = int(config.hidden_size), math.sqrt(config.hidden_size / dense.hidden_size)
            bases, final = find_basis(context, family, k), _narrowed(dense, k)
        facts = {
            "width": k,
            "dense_width": dense.hidden_size,
            "stream_energy_kept": bases.kept,
            "head_untied": f"{family.head}.weight" in architecture.tied,
        }
        tensors = rotated_tensors(context, family, final, bases, stream_scale=scale)
        return SlicedModel(final, tensors, facts)


def _find_family(architecture: Architecture, budget: Budget, *, plain: bool) -> Family:
    where = f"{budget.where.rpartition('.')[0]}.method"
    try:
        family = find_family(architecture.model)
    except ModelError as error:
        raise RecipeError(f"{where}: {str(error).removeprefix('model: ')}") from error
    kind = architecture.model.config.model_type
    if plain and kind not in PLAIN:
        reason = (
            "its LayerNorm would subtract the mean of the sliced residual stream"
            if family.layer_norm
            else "its classes compute with the width of the residual stream"
        )
        raise RecipeError(
            f"{where}: 'slicegpt' produces plain models of {', '.join(PLAIN)} only, not of "
            f"{kind!r}: {reason}; set rotations: block, or slice with 'modegpt' or 'drop'"
        )
    return family


def untied_config(config: PreTrainedConfig, tables: dict[str, Any]) -> PreTrainedConfig:
    """Return an untied config with the tables of a checkpoint with a basis per block."""
    smaller = with_tables(config, tables)
    smaller.tie_word_embeddings = False
    return smaller


def _narrowed(config: Any, width: int) -> PreTrainedConfig:
    """Return the config of a sliced model, with the head dimension written out."""
    narrow: PreTrainedConfig = deepcopy(config)
    heads = config.num_attention_heads
    narrow.head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    narrow.hidden_size = width
    narrow.tie_word_embeddings = False
    return narrow
