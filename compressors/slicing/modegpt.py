"""MoDeGPT: narrower MLPs and attention heads, of one width each or with MLPs as the data ask for.

Modules are decomposed jointly: what makes channels loses rows, what reads them loses columns and is
refitted, so that no matrix is added anywhere.
"""

import math
from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
from transformers import PreTrainedConfig

from lrc.compressors.checkpoint.format import block
from lrc.compressors.layers.shapes import SHAPES, shapes_of
from lrc.compressors.models.architecture import Architecture
from lrc.compressors.slicing.drop import block_influence
from lrc.compressors.slicing.head_statistics import survey
from lrc.compressors.slicing.heads import choose_pairs
from lrc.compressors.slicing.layout import (
    Heads,
    Layout,
    find_layout,
    mlp_shapes,
    narrowed_shapes,
    obeys,
    skeleton,
)
from lrc.compressors.slicing.loss_curves import mlp_curves
from lrc.compressors.slicing.rope import table_parameters
from lrc.compressors.slicing.slice_method import Budget, Sliced, SliceMethod, Work
from lrc.compressors.slicing.slice_writer import Carver, NarrowHeads
from lrc.compressors.slicing.widths import by_curves, by_influence, evenly
from lrc.configs.errors import RecipeError
from lrc.configs.slice import Modegpt as Options
from lrc.configs.slice import SliceBase

TOKENS_A_CHANNEL = 8
ALLOCATION_PASSES = {"influence": 1.0, "lagrangian": 4.0}  # gradients: up, again, and down twice
# Share that heads lose for each that MLPs lose. SmolLM2-135M at 80 % of its bytes: perplexity 43.4
# with MLPs alone, 47.2 with heads of 56 instead of 64, 56.8 with heads of 48 (equal shares); at
# 60 % 124, 130 and 138. So heads come last, but before MLPs are all but gone.
HEAD_SHARE = 0.1


