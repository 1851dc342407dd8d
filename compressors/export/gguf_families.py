"""The model families that GGUF export supports, as data: what llama.cpp computes for each.

`general.architecture` selects a computation in llama.cpp. A family states which one equals that of
transformers, and under which conditions.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

from gguf import MODEL_ARCH

from lrc.configs.errors import ExportError

ALTERNATIVE = (
    "run `lrc export --format dense`, and convert that folder with llama.cpp's "
    "convert_hf_to_gguf.py"
)
ATTENTION = ("q_proj", "k_proj", "v_proj")
GEMMA_PERIOD = 6
"""Of all published models of Gemma-3."""
LINEARS = (*ATTENTION, "o_proj", "gate_proj", "up_proj", "down_proj")

Check = Callable[[Any], str | None]
"""Returns what is wrong with a config, as a clause; None if nothing is."""


@dataclass(frozen=True)
class Family:
    """How a family of transformers is expressed in GGUF."""

    arch: MODEL_ARCH
    activation: str
    """The only `hidden_act` that llama.cpp computes for `arch`."""
    biases: tuple[str, ...] = ()
    """Linear layers that may have a bias."""
    permuted: bool = False
    """Whether rotary pairs are neighbouring rows of q and k, not rows of two halves."""
    frequency_table: bool = False
    """Whether a tensor can scale the rotary frequencies."""
    layer_widths: MODEL_ARCH | None = None
    """Architecture with the same computation and one MLP width per layer."""
    norm_offset: float = 0.0
    """Added to the weights of norms."""
    window: bool = False
    """Whether some layers attend to a window of recent tokens."""
    experts: bool = False
    """Whether all MLPs are mixtures of experts."""
    expert_width: str | None = None
    """Key of config.json for the width of the experts; None if it is `intermediate_size`."""
    required: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    """Keys of config.json and their only supported values, if they are set."""
    check: Check = lambda config: None
    """A further condition."""

    def arch_of(self, widths: Sequence[int]) -> MODEL_ARCH:
        """Return the architecture for MLPs of these widths, one per layer."""
        uneven = len({*widths}) > 1
        return self.layer_widths if uneven and self.layer_widths is not None else self.arch


def sliding_period(config: Any) -> int | None:
    """Return n if every n-th layer has full attention and all others a window, else None."""
    kinds: list[str] = list(config.layer_types)
    n_layers = len(kinds)
    periods: tuple[int, ...] = (GEMMA_PERIOD, *range(1, n_layers + 2))
    for period in periods:
        full = [layer % period == period - 1 for layer in range(n_layers)]
        if kinds == ["full_attention" if each else "sliding_attention" for each in full]:
            return period
    return None


def _check_gemma3(config: Any) -> str | None:
    if sliding_period(config) is None:
        return "its layers with full attention must be every n-th one (layer_types)"
    # llama.cpp knows the model of 62 layers by that number.
    large = config.num_hidden_layers == 62
    expected = config.hidden_size // config.num_attention_heads if large else config.head_dim
    if config.query_pre_attn_scalar != expected:
        return f"query_pre_attn_scalar must be {expected}, got {config.query_pre_attn_scalar}"
    return None


def _check_qwen(config: Any) -> str | None:
    windows = [kind for kind in config.layer_types if kind != "full_attention"]
    return "some of its layers attend to a window (layer_types)" if windows else None


def _check_qwen2(config: Any) -> str | None:
    heads, width = config.num_attention_heads, config.hidden_size
    head_dim = getattr(config, "head_dim", None) or width // heads
    if heads * head_dim != width:  # as after `slicegpt`; other families may have any width
        return (
            f"num_attention_heads times head_dim must be hidden_size, {width}, got "
            f"{heads} times {head_dim}"
        )
    return _check_qwen(config)


def _check_qwen_experts(config: Any) -> str | None:
    if config.decoder_sparse_step != 1 or config.mlp_only_layers:
        return "some of its layers have no experts (decoder_sparse_step, mlp_only_layers)"
    return "some of its layers attend to a window" if config.use_sliding_window else None


LLAMA = Family(
    MODEL_ARCH.LLAMA,
    "silu",
    biases=LINEARS,
    permuted=True,
    frequency_table=True,
    layer_widths=MODEL_ARCH.DECI,
)
FAMILIES: dict[str, Family] = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "mixtral": replace(LLAMA, biases=(), layer_widths=None, experts=True),
    "qwen2": Family(MODEL_ARCH.QWEN2, "silu", biases=ATTENTION, check=_check_qwen2),
    "qwen3": Family(MODEL_ARCH.QWEN3, "silu", check=_check_qwen),
    "qwen3_moe": Family(
        MODEL_ARCH.QWEN3MOE,
        "silu",
        experts=True,
        expert_width="moe_intermediate_size",
        required={"norm_topk_prob": True},
        check=_check_qwen_experts,
    ),
    "gemma3_text": Family(
        MODEL_ARCH.GEMMA3,
        "gelu_pytorch_tanh",
        norm_offset=1.0,
        window=True,
        required={
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
            "use_bidirectional_attention": False,
        },
        check=_check_gemma3,
    ),
}
"""`model_type` of transformers -> family."""


def family_of(config: Any) -> Family:
    """Return the family of a model.

    Raises
    ------
    ExportError
        If llama.cpp computes something else for it, or lrc has no mapping.
    """
    kind = config.model_type
    family = FAMILIES.get(kind)
    if family is None:
        raise ExportError(
            f"model_type {kind!r} has no mapping to GGUF: supported are {', '.join(FAMILIES)}; "
            f"{ALTERNATIVE}"
        )
    activation = getattr(config, "hidden_activation", None) or config.hidden_act
    problem = family.check(config)
    for key, value in family.required.items():
        found = getattr(config, key, None)
        if found not in (None, value):
            problem = f"{key} must be {value}, got {found}"
    if activation != family.activation:
        problem = f"its activation must be {family.activation}, got {activation}"
    if problem is not None:
        raise ExportError(
            f"llama.cpp would refuse a model of {kind}, or compute another: {problem}"
        )
    return family
