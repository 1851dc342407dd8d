"""MoDeGPT: narrower MLPs and attention heads, with the same or different MLP widths per layer.

Linears are narrowed jointly: those that produce channels lose rows, and the linear that reads them
loses columns and is refitted. No matrices are added.
"""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
from transformers import PreTrainedConfig

from lrc.compressors.checkpoint.format import quantization_config
from lrc.compressors.layers.model_shapes import SHAPES, shapes_of
from lrc.compressors.models.architecture import Architecture
from lrc.compressors.slicing.drop import block_influence
from lrc.compressors.slicing.head_statistics import collect_head_statistics
from lrc.compressors.slicing.heads import choose_pairs
from lrc.compressors.slicing.layout import (
    Heads,
    Layout,
    find_layout,
    follows_config,
    mlp_shapes,
    narrowed_shapes,
    skeleton,
)
from lrc.compressors.slicing.mlp_widths import (
    affordable_steps,
    by_curves,
    by_influence,
    evenly,
    mlp_loss_curves,
    solve_widths,
)
from lrc.compressors.slicing.rope import table_parameters
from lrc.compressors.slicing.slice_context import SliceContext
from lrc.compressors.slicing.slice_method import Budget, SlicedModel, SliceMethod
from lrc.compressors.slicing.slice_writer import NarrowHeads, SliceWriter
from lrc.configs.errors import RecipeError
from lrc.configs.slice import Modegpt as Options
from lrc.configs.slice import SliceBase

TOKENS_PER_CHANNEL = 8
# Gradients take one pass forward, another one forward again, and two backward.
ALLOCATION_PASSES = {"influence": 1.0, "lagrangian": 4.0}


