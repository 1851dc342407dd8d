"""Checkpoints that consist of integers only, in the format of compressed-tensors."""

import re
from collections.abc import Collection, Iterable, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

from safetensors import safe_open

from lrc.compressors.checkpoint.format import COPY_AGAIN
from lrc.compressors.io.shards import shard_files
from lrc.compressors.io.shortened import shortened
from lrc.compressors.layers import ComponentConfig, QuantizationArgs, WeightConfig
from lrc.configs.errors import CheckpointError

QUANT_METHOD = "compressed-tensors"
PACKED, SCALE, SHAPE = ".weight_packed", ".weight_scale", ".weight_shape"
FORMAT = "pack-quantized"
LAYOUT_VERSION = "0.15.0"
"""First version of compressed-tensors that packs integers of any width without gaps."""


def is_plain(modules: Mapping[str, WeightConfig], linears: Collection[str]) -> bool:
    """Return whether all compressed weights are symmetric integers without other components.

    They must be those of linear layers, not of an embedding; `linears` are their names.
    transformers with compressed-tensors 0.20 expects zero points in another shape than the format
    packs them to, and rejects them.
    """
    return all(name in linears and config.plain_integers for name, config in modules.items())


def loads_packed(model: Any, names: Iterable[str]) -> bool:
    """Return whether the class of a skeleton can be loaded with packed layers of these names.

    A packed layer has no `weight`, but `from_pretrained` still calls the `_init_weights` of the
    class for it, which in some families (Falcon, Mamba, nanochat) reads that `weight`.
    """
    trial = deepcopy(model)
    for tensor in [*trial.parameters(), *trial.buffers()]:
        tensor._is_hf_initialized = True  # nothing is drawn anew
    for module in trial.modules():
        module._is_hf_initialized = False  # but every module is visited
    for name in names:
        delattr(trial.get_submodule(name), "weight")
    try:
        trial.initialize_weights()
    except AttributeError:
        return False
    return True


def plain_name(name: str) -> str:
    """Return the name of a tensor of a ``dense`` component in a plain checkpoint.

    Linear layers of some models are called ``dense`` too; their biases keep their names.

    >>> plain_name("mlp.dense.dense.weight_packed"), plain_name("mlp.dense.bias")
    ('mlp.dense.weight_packed', 'mlp.dense.bias')
    """
    module, found, leaf = name.rpartition(".dense.")
    return f"{module}.{leaf}" if found and leaf.startswith("weight_") else name


def compressed_tensors_config(
    modules: Mapping[str, WeightConfig], linears: Iterable[str]
) -> dict[str, Any]:
    """Return the `quantization_config` of the ``compressed-tensors`` method.

    Parameters
    ----------
    modules : mapping of str to WeightConfig
        For which `is_plain` holds.
    linears : iterable of str
        Names of all linear layers of the model; those that stay dense are listed by name.
    """
    by_args: dict[QuantizationArgs, list[str]] = {}
    for name, config in modules.items():
        assert config.quantization is not None
        by_args.setdefault(config.quantization, []).append(name)
    groups = {
        f"group_{number}": {
            "targets": _targets(names, linears),
            "weights": {
                "num_bits": args.bits,
                "type": "int",
                "symmetric": args.symmetric,
                "strategy": "channel" if args.group_size is None else "group",
                "group_size": args.group_size,
                "dynamic": False,
            },
            "input_activations": None,
            "output_activations": None,
            "format": FORMAT,
        }
        for number, (args, names) in enumerate(by_args.items())
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


def _targets(names: list[str], linears: Iterable[str]) -> list[str]:
    r"""Return expressions that match these linear layers and no others, whatever their prefix.

    Other classes than the compressed one lack the prefix of the decoder and have other heads, which
    the class name `Linear` would match. An expression such as
    ``re:(.*\.)?layers\.\d+\.mlp\.up_proj$`` covers several layers if all are among `names`.
    """
    others = {_expression(name, any_layer=True) for name in {*linears} - {*names}}
    general = {name: _expression(name, any_layer=True) for name in names}
    found = (
        _expression(name, any_layer=False) if expression in others else expression
        for name, expression in general.items()
    )
    return list(dict.fromkeys(found))


def _expression(name: str, *, any_layer: bool) -> str:
    parts = name.split(".")
    numbers = [index for index, part in enumerate(parts) if part.isdigit()]
    start = max(numbers[0] - 1, 0) if numbers else len(parts) - 1  # from the list of layers on
    local = [r"\d+" if part.isdigit() and any_layer else part for part in parts[start:]]
    return r"re:(.*\.)?" + r"\.".join(local) + "$"


def plain_targets(block: Mapping[str, Any], where: str) -> dict[str, QuantizationArgs]:
    """Return the integers of every target of a `quantization_config` of ``compressed-tensors``.

    Raises
    ------
    CheckpointError
        If lrc cannot have written the block.
    """
    found: dict[str, QuantizationArgs] = {}
    try:
        for group in block["config_groups"].values():
            weights = group["weights"]
            args = QuantizationArgs(weights["num_bits"], weights["group_size"])
            if (weights["symmetric"], QuantizationArgs.parse(str(args))) != (True, args):
                raise ValueError(f"{args} must be symmetric")
            for target in group["targets"]:
                re.compile(target)
                found[target] = args
    except (KeyError, AttributeError, TypeError, ValueError, re.error) as error:
        raise CheckpointError(
            f"{where}: quantization_config must be as lrc wrote it, got groups that cannot be read "
            f"({error!r:.80}); {COPY_AGAIN}",
            code="invalid-config",
        ) from error
    return found


def read_plain(
    folder: Path, block: Mapping[str, Any], names: Iterable[str]
) -> dict[str, WeightConfig]:
    """Return the configurations of the weights of a plain checkpoint.

    Parameters
    ----------
    folder : Path
        Of a checkpoint that lrc wrote.
    block : mapping
        The `quantization_config`.
    names : iterable of str
        Names of its tensors.

    Raises
    ------
    CheckpointError
        If lrc cannot have written the block.
    """
    packed = {
        n.removesuffix(end) for n in names for end in (PACKED, SCALE, SHAPE) if n.endswith(end)
    }
    args: dict[str, QuantizationArgs] = {}
    unmatched: list[str] = []
    for target, found in plain_targets(block, f"{folder}/config.json").items():
        matched = [n for n in sorted(packed) if matches(n, target)]
        args |= dict.fromkeys(matched, found)
        unmatched += [] if matched else [target]
    modules: dict[str, WeightConfig] = {}
    for file in shard_files(folder):
        with safe_open(file, framework="pt") as shard:
            for name in shard.keys():
                module = name.removesuffix(SHAPE)
                if module != name and module in args:
                    d_out, d_in = shard.get_tensor(name).tolist()
                    components = (ComponentConfig("dense", {}, args[module]),)
                    modules[module] = WeightConfig((d_out, d_in), components)
    lost = sorted((packed - {*modules}) | {*unmatched})
    if lost:
        raise CheckpointError(
            f"{folder}: the tensors do not match config.json: {shortened(lost, ', ')} must be in "
            f"both, with a weight_shape; {COPY_AGAIN}",
            code="tensor-mismatch",
        )
    return modules


def matches(name: str, target: str) -> bool:
    """Return whether compressed-tensors applies a target to the linear layer `name`."""
    expression = target.removeprefix("re:")
    if expression != target:
        return re.match(expression, name) is not None
    return target in ("Linear", name)
