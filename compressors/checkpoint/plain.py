"""Integers alone: the config of a checkpoint that loads wherever compressed-tensors is there."""

from collections.abc import Iterable, Mapping
from typing import Any

from lrc.compressors.layers import Scheme

FORMAT = "pack-quantized"
LAYOUT_VERSION = "0.15.0"
"""Of compressed-tensors, the first in which integers that no byte is a multiple of have no gaps."""


def is_plain(modules: Mapping[str, Mapping[str, Any]]) -> bool:
    """Say whether a module table holds nothing but whole weights as symmetric integers.

    transformers with compressed-tensors expects zero points of another shape than the format
    packs them to, and refuses them (0.20).
    """
    return all(
        spec["form"] == "integers" and Scheme.read(spec["scheme"]).symmetric
        for spec in modules.values()
    )


def compressed_tensors_config(
    modules: Mapping[str, Mapping[str, Any]], linears: Iterable[str]
) -> dict[str, Any]:
    """Return the `quantization_config` of the ``compressed-tensors`` method.

    Parameters
    ----------
    modules : mapping of str to mapping
        The module table, of ``integers`` alone.
    linears : iterable of str
        Names of all linear layers of the model; those that stay as they are have to be named.
    """
    by_scheme: dict[str, list[str]] = {}
    for name, spec in modules.items():
        by_scheme.setdefault(spec["scheme"], []).append(name)
    groups = {
        f"group_{number}": {
            "targets": ["Linear"] if len(by_scheme) == 1 else names,
            "weights": _weights(Scheme.read(scheme)),
            "input_activations": None,
            "output_activations": None,
            "format": FORMAT,
        }
        for number, (scheme, names) in enumerate(by_scheme.items())
    }
    return {
        "quant_method": "compressed-tensors",
        "format": FORMAT,
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": [name for name in linears if name not in modules],
        "kv_cache_scheme": None,
        "version": LAYOUT_VERSION,
    }


def _weights(scheme: Scheme) -> dict[str, Any]:
    return {
        "num_bits": scheme.bits,
        "type": "int",
        "symmetric": scheme.symmetric,
        "strategy": "channel" if scheme.group_size is None else "group",
        "group_size": scheme.group_size,
        "dynamic": False,
    }
