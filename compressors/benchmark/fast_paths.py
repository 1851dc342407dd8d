"""The compressed weights of a model for which the device has no fast path."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from lrc.compressors.layers import CompressedLinear
from lrc.compressors.layers.component import Component


@dataclass(frozen=True)
class SlowForm:
    """Weights that are stored in the same way, and are multiplied by plain PyTorch."""

    form: str
    """Type of the component and its quantization, such as ``dense int4-g64``."""
    reason: str
    """Why no fast path serves it."""
    weights: tuple[str, ...]
    """Names of the layers."""


def slow_forms(model: nn.Module, refusal: Callable[[Component], str | None]) -> list[SlowForm]:
    """Return what has no fast path, by form and reason.

    Parameters
    ----------
    refusal : callable
        Returns why no fast path serves a component; None if one does.
    """
    found: dict[tuple[str, str], list[str]] = {}
    for name, layer in model.named_modules():
        if not isinstance(layer, CompressedLinear):
            continue
        for component in layer.components:
            reason = refusal(component)
            if reason is not None:
                found.setdefault((_form(component), reason), []).append(name)
    return [SlowForm(form, reason, tuple(names)) for (form, reason), names in found.items()]


def _form(component: Component) -> str:
    config = component.config
    args = None if config.quantization is None else str(config.quantization)
    return " ".join(filter(None, (config.type, config.pattern, args)))
