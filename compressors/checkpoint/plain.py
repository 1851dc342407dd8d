"""Integers alone: the config of a checkpoint that loads wherever compressed-tensors is there."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open

from lrc.compressors.checkpoint.format import AGAIN
from lrc.compressors.io.shards import shard_files
from lrc.compressors.layers import Scheme
from lrc.configs.errors import CheckpointError

QUANT_METHOD = "compressed-tensors"
PACKED, SCALE, SHAPE = ".weight_packed", ".weight_scale", ".weight_shape"
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
        "quant_method": QUANT_METHOD,
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


def read_plain(
    folder: Path, block: Mapping[str, Any], names: Iterable[str]
) -> dict[str, dict[str, Any]]:
    """Return the module table that `compressed_tensors_config` was given.

    Parameters
    ----------
    folder : Path
        Of a checkpoint that lrc wrote, its headers read without an error.
    block : mapping
        The `quantization_config`.
    names : iterable of str
        Those of its tensors.

    Raises
    ------
    CheckpointError
        If the block is none that lrc writes.
    """
    packed = {
        n.removesuffix(end) for n in names for end in (PACKED, SCALE, SHAPE) if n.endswith(end)
    }
    table: dict[str, dict[str, Any]] = {}
    try:
        for group in block["config_groups"].values():
            scheme, targets = _scheme(group["weights"]), group["targets"]
            for name in sorted(packed) if targets == ["Linear"] else targets:
                table[name] = {"form": "integers", "scheme": str(scheme)}
    except (KeyError, AttributeError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{folder}/config.json: quantization_config must be as lrc wrote it, got groups that "
            f"cannot be read ({error!r:.80}); {AGAIN}"
        ) from error
    for file in shard_files(folder):
        with safe_open(file, framework="pt") as shard:
            for name in shard.keys():
                module = name.removesuffix(SHAPE)
                if module != name and module in table:
                    table[module]["shape"] = shard.get_tensor(name).tolist()
    lost = sorted(packed - {*table} | {n for n in table if "shape" not in table[n]})
    if lost:
        raise CheckpointError(
            f"{folder}: the tensors do not fit config.json: {', '.join(lost[:5])} must be in both, "
            f"with a weight_shape; {AGAIN}"
        )
    return table


def _scheme(weights: Mapping[str, Any]) -> Scheme:
    return Scheme(weights["num_bits"], weights["group_size"], weights["symmetric"])
