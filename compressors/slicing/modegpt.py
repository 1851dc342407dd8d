"""MoDeGPT: narrower MLPs and attention heads, with the same or different MLP widths per layer.

Linears are narrowed jointly: those that produce channels lose rows, and the linear that reads them
loses columns and is refitted. No matrices are added.
"""

from collections.abc import Sequence
from copy import deepcopy
from typing import Any

from transformers import PreTrainedConfig

from lrc.compressors.calibrate.calibration_context import CalibrationContext
from lrc.compressors.layers.model_shapes import SHAPES, tables_of
from lrc.compressors.models.architecture import Architecture
from lrc.compressors.slicing.head_statistics import collect_head_statistics
from lrc.compressors.slicing.heads import choose_pairs
from lrc.compressors.slicing.layout import Heads, Layout, find_layout, skeleton
from lrc.compressors.slicing.mlp_widths import allocate_widths, even_widths, solve_widths
from lrc.compressors.slicing.rope import table_parameters
from lrc.compressors.slicing.slice_method import Budget, SlicedModel, SliceMethod, with_tables
from lrc.compressors.slicing.slice_writer import NarrowHeads, SliceWriter
from lrc.configs.slice import Modegpt as Options

OTHERWISE = "slice with 'drop' or 'slicegpt', or decompose without slicing"
TOKENS_PER_CHANNEL = 8
# Gradients take one pass forward, another one forward again, and two backward.
ALLOCATION_PASSES = {"influence": 1.0, "lagrangian": 4.0}


class Modegpt(SliceMethod[Options]):
    """Remove channels inside attention and MLPs.

    References
    ----------
    C.-H. Lin et al., "MoDeGPT: Modular Decomposition for Large Language Model Compression", ICLR
    2025. https://arxiv.org/abs/2408.09632
    """

    KEEPS_STREAM = True

    def plan(
        self, architecture: Architecture, options: Options, budget: Budget
    ) -> PreTrainedConfig:
        """Return a config with heads near their target size and the widest MLPs that then fit."""
        layout = find_layout(architecture)
        if isinstance(layout, str):
            raise budget.refusal(
                f"'modegpt' narrows MLPs, which this model prevents: {layout}; {OTHERWISE}"
            )
        multiple = options.width_multiple
        attempts: list[int | None] = [None]
        if options.heads and isinstance(layout.heads, Heads):
            attempts.insert(0, layout.heads.head_dim)
        for head_dim in attempts:
            width, narrower = solve_widths(layout, head_dim, multiple, budget)
            config: PreTrainedConfig = deepcopy(architecture.model.config)
            setattr(config, layout.width_key, width)
            if narrower is not None and narrower != head_dim:
                assert isinstance(layout.heads, Heads)
                # Calibration will choose the pairs; any will do for later stages to plan on.
                _set_head_dim_(config, layout.heads, range(narrower // 2))
            if not layout.fits(config, width, narrower):
                continue
            if options.uniform or layout.width < multiple:
                return config
            widths = even_widths(layout, width, narrower, multiple, budget)
            setattr(config, layout.width_key, layout.width)
            return with_tables(config, {SHAPES: layout.linear_shapes(widths)})
        raise budget.refusal(
            f"{type(architecture.model).__name__} does not take the width of its MLPs from "
            f"{layout.width_key} in its config; {OTHERWISE}"
        )

    def pending(self, options: Options, config: PreTrainedConfig) -> str | None:
        """Describe the widths that calibration will choose, if layers may differ in width."""
        if SHAPES not in tables_of(config):
            return None
        return f"the {options.allocation} allocation will choose the width of each layer's MLP"

    def passes(self, options: Options, config: PreTrainedConfig) -> float:
        """Count the passes of allocation, head statistics, and refits with two models."""
        allocation = ALLOCATION_PASSES[options.allocation] if SHAPES in tables_of(config) else 0.0
        return allocation + (7.0 if options.heads else 5.0)

    def recommended_tokens(self, architecture: Architecture) -> int:
        """Return a few tokens for each channel of an MLP.

        SmolLM2-135M at 80 % of its bytes, with 1,536 channels: perplexity 103 from 2,048 tokens, 45
        from 8,192, 39 from 16,384.
        """
        layout = find_layout(architecture)
        return TOKENS_PER_CHANNEL * layout.width if isinstance(layout, Layout) else 0

    def apply(
        self, context: CalibrationContext, options: Options, config: PreTrainedConfig
    ) -> SlicedModel:
        """Choose widths and rotary pairs, then slice one layer after another."""
        layout = find_layout(context.architecture)
        assert isinstance(layout, Layout), "it was planned"
        width, head_dim = getattr(config, layout.width_key), getattr(config, "head_dim", None)
        planned = tables_of(config).get(SHAPES, {})
        # The model's own config has what an earlier slice chose; the planned one may not.
        config = deepcopy(context.architecture.model.config)
        facts: dict[str, Any] = {layout.width_key: [layout.width, width]}
        if planned:
            widths, chosen = allocate_widths(context, options, layout, planned)
            facts |= {layout.width_key: [layout.width, widths], **chosen}
            config = with_tables(config, {SHAPES: layout.linear_shapes(widths)})
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
        writer = SliceWriter(context, layout.mlps, widths, narrow_heads, options.damp)
        return SlicedModel(config, writer.tensors(), facts | {"layers": writer.facts})


def _choose_heads_(
    context: CalibrationContext, config: PreTrainedConfig, heads: Heads, head_dim: int, damp: float
) -> tuple[NarrowHeads, float]:
    """Choose the rotary pairs of narrower heads, and write size and pairs into the config."""
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
