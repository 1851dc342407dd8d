"""Residual-stream layouts of model families: which modules read the stream and which write to it.

A decoder layer consists of one or two *blocks*: norms that read the stream, linears that read the
norms, and linears whose outputs are added to the stream. A rotation needs nothing else, so a family
is one declaration of module names.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from lrc.configs.errors import ModelError


@dataclass(frozen=True)
class Norm:
    """A norm of the residual stream and the linears that read its output."""

    name: str
    readers: tuple[str, ...]


@dataclass(frozen=True)
class Block:
    """One addition to the residual stream: ``x + sum of writers``, computed from norms of ``x``."""

    norms: tuple[Norm, ...]
    writers: tuple[str, ...]

    def within(self, prefix: str) -> "Block":
        """Return the block with full names, given the name of its decoder layer."""
        norms = tuple(
            Norm(f"{prefix}.{norm.name}", tuple(f"{prefix}.{reader}" for reader in norm.readers))
            for norm in self.norms
        )
        return Block(norms, tuple(f"{prefix}.{writer}" for writer in self.writers))


@dataclass(frozen=True)
class Family:
    """The modules that create, read, write and end the residual stream of an architecture.

    Names in `blocks` are relative to a decoder layer; all others are full names.
    """

    layers: str
    embeddings: tuple[str, ...]
    """Their sum is the first state of the stream."""
    blocks: tuple[Block, ...]
    final_norm: str
    head: str = "lm_head"
    layer_norm: bool = False
    """Whether the norms subtract the mean first (LayerNorm) or not (RMSNorm)."""
    weight_offset: float = 0.0
    """Constant that every norm adds to its weight."""

    def stream(self, model: Any) -> list[Block]:
        """Return the blocks of all layers with full names, in order."""
        prefixes = [f"{self.layers}.{i}" for i in range(len(model.get_submodule(self.layers)))]
        return [block.within(prefix) for prefix in prefixes for block in self.blocks]

    def norms(self, model: Any) -> list[Norm]:
        """Return all norms of the stream with full names; the last one is read by the head."""
        inner = [norm for block in self.stream(model) for norm in block.norms]
        return [*inner, Norm(self.final_norm, (self.head,))]


QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")

LLAMA = Family(
    layers="model.layers",
    embeddings=("model.embed_tokens",),
    blocks=(
        Block((Norm("input_layernorm", QKV),), ("self_attn.o_proj",)),
        Block(
            (Norm("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),),
            ("mlp.down_proj",),
        ),
    ),
    final_norm="model.norm",
)

OPT = Family(
    layers="model.decoder.layers",
    embeddings=("model.decoder.embed_tokens", "model.decoder.embed_positions"),
    blocks=(
        Block((Norm("self_attn_layer_norm", QKV),), ("self_attn.out_proj",)),
        Block((Norm("final_layer_norm", ("fc1",)),), ("fc2",)),
    ),
    final_norm="model.decoder.final_layer_norm",
    layer_norm=True,
)

PHI = Family(
    layers="model.layers",
    embeddings=("model.embed_tokens",),
    blocks=(Block((Norm("input_layernorm", (*QKV, "mlp.fc1")),), ("self_attn.dense", "mlp.fc2")),),
    final_norm="model.final_layernorm",
    layer_norm=True,
)

_NEOX_ATTENTION = Block(
    (Norm("input_layernorm", ("attention.query_key_value",)),), ("attention.dense",)
)
_NEOX_MLP = Block(
    (Norm("post_attention_layernorm", ("mlp.dense_h_to_4h",)),), ("mlp.dense_4h_to_h",)
)
NEOX_SEQUENTIAL = Family(
    layers="gpt_neox.layers",
    embeddings=("gpt_neox.embed_in",),
    blocks=(_NEOX_ATTENTION, _NEOX_MLP),
    final_norm="gpt_neox.final_layer_norm",
    layer_norm=True,
)
NEOX_PARALLEL = replace(
    NEOX_SEQUENTIAL,
    blocks=(
        Block(_NEOX_ATTENTION.norms + _NEOX_MLP.norms, _NEOX_ATTENTION.writers + _NEOX_MLP.writers),
    ),
)


def _opt(config: Any) -> Family:
    if config.word_embed_proj_dim != config.hidden_size:
        sizes = f"{config.word_embed_proj_dim} to {config.hidden_size}"
        raise _unsupported(config, f"its embeddings are projected from width {sizes}")
    if not config.do_layer_norm_before or config._remove_final_layer_norm:
        raise _unsupported(
            config,
            "its norms are applied to the residual stream itself, and their scales do not "
            "commute with a rotation",
        )
    return OPT


def _gpt_neox(config: Any) -> Family:
    return NEOX_PARALLEL if config.use_parallel_residual else NEOX_SEQUENTIAL


FAMILIES: dict[str, Callable[[Any], Family]] = {
    "llama": lambda _: LLAMA,
    "mistral": lambda _: LLAMA,
    "qwen2": lambda _: LLAMA,
    "qwen3": lambda _: LLAMA,
    "gemma": lambda _: replace(LLAMA, weight_offset=1.0),
    "opt": _opt,
    "gpt_neox": _gpt_neox,
    "phi": lambda _: PHI,
}
"""By `model_type`. Norms inside attention (Qwen-3, Phi) act on heads, not on the stream."""

POST_NORM = {"gemma2", "gemma3", "gemma3_text", "olmo2", "olmo3"}
"""Families with a norm between the output matrix of a block and the residual stream."""


def find_family(model: Any) -> Family:
    """Return the family of a model; raise a ModelError if its stream cannot be rotated."""
    config = model.config
    kind = config.model_type
    if kind in POST_NORM:
        raise _unsupported(
            config,
            "it has a norm between a block's output matrix and the residual stream, and the scales "
            "of a norm there do not commute with a rotation",
        )
    if kind not in FAMILIES:
        raise _unsupported(config, f"supported are {', '.join(sorted(FAMILIES))}")
    family = FAMILIES[kind](config)
    problems = _mismatches(family, model, config.hidden_size)
    if problems:
        raise _unsupported(config, f"its modules are not as expected: {'; '.join(problems)}")
    return family


def _mismatches(family: Family, model: Any, width: int) -> list[str]:
    """Describe the modules that are not what the family declares."""
    modules = dict(model.named_modules())
    norms, blocks = family.norms(model), family.stream(model)
    widths = {
        **{name: (nn.Embedding, "embedding_dim") for name in family.embeddings},
        **{name: (nn.Linear, "in_features") for norm in norms for name in norm.readers},
        **{name: (nn.Linear, "out_features") for block in blocks for name in block.writers},
    }
    problems = [
        f"{name} is not {kind.__name__} with {attribute}={width}"
        for name, (kind, attribute) in widths.items()
        if not isinstance(modules.get(name), kind) or getattr(modules[name], attribute) != width
    ]
    expected = "LayerNorm" if family.layer_norm else "RMSNorm"
    for norm in norms:
        module = modules.get(norm.name)
        weight = getattr(module, "weight", None)
        shape = getattr(module, "normalized_shape", getattr(weight, "shape", ()))
        if isinstance(module, nn.LayerNorm) != family.layer_norm or tuple(shape) != (width,):
            problems.append(f"{norm.name} is not {expected} of width {width}")
    return problems


def _unsupported(config: Any, reason: str) -> ModelError:
    return ModelError(
        f"model: the residual stream of model_type {config.model_type!r} cannot be rotated: "
        f"{reason}; slice with 'modegpt' or 'drop', which do not change the stream"
    )
