"""LoRA adapters of PEFT on compressed layers.

PEFT chooses the class of an adapter by the type of the layer. `register` makes every `LoraModel`
know the classes of this module before it looks for its targets, so that ``target_modules`` may name
compressed layers or be ``"all-linear"``, wherever PEFT is given the config: `get_peft_model`,
`PeftModel.from_pretrained`, `add_adapter` of transformers, or a trainer.
"""

from functools import wraps
from typing import Any, cast

import torch
from accelerate.utils import has_offloaded_params
from peft.tuners.lora import LoraModel
from peft.tuners.lora import layer as peft_layers
from peft.tuners.tuners_utils import check_adapters_to_merge
from peft.utils import INCLUDE_LINEAR_LAYERS_SHORTHAND
from torch import nn

from lrc.compressors.io.finite import all_finite
from lrc.compressors.layers import CompressedEmbedding, CompressedLinear, TiedHead
from lrc.configs.errors import LrcError

INITIALIZATIONS = (True, False, "gaussian", "eva", "orthogonal")
"""Values of `LoraConfig.init_lora_weights` that do not read or change the weight of the layer."""


class AdapterError(LrcError):
    """An adapter is requested that a compressed layer cannot have."""

    default_code = "unsupported-adapter"


class CompressedLora(peft_layers.Linear):  # type: ignore[misc, unused-ignore]
    """A LoRA adapter whose base layer is a `CompressedLinear`.

    The output is that of the base layer, whatever its components, plus the product of the adapter.
    Merging adds the product as a `low_rank` component, which is exact up to rounding and leaves all
    other components, such as integers, as they are.
    """

    def __init__(self, base_layer: nn.Module, adapter_name: str, **options: Any) -> None:
        super().__init__(base_layer, adapter_name, **options)
        self.fan_in_fan_out = False
        self._unmerged: list[CompressedLinear] = []  # base layers before each merged adapter

    def _get_in_out_features(self, module: Any) -> tuple[int, int]:
        return module.in_features, module.out_features

    def update_layer(self, adapter_name: str, *args: Any, **options: Any) -> None:
        """Add an adapter.

        Raises
        ------
        AdapterError
            If its initial values or its variant depend on the weight of the layer.
        """
        config = options["config"]
        if config.init_lora_weights not in INITIALIZATIONS:
            raise AdapterError(
                f"init_lora_weights: must be one of {_listed(INITIALIZATIONS)} for compressed "
                f"layers, got {config.init_lora_weights!r}, which needs the dense weight; change "
                "it, or call model.dequantize() first"
            )
        super().update_layer(adapter_name, *args, **options)

    def resolve_lora_variant(self, *, config: Any, **options: Any) -> None:
        """Accept LoRA without variants only.

        Raises
        ------
        AdapterError
            For variants such as DoRA.
        """
        try:
            found = super().resolve_lora_variant(config=config, **options)
        except ValueError:
            found = config
        if found is not None:
            raise AdapterError(
                "LoraConfig: a compressed layer can have plain LoRA adapters only, without "
                "variants such as use_dora; leave the variant out, or call model.dequantize() first"
            )

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the products of adapters to the base layer, as its `low_rank` component.

        Raises
        ------
        AdapterError
            If the layer has a `low_rank` component that cannot grow, or offloaded weights.
        ValueError
            With `safe_merge`, if an adapter is not finite.
        """
        for name in check_adapters_to_merge(self, adapter_names):
            if name not in self.lora_A:
                continue
            base: Any = self.get_base_layer()
            first, second = cast(nn.Linear, self.lora_A[name]), cast(nn.Linear, self.lora_B[name])
            B, A, bias = second.weight * self.scaling[name], first.weight, second.bias
            if safe_merge and not all_finite(B @ A):
                raise ValueError(f"the adapter {name} is not finite; it was damaged in training")
            try:
                if any(map(has_offloaded_params, base.modules())):
                    raise ValueError("the weights of the layer are offloaded")
                merged = base.plus_low_rank(
                    B, A, bias=None if bias is None else bias * self.scaling[name]
                )
            except ValueError as error:
                raise AdapterError(
                    f"cannot merge the adapter {name}: {error}; save it as an adapter "
                    "(save_pretrained of PEFT), or call model.dequantize() before adding it",
                    code="unmergeable-adapter",
                ) from error
            self._unmerged.append(base)
            self.base_layer = merged
            self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Return to the base layer without merged adapters."""
        while self.merged_adapters:
            self.merged_adapters.pop()
            self.base_layer = self._unmerged.pop()


class _Unsupported:
    """Takes the place of the adapter class for modules that cannot have an adapter."""

    def __init__(self, target: nn.Module, adapter_name: str, **_: Any) -> None:
        raise AdapterError(
            f"target_modules: must not name the quantized embedding or the output head that is "
            f"tied to it, got {target}; leave it out, or call model.dequantize() first"
        )


CLASSES: dict[type[nn.Module], type] = {
    CompressedEmbedding: _Unsupported,  # before its base class
    TiedHead: _Unsupported,
    CompressedLinear: CompressedLora,
}
"""Type of a layer -> class of its adapter; the first one that fits is used."""


def prepare_(config: Any, model: nn.Module) -> None:
    """Change a `LoraConfig` so that its targets may be compressed layers of `model`.

    ``"all-linear"`` becomes the names of all linear layers, compressed or not, without the output
    head. The factors of a low-rank layer are not among them: the whole layer gets one adapter.
    """
    if not any(isinstance(module, CompressedLinear) for module in model.modules()):
        return
    config._register_custom_module(CLASSES)
    targets = config.target_modules
    if isinstance(targets, str) and targets.lower() == INCLUDE_LINEAR_LAYERS_SHORTHAND:
        config.target_modules = set(linear_names(model))


def linear_names(model: Any) -> list[str]:
    """Return the names of all linear layers but the output head and parts of other layers."""
    find = getattr(model, "get_output_embeddings", None)
    head = None if find is None else find()
    names: list[str] = []
    whole: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if module is head or isinstance(module, CompressedEmbedding):
            whole += (f"{name}.",)
        elif isinstance(module, CompressedLinear | peft_layers.LoraLayer):
            names.append(name)
            whole += (f"{name}.",)
        elif isinstance(module, nn.Linear) and not name.startswith(whole):
            names.append(name)
    return names


def register() -> None:
    """Make PEFT find the adapter classes of this module, once."""
    original = LoraModel._prepare_model
    if hasattr(original, "__wrapped__"):
        return

    @wraps(original)
    def prepare_model(self: Any, peft_config: Any, model: nn.Module) -> None:
        original(self, peft_config, model)
        if type(self) is LoraModel:  # others, such as AdaLora, choose their classes differently
            prepare_(peft_config, model)

    LoraModel._prepare_model = prepare_model  # type: ignore[method-assign]


def _listed(values: tuple[Any, ...]) -> str:
    return ", ".join(map(repr, values))