class Modegpt(SliceMethod):
    """Remove channels inside attention and MLPs."""

    source = "https://arxiv.org/abs/2408.09632"

    def plan(
        self, architecture: Architecture, options: SliceBase, budget: Budget
    ) -> PreTrainedConfig:
        """Return a config with heads near their target size and the widest MLPs that then fit."""
        assert isinstance(options, Options)
        layout = find_layout(architecture)
        if isinstance(layout, str):
            raise _refusal(budget, f"'modegpt' narrows MLPs, which this model prevents: {layout}")
        multiple = options.width_multiple
        attempts: list[int | None] = [None]
        if options.heads and isinstance(layout.heads, Heads):
            attempts.insert(0, layout.heads.head_dim)
        for head_dim in attempts:
            width, narrower = solve_widths(architecture, layout, head_dim, multiple, budget)
            config: PreTrainedConfig = deepcopy(architecture.model.config)
            setattr(config, layout.width_key, width)
            if narrower is not None and narrower != head_dim:
                assert isinstance(layout.heads, Heads)
                # Calibration will choose the pairs; any will do for later stages to plan on.
                _set_head_dim_(config, layout.heads, range(narrower // 2))
            shapes = narrowed_shapes(architecture, layout, width, narrower)
            if not follows_config(architecture, config, shapes):
                continue
            if options.uniform or layout.width < multiple:
                return config
            steps = affordable_steps(architecture, layout, width, narrower, multiple, budget)
            setattr(config, layout.width_key, layout.width)
            widths = [multiple * count for count in evenly(steps, len(layout.mlps))]
            return _with_widths(architecture, layout, config, widths)
        raise _refusal(
            budget,
            f"{type(architecture.model).__name__} does not take the width of its MLPs from "
            f"{layout.width_key} in its config",
        )

    def pending(self, options: SliceBase, config: PreTrainedConfig) -> str | None:
        """Describe the widths that calibration will choose, if layers may differ in width."""
        assert isinstance(options, Options)
        if not shapes_of(config):
            return None
        return f"the {options.allocation} allocation will choose the width of each layer's MLP"

    def passes(self, options: SliceBase, config: PreTrainedConfig) -> float:
        """Count the passes of allocation, head statistics, and refits with two models."""
        assert isinstance(options, Options)
        allocation = ALLOCATION_PASSES[options.allocation] if shapes_of(config) else 0.0
        return allocation + (7.0 if options.heads else 5.0)

    def recommended_tokens(self, architecture: Architecture) -> int:
        """Return a few tokens for each channel of an MLP.

        SmolLM2-135M at 80 % of its bytes, with 1,536 channels: perplexity 103 from 2,048 tokens, 45
        from 8,192, 39 from 16,384.
        """
        layout = find_layout(architecture)
        return TOKENS_PER_CHANNEL * layout.width if isinstance(layout, Layout) else 0

    def apply(
        self, context: SliceContext, options: SliceBase, config: PreTrainedConfig
    ) -> SlicedModel:
        """Choose widths and rotary pairs, then slice one layer after another."""
        assert isinstance(options, Options)
        layout = find_layout(context.architecture)
        assert isinstance(layout, Layout), "it was planned"
        width, head_dim = getattr(config, layout.width_key), getattr(config, "head_dim", None)
        planned = shapes_of(config)
        # The model's own config has what an earlier slice chose; the planned one may not.
        config = deepcopy(context.architecture.model.config)
        facts: dict[str, Any] = {layout.width_key: [layout.width, width]}
        if planned:
            widths, chosen = _allocate(context, options, layout, planned)
            facts |= {layout.width_key: [layout.width, widths], **chosen}
            config = _with_widths(context.architecture, layout, config, widths)
        else:
            widths = [width] * len(layout.mlps)
            setattr(config, layout.width_key, width)
        narrow_heads = None
        if isinstance(layout.heads, str):
            facts["heads"] = f"left alone: {layout.heads}"
        elif head_dim not in (None, layout.heads.head_dim):
            narrow_heads, lost = _choose_heads_(
                context, config, layout.heads, int(head_dim), options.damp
            )
            facts["head_dim"] = [layout.heads.head_dim, head_dim]
            facts |= {"rotary_pairs": narrow_heads.pairs.tolist(), "lost_scores": lost}
        writer = SliceWriter(context, layout.mlps, widths, narrow_heads, damp=options.damp)
        return SlicedModel(config, writer.tensors(), facts | {"layers": writer.facts})


def _choose_heads_(
    context: SliceContext, config: PreTrainedConfig, heads: Heads, head_dim: int, damp: float
) -> tuple[NarrowHeads, float]:
    """Choose the rotary pairs of heads of a new size, and write both into the config.

    Returns also the fraction of the variance of the scores that is lost.
    """
    known, count = collect_head_statistics(context, heads), head_dim // 2
    pairs, turns, lost = choose_pairs(known.scores, count, damp=damp)
    turns = turns.view(len(heads.attentions), heads.n_heads, count)
    _set_head_dim_(config, heads, pairs.tolist())
    before, after = (
        model.get_submodule(heads.attentions[0].module).scaling
        for model in (context.architecture.model, skeleton(context.architecture, config))
    )
    return NarrowHeads(heads, pairs, turns, known.values, float(before / after)), lost


def _set_head_dim_(config: Any, heads: Heads, pairs: Sequence[int]) -> None:
    """Set the size of heads and the rotary table of the pairs that they keep."""
    config.head_dim = 2 * len(pairs)
    config.rope_parameters = table_parameters(
        config.rope_parameters,
        heads.frequencies,
        pairs,
        scale=heads.scale,
        max_positions=config.max_position_embeddings,
    )


def _with_widths(
    architecture: Architecture, layout: Layout, config: PreTrainedConfig, widths: Sequence[int]
) -> PreTrainedConfig:
    """Return a config with a table of the widths of MLPs."""
    changed: PreTrainedConfig = deepcopy(config)
    changed.quantization_config = quantization_config(
        {}, {SHAPES: mlp_shapes(architecture, layout, widths)}
    )
    return changed


def _allocate(
    context: SliceContext,
    options: Options,
    layout: Layout,
    planned: Mapping[str, Sequence[int]],
) -> tuple[list[int], dict[str, Any]]:
    """Distribute the planned channels over the layers; return their widths and facts."""
    most = layout.width // options.width_multiple
    widths = [planned.get(mlp.output, [0, layout.width])[1] for mlp in layout.mlps]
    steps = sum(widths) // options.width_multiple
    facts: dict[str, Any] = {}
    if options.allocation == "influence":
        facts["influence"] = block_influence(context)
        counts = by_influence(facts["influence"], steps, most)
    else:
        curves = mlp_loss_curves(context, layout.mlps, damp=options.damp)
        at = torch.arange(1, most + 1) * options.width_multiple - 1
        counts = by_curves([curve[at] for curve in curves], steps)
    return [options.width_multiple * count for count in counts], facts


def _refusal(budget: Budget, reason: str) -> RecipeError:
    return RecipeError(
        [f"{budget.where}: {reason}; slice with 'drop' or 'slicegpt', or decompose without slicing"]
    )
