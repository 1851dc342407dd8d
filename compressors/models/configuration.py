"""Read the config of a model, and refuse unsupported ones."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from textwrap import shorten
from typing import Any

from transformers import AutoConfig, PreTrainedConfig
from transformers import __version__ as transformers_version
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_MAPPING_NAMES,
)

from lrc.compressors.models.model_kinds import kind_of
from lrc.configs.errors import ModelError
from lrc.configs.recipe import Model

TESTED = "Llama, Mistral, Qwen2, Qwen3, Gemma-3, OPT, GPT-NeoX, Mixtral and Qwen3-MoE"
ENCODERS = "BERT, RoBERTa and ModernBERT, as embedding models or with a classification head"
ENCODER_DECODERS = "T5 and BART"
SUPPORTED = (
    f"decoder-only models whose layers hold torch.nn.Linear (tested: {TESTED}), encoders (tested: "
    f"{ENCODERS}), and encoder-decoder models (tested: {ENCODER_DECODERS})"
)
# Names of classes with a head for the next token; `build` refuses those of masked tokens.
CAUSAL = re.compile(r"(For(CausalLM|ConditionalGeneration|MaskedLM)|LMHeadModel)$")


def read_gguf_config(path: Path) -> PreTrainedConfig:
    """Read the config from the metadata of a GGUF file."""
    from lrc.compressors.io.gguf_file import read_gguf  # imports gguf, which takes 0.3 s
    from lrc.compressors.models.gguf_config import gguf_config

    refuse_adapter(path.parent)
    try:
        metadata, headers = read_gguf(path)
        _refuse_other_gguf(path, metadata, len(headers))
        config = gguf_config(path)
    except ModelError:
        raise
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
    refuse_adapter(folder)
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
    nested = [value for value in raw.values() if isinstance(value, dict)]  # such as text_config
    keys = ("quantization_config", "compression_config")
    found = [part[key] for part in (raw, *nested) for key in keys if part.get(key)]
    if found and not ours:
        quantization = found[0]
        known = isinstance(quantization, dict)
        method = quantization.get("quant_method", "unnamed") if known else quantization
        raise ModelError(
            f"model.path: {folder} is already compressed (quant_method {method!r}); lrc starts "
            "from full-precision weights: give the original model"
        )
    if "transformers_weights" in raw:
        raise ModelError(
            f"model.path: {path} names a weight file (transformers_weights), which lrc does not "
            "follow; save the model again with save_pretrained"
        )
    kind = raw.get("model_type")
    check_code(raw, folder, trusted=spec.trust_remote_code)
    if kind not in CONFIG_MAPPING and not spec.trust_remote_code:
        raise ModelError(
            f"model.path: {path} names the model_type {kind!r}, which transformers "
            f"{transformers_version} does not know; supported are {SUPPORTED}"
        )
    _refuse_other_heads(raw, path)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=spec.trust_remote_code)
    except Exception as error:  # as above
        raise ModelError(
            f"model.path: {path} could not be read ({first_line(error)}); it was edited, or needs "
            "another version of transformers: copy or download it again"
        ) from error
    assert isinstance(config, PreTrainedConfig)
    return config


def refuse_adapter(folder: Path) -> None:
    """Raise a `ModelError` if there is an adapter beside or instead of a model."""
    found = [*folder.glob("adapter_config.json"), *folder.glob("adapter_model*")]
    if found:
        raise ModelError(
            f"model.path: {folder} holds an adapter ({found[0].name}), which transformers adds to "
            "the model that it loads, but which lrc would not compress; merge it first "
            "(merge_and_unload and save_pretrained of PEFT), or move it to another folder"
        )


def _refuse_other_heads(raw: dict[str, Any], path: Path) -> None:
    """Refuse models that are no encoders and do not predict the next token."""
    names = raw.get("architectures") or []
    names = names if isinstance(names, list) else [names]
    if kind_of({**raw, "architectures": names}).padded:
        return
    tables = (MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_MAPPING_NAMES)  # the latter: bare decoders
    known = [table.get(str(raw.get("model_type"))) for table in tables]
    own = "AutoModelForCausalLM" in str(raw.get("auto_map"))
    other = [name for name in names if not CAUSAL.search(str(name)) and name not in known]
    if other and not own:
        raise ModelError(
            f"model.path: {path} describes a {other[0]} (architectures), which is no causal "
            "language model: the result would lose its head; give the model from which it was "
            f"made; supported are {SUPPORTED}"
        )


def _refuse_other_gguf(path: Path, metadata: dict[str, Any], n_tensors: int) -> None:
    """Refuse files whose metadata says that they are not a model."""
    kind = metadata.get("general.type", "model")
    if kind != "model":
        merge = "merge it first (llama-export-lora), and " if kind == "adapter" else ""
        raise ModelError(
            f"model.path: {path} is a GGUF file of type {kind!r}, not a model; {merge}give the "
            "file of the model"
        )
    if "split.tensors.count" in metadata or "general.architecture" not in metadata:
        refuse_part(path, metadata, n_tensors)


def refuse_part(
    path: Path, metadata: dict[str, Any], n_tensors: int, expected: int | None = None
) -> None:
    """Raise a `ModelError` for one file of a model that was split into several.

    `expected` is the number of tensors of the whole model where the file does not state it.
    """
    n_parts = metadata.get("split.count", 1)
    if n_parts > 1:
        total = metadata.get("split.tensors.count", expected)
        raise ModelError(
            f"model.path: {path} holds {n_tensors} of {total or 'more'} tensors: it is part "
            f"{metadata.get('split.no', 0) + 1} of {n_parts} of a model; merge the parts first "
            "(llama-gguf-split --merge FIRST-PART MERGED) and give the merged file"
        )


def check_code(config: Mapping[str, Any], folder: Path, *, trusted: bool) -> None:
    """Refuse a model that only its own code, which is not trusted, can load.

    Parameters
    ----------
    config : mapping
        Its ``config.json``.

    Raises
    ------
    ModelError
    """
    if "auto_map" in config and config.get("model_type") not in CONFIG_MAPPING and not trusted:
        raise needs_code(folder, "config.json")


def needs_code(folder: Path, file: str) -> ModelError:
    """Return the error about a file whose `auto_map` names code that is not trusted."""
    return ModelError(
        f"model.path: {folder} comes with Python code (auto_map in {file}); read that code, then "
        "set model.trust_remote_code: true to run it",
    )


def tokenizer_needs_code(error: Exception, folder: Path) -> ModelError | None:
    """Return the error to raise if loading a tokenizer failed because its code is not trusted."""
    named = "trust_remote_code" in str(error)  # transformers has no class for this error
    return needs_code(folder, "tokenizer_config.json") if named else None


def first_line(error: BaseException) -> str:
    """Return type and first line of another library's error; two lines if one ends in a colon."""
    lines = [line.strip() for line in str(error).strip().splitlines()]
    text = " ".join(lines[: 2 if lines and lines[0].endswith(":") else 1])
    text = shorten(text, 200, placeholder=" ...")
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
