"""LoRA adapters in folders of PEFT: which are supported, and their tensors."""

import json
import re
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from math import sqrt
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from lrc.compressors.io.json_text import parse_json
from lrc.compressors.io.shards import read_headers
from lrc.compressors.io.shortened import shortened
from lrc.configs.errors import DeltaError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
KEY = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<factor>[AB])\.weight")
ABSENT = (
    *("use_dora", "use_qalora", "lora_bias", "fan_in_fan_out", "modules_to_save"),
    *("trainable_token_indices", "target_parameters", "layer_replication", "megatron_config"),
    *("velora_config", "monteclora_config", "use_bdlora", "arrow_config", "kasa_config"),
    "alora_invocation_tokens",
)
"""Options of PEFT with which an adapter is more than the product of two matrices."""
INITIALIZATIONS = (True, False, "gaussian", "eva", "orthogonal")
"""Values of `init_lora_weights` with which the weights of the base model are not changed."""


@dataclass(frozen=True)
class Lora:
    """A supported adapter; `tensors` are those of its file, by their names there."""

    folder: Path
    config: dict[str, Any]
    tensors: dict[str, Tensor]

    @cached_property
    def modules(self) -> list[str]:
        """The adapted layers, by their names in the base model, in the order of the tensors."""
        names = [found["module"] for key in self.tensors if (found := KEY.fullmatch(key))]
        return list(dict.fromkeys(names))

    def factors(self, module: str) -> tuple[Tensor, Tensor]:
        """Return the matrices B [d_out, rank] and A [rank, d_in] of a layer."""
        first, second = keys(module)
        return self.tensors[second], self.tensors[first]

    def change(self, module: str) -> Tensor:
        """Return what is added to the weight of a layer [d_out, d_in], in float32."""
        B, A = self.factors(module)
        return self.scaling(module) * (B.float() @ A.float())

    def scaling(self, module: str) -> float:
        """Return the factor of the product ``B @ A`` of a layer."""
        patterns: dict[str, float] = self.config.get("alpha_pattern") or {}
        fits = (alpha for key, alpha in patterns.items() if re.match(rf"(.*\.)?({key})$", module))
        alpha = next(fits, self.config["lora_alpha"])
        rank = len(self.factors(module)[1])
        return float(alpha / (sqrt(rank) if self.config.get("use_rslora") else rank))

    def with_factors(self, factors: dict[str, tuple[Tensor, Tensor]]) -> "Lora":
        """Return the adapter with other factors B and A, of other ranks, at the same scaling."""
        tensors: dict[str, Tensor] = {}
        ranks, alphas = {}, {}
        for module, (B, A) in factors.items():
            first, second = keys(module)
            tensors |= {first: A, second: B}
            ranks[module] = len(A)
            unit = sqrt(len(A)) if self.config.get("use_rslora") else len(A)
            alphas[module] = self.scaling(module) * unit
        config = dict(self.config)
        for key, pattern, values in (
            ("r", "rank_pattern", ranks),
            ("lora_alpha", "alpha_pattern", alphas),
        ):
            config[key] = common = Counter(values.values()).most_common(1)[0][0]
            config[pattern] = {n: value for n, value in values.items() if value != common}
        return Lora(self.folder, config, tensors)

    @property
    def config_text(self) -> str:
        """The text of ``adapter_config.json``."""
        return json.dumps(self.config, indent=2, sort_keys=True) + "\n"


def keys(module: str) -> tuple[str, str]:
    """Return the names of the tensors A and B of a layer in the file of an adapter."""
    return f"base_model.model.{module}.lora_A.weight", f"base_model.model.{module}.lora_B.weight"


def is_adapter(folder: Path) -> bool:
    """Return whether a folder contains an adapter of PEFT."""
    return (folder / CONFIG).is_file()


def parse_config(path: Path) -> dict[str, Any]:
    """Read the configuration of an adapter.

    Raises
    ------
    DeltaError
        If it cannot be read, or the adapter is of a type that is not supported.
    """
    try:
        config = parse_json(path.read_text(encoding="utf-8"), finite=False)
        config = dict(config)
        kind = config.get("peft_type")
        problems = [f"{key} is {config[key]!r:.60}" for key in ABSENT if config.get(key)]
        if config.get("bias", "none") != "none":
            problems.append(f"bias is {config['bias']!r:.60}")
        if config.get("init_lora_weights", True) not in INITIALIZATIONS:
            problems.append(f"init_lora_weights is {config['init_lora_weights']!r:.60}")
        if kind == "LORA" and not isinstance(config["lora_alpha"], int | float):
            raise ValueError("lora_alpha must be a number")
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise DeltaError(
            f"{path}: not the configuration of an adapter ({error!r:.120}); save the adapter again "
            "with save_pretrained of PEFT"
        ) from error
    if kind != "LORA":
        problems = [f"peft_type is {kind!r:.60}"]
    if problems:
        raise DeltaError(
            f"{path}: must be a LoRA adapter without variants and without other trained "
            f"parameters, got: {shortened(problems)}; merge it into the model (merge_and_unload "
            "and save_pretrained of PEFT) and make a delta of the merged model",
            code="unsupported-adapter",
        )
    return config


def read_lora(folder: Path) -> Lora:
    """Read an adapter.

    Raises
    ------
    DeltaError
        If a file is missing or damaged, or the adapter is of a type that is not supported.
    """
    config, path = parse_config(folder / CONFIG), folder / WEIGHTS
    if not path.is_file():
        raise DeltaError(
            f"{folder}: must contain {WEIGHTS}; save the adapter again with save_pretrained of "
            "PEFT, pickled adapters are never read"
        )
    try:
        read_headers([path])
        tensors = {name: tensor for name, tensor in sorted(load_file(path).items())}
    except ValueError as error:
        raise DeltaError(f"{error}; copy the adapter again") from error
    others = [name for name in tensors if not KEY.fullmatch(name)]
    if others:
        raise DeltaError(
            f"{path}: must contain only tensors lora_A.weight and lora_B.weight of linear layers, "
            f"got {shortened(others, ', ')}; merge the adapter into the model and make a delta of "
            "the merged model",
            code="unsupported-adapter",
        )
    found = Lora(folder, config, tensors)
    for module in found.modules:
        first, second = keys(module)
        missing = [key for key in (first, second) if key not in tensors]
        if missing or not tensors[first].shape[0] == tensors[second].shape[1]:
            raise DeltaError(
                f"{path}: {module} must have factors A [rank, d_in] and B [d_out, rank]; copy the "
                "adapter again"
            )
    if not tensors:
        raise DeltaError(f"{path}: contains no tensors; copy the adapter again")
    return found


def truncated_product(B: Tensor, A: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the factors of the best approximation of ``B @ A`` of a rank.

    Returns
    -------
    B : Tensor, shape [d_out, rank], float64
    A : Tensor, shape [rank, d_in], float64
        Both with the square roots of the singular values.
    singular_values : Tensor, shape [r]
        All of the product.
    """
    Q_left, R_left = torch.linalg.qr(B.double())  # [d_out, r], [r, r]
    Q_right, R_right = torch.linalg.qr(A.double().T)  # [d_in, r], [r, r]
    U, S, Vh = torch.linalg.svd(R_left @ R_right.T, full_matrices=False)
    root = S[:rank].sqrt()
    return (Q_left @ U[:, :rank]) * root, root[:, None] * (Vh[:rank] @ Q_right.T), S
