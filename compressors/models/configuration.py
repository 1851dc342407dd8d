"""Read the config of a model, and refuse unsupported ones."""

import json
from pathlib import Path

from transformers import AutoConfig, PreTrainedConfig
from transformers import __version__ as transformers_version
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from lrc.configs.errors import ModelError
from lrc.configs.recipe import Model

TESTED = "Llama, Mistral, Qwen2, Qwen3, Gemma-3, OPT and GPT-NeoX"
SUPPORTED = f"decoder-only models whose layers hold torch.nn.Linear (tested: {TESTED})"


def read_gguf_config(path: Path) -> PreTrainedConfig:
    """Read the config from the metadata of a GGUF file."""
    try:
        config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    except Exception as error:  # the readers of transformers and gguf raise nearly anything
        raise ModelError(
            f"model.path: {path} could not be read ({first_line(error)}); it may be truncated, or "
            "of an architecture that transformers does not read from GGUF: copy or download it "
            "again, or give the original model"
        ) from error
    assert isinstance(config, PreTrainedConfig)
    return config


def read_config(folder: Path, spec: Model, *, ours: bool = False) -> PreTrainedConfig:
    """Read ``config.json``; `ours` if a slicing stage wrote it.

    Raises
    ------
    ModelError
        Missing, damaged, already quantized, of an unknown type, or requiring remote code.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise ModelError(
            f"model.path: {folder} has no config.json; give a folder written by save_pretrained, "
            "a Hub id, or a .gguf file"
        )
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(
            f"model.path: {path} could not be read as JSON ({first_line(error)}); it may be "
            "truncated: copy or download it again"
        ) from error
    if not isinstance(raw, dict):
        raise ModelError(
            f"model.path: {path} must hold a JSON object, got {type(raw).__name__}; copy or "
            "download it again"
        )
    quantization = raw.get("quantization_config")
    if quantization and not ours:
        known = isinstance(quantization, dict)
        method = quantization.get("quant_method", "unnamed") if known else quantization
        raise ModelError(
            f"model.path: {folder} is already compressed (quant_method {method!r}); lrc starts "
            "from full-precision weights: give the original model"
        )
    kind = raw.get("model_type")
    if kind not in CONFIG_MAPPING and not spec.trust_remote_code:
        if "auto_map" in raw:
            raise ModelError(
                f"model.path: {spec.path} comes with Python code (auto_map in config.json); "
                "read that code, then set model.trust_remote_code: true to run it"
            )
        raise ModelError(
            f"model.path: {path} names the model_type {kind!r}, which transformers "
            f"{transformers_version} does not know; supported are {SUPPORTED}"
        )
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=spec.trust_remote_code)
    except Exception as error:  # as above
        raise ModelError(
            f"model.path: {path} could not be read ({first_line(error)}); it was edited, or needs "
            "another version of transformers: copy or download it again"
        ) from error
    assert isinstance(config, PreTrainedConfig)
    return config


def first_line(error: BaseException) -> str:
    """Return type and first line of another library's error; two lines if one ends in a colon."""
    lines = [line.strip() for line in str(error).strip().splitlines()]
    text = " ".join(lines[: 2 if lines and lines[0].endswith(":") else 1])
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__