class Modegpt(SliceMethod):
    """Channels inside attention and MLPs."""

    source = "https://arxiv.org/abs/2408.09632"

    def plan(
        self, architecture: Architecture, options: SliceBase, budget: Budget
    ) -> PreTrainedConfig:
        """Return the config with heads near their share, and the widest MLPs that then fit."""
        assert isinstance(options, Options)
        layout = find_layout(architecture)
        if isinstance(layout, str):
            raise _refusal(budget, f"modegpt narrows MLPs, and here it cannot: {layout}")
        sizes: list[int | None] = [None]
        if options.heads and isinstance(layout.heads, Heads):
            sizes.insert(0, layout.heads.head_dim)
        for head_dim in sizes:
            width, narrower = _widths(
                architecture, layout, head_dim, options.width_multiple, budget
            )
            config: PreTrainedConfig = deepcopy(architecture.model.config)
            setattr(config, layout.width_key, width)
            if narrower is not None and narrower != head_dim:
                assert isinstance(layout.heads, Heads)
                config.head_dim = narrower
                # Any pairs will do until data tell which: a later slice has to see a table.
                config.rope_parameters = table_parameters(
                    config.rope_parameters,
                    layout.heads.frequencies,
                    range(narrower // 2),
                    scale=layout.heads.scale,
                    max_positions=config.max_position_embeddings,
                )
            shapes = narrowed_shapes(architecture, layout, width, narrower)
            if not obeys(architecture, config, shapes):
                continue
            if options.uniform or layout.width < options.width_multiple:
                return config
            steps = _steps(architecture, layout, shapes, options.width_multiple, budget)
            setattr(config, layout.width_key, layout.width)
            even = evenly(steps, len(layout.mlps))
            return _with_widths(
                architecture, layout, config, [options.width_multiple * n for n in even]
            )
        raise _refusal(
            budget,
            f"a {type(architecture.model).__name__} does not take the width of its MLPs from "
            f"{layout.width_key} in its config",
        )

    def pending(self, options: SliceBase, config: PreTrainedConfig) -> str | None:
        """Name the widths of MLPs, where the data share them out."""
        assert isinstance(options, Options)
        if not shapes_of(config):
            return None
        return f"the {options.allocation} allocation will choose the width of each layer's MLP"

    def passes(self, options: SliceBase, config: PreTrainedConfig) -> float:
        """Count the survey of heads, and dense model and prefix up to each refit and behind it.

        And what an allocation reads before.
        """
        assert isinstance(options, Options)
        before = ALLOCATION_PASSES[options.allocation] if shapes_of(config) else 0.0
        return before + (7.0 if options.heads else 5.0)

    def advised_tokens(self, architecture: Architecture) -> int:
        """Return a few tokens for every channel whose correlations decide.

        SmolLM2-135M at 80 % of its bytes, 1,536 channels: perplexity 103 from 2,048 tokens, 45 from
        8,192, 39 from 16,384.
        """
        layout = find_layout(architecture)
        return TOKENS_A_CHANNEL * layout.width if isinstance(layout, Layout) else 0

    def carry_out(self, work: Work, options: SliceBase, config: PreTrainedConfig) -> Sliced:
        """Slice the model of `work`; facts about a layer come with its tensors."""
        assert isinstance(options, Options)
        layout = find_layout(work.architecture)
        assert isinstance(layout, Layout), "it was planned"
        tokens, narrow_heads = work.windows(), None
        width, head_dim = getattr(config, layout.width_key), _head_dim(config)
        planned = shapes_of(config)
        # What a slice before this one found out is in the config of its model, not in the planned.
        config = deepcopy(work.architecture.model.config)
        facts: dict[str, Any] = {layout.width_key: [layout.width, width]}
        if planned:
            widths, chosen = _allocated(work, options, layout, planned)
            facts |= {layout.width_key: [layout.width, widths], **chosen}
            config = _with_widths(work.architecture, layout, config, widths)
        else:
            widths = [width] * len(layout.mlps)
            setattr(config, layout.width_key, width)
        if isinstance(layout.heads, str):
            facts["heads"] = f"left alone: {layout.heads}"
        elif head_dim not in (None, layout.heads.head_dim):
            config.head_dim = head_dim
            heads, seen = layout.heads, survey(work, layout.heads, tokens)
            count = int(head_dim or 0) // 2
            pairs, turns, lost = choose_pairs(seen.scores, count, damp=options.damp)
            turns = turns.view(len(heads.attentions), heads.n_heads, count)
            gain = _gain(work.architecture, config, heads)
            narrow_heads = NarrowHeads(heads, pairs, turns, seen.values, gain)
            config.rope_parameters = table_parameters(
                config.rope_parameters,
                heads.frequencies,
                pairs.tolist(),
                scale=heads.scale,
                max_positions=config.max_position_embeddings,
            )
            facts["head_dim"] = [heads.head_dim, 2 * count]
            facts |= {"rotary_pairs": pairs.tolist(), "lost_scores": lost}
        facts["layers"] = []
        carver = Carver(
            work,
            tokens,
            layout.mlps,
            widths,
            narrow_heads,
            damp=options.damp,
            facts=facts["layers"],
        )
        return Sliced(config, carver.tensors(), facts)


def _widths(
    architecture: Architecture,
    layout: Layout,
    head_dim: int | None,
    multiple: int,
    budget: Budget,
) -> tuple[int, int | None]:
    """Solve for the width of MLPs and of heads (None leaves them).

    Raises
    ------
    RecipeError
        If the smallest widths are too wide.
    """

    def size(width: int, narrower: int | None) -> int:
        shapes = narrowed_shapes(architecture, layout, width, narrower)
        return sum(math.prod(shape) * items[name] for name, shape in shapes.items())

    items = {name: p.itemsize for name, p in architecture.stored_parameters().items()}
    dense = size(layout.width, head_dim)
    channel = dense - size(layout.width - 1, head_dim)
    choices: list[int | None] = [None]
    if head_dim is not None:
        dimension = dense - size(layout.width, head_dim - 1)
        removable = layout.width * channel + HEAD_SHARE * head_dim * dimension
        share = 1 - HEAD_SHARE * (dense - budget.bytes) / removable
        step = math.lcm(multiple, 2)
        possible = [*range(step, head_dim, step), head_dim]
        nearest = min(possible, key=lambda n: abs(n - share * head_dim))
        choices = [n for n in reversed(possible) if n <= nearest]
    for narrower in choices:
        spare = budget.bytes - size(layout.width, narrower)
        width = layout.width - max(0, math.ceil(-spare / channel))
        if width < layout.width:
            width -= width % multiple
        if width >= min(multiple, layout.width):
            return width, narrower
    least = size(min(multiple, layout.width), choices[-1])
    heads = "" if head_dim is None else f" and heads of {choices[-1]}"
    raise RecipeError(
        [
            f"{budget.where}: must be at least {least / budget.dense_bytes:.3f} of the bytes with "
            f"MLPs of {min(multiple, layout.width)} channels{heads}, the smallest; got "
            f"{budget.bytes:,} of {budget.dense_bytes:,} bytes; keep more, or slice with drop, "
            "which takes whole layers"
        ]
    )


def _steps(
    architecture: Architecture,
    layout: Layout,
    shapes: Mapping[str, Sequence[int]],
    multiple: int,
    budget: Budget,
) -> int:
    """Return how many steps of `multiple` channels all MLPs may keep, heads as in `shapes`."""
    items = {name: p.itemsize for name, p in architecture.stored_parameters().items()}
    size = sum(math.prod(shape) * items[name] for name, shape in shapes.items())
    mlp = layout.mlps[0]
    width = shapes[f"{mlp.output}.weight"][1]
    of_one = {f"{n}.{leaf}" for n in mlp.inputs for leaf in ("weight", "bias")}
    of_one.add(f"{mlp.output}.weight")
    channel = sum(
        math.prod(shapes[name]) * items[name] // width for name in of_one if name in shapes
    )
    channels = len(layout.mlps) * width + (budget.bytes - size) // channel
    return min(channels // multiple, len(layout.mlps) * (layout.width // multiple))


def _with_widths(
    architecture: Architecture, layout: Layout, config: PreTrainedConfig, widths: Sequence[int]
) -> PreTrainedConfig:
    """Return a config whose table gives the MLPs their widths."""
    wider: PreTrainedConfig = deepcopy(config)
    wider.quantization_config = block({}, {SHAPES: mlp_shapes(architecture, layout, widths)})
    return wider


def _allocated(
    work: Work, options: Options, layout: Layout, planned: Mapping[str, Sequence[int]]
) -> tuple[list[int], dict[str, Any]]:
    """Share out the channels of a plan; return a width a layer, and the reasons."""
    most = layout.width // options.width_multiple
    ends = [planned.get(mlp.output, [0, layout.width])[1] for mlp in layout.mlps]
    steps = sum(ends) // options.width_multiple
    facts: dict[str, Any] = {}
    if options.allocation == "influence":
        facts["influence"] = block_influence(work)
        counts = by_influence(facts["influence"], steps, most)
    else:
        curves = mlp_curves(work, layout.mlps, damp=options.damp)
        ends_of = torch.arange(1, most + 1) * options.width_multiple - 1
        counts = by_curves([curve[ends_of] for curve in curves], steps)
    return [options.width_multiple * count for count in counts], facts


def _head_dim(config: PreTrainedConfig) -> int | None:
    head_dim: int | None = getattr(config, "head_dim", None)
    return head_dim


def _gain(architecture: Architecture, config: PreTrainedConfig, heads: Heads) -> float:
    """Return by what the dense model multiplies scores over what the smaller one will."""
    name = heads.attentions[0].module
    before, after = (
        model.get_submodule(name).scaling
        for model in (architecture.model, skeleton(architecture, config))
    )
    return float(before / after)


def _refusal(budget: Budget, reason: str) -> RecipeError:
    return RecipeError(
        [f"{budget.where}: {reason}; slice with drop or slicegpt, or decompose without slicing"]
    )
