"""The tokenizer of a GGUF file, from tokenizer.json or from another GGUF file.

llama.cpp splits text before byte-pair encoding by rules that it knows by name
(`tokenizer.ggml.pre`). They are found here from the rules in tokenizer.json.
"""

import json
from pathlib import Path
from typing import Any

from gguf import TokenType

from lrc.compressors.checkpoint.reader import load_tokenizer
from lrc.compressors.io.gguf_file import read_gguf
from lrc.configs.errors import CheckpointError, ExportError

WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
PATTERNS = {
    rf"{WORDS}|\p{{N}}{{1,3}}|{REST}": "llama-bpe",
    rf"{WORDS}|\p{{N}}|{REST}": "qwen2",
}
"""Pattern of a split before the bytes -> name of the rule in llama.cpp."""
SPECIAL = {
    "bos_token_id": "bos_token_id",
    "eos_token_id": "eos_token_id",
    "unk_token_id": "unknown_token_id",
    "sep_token_id": "seperator_token_id",  # spelled so in GGUF
    "pad_token_id": "padding_token_id",
    "mask_token_id": "mask_token_id",
}
"""Attribute of a tokenizer -> key of GGUF."""
NOT_COPIED = {
    f"general.{key}" for key in ("architecture", "alignment", "file_type", "quantization_version")
}
"""Properties of a file, not of the model."""
MARK = "\u2581"
"""Stands for a space in vocabularies of SentencePiece."""
UNMERGED = -1e4
"""Score of tokens that no merge makes; it is not used."""
REMEDY = (
    "give --tokenizer FILE.gguf, a GGUF file of the same model, from which the tokenizer is copied"
)


def gguf_tokenizer(path: Path, vocabulary: int) -> dict[str, Any]:
    """Copy the tokenizer and the description of the model from a GGUF file.

    Raises
    ------
    ExportError
        If it cannot be read, or has another number of tokens than `vocabulary`.
    """
    try:
        metadata, _ = read_gguf(path)
    except (ValueError, OSError) as error:
        raise ExportError(f"--tokenizer: {error}; copy or download it again") from error
    tokens = metadata.get("tokenizer.ggml.tokens", [])
    if len(tokens) != vocabulary:
        raise ExportError(
            f"--tokenizer: {path} must have a token for each of the {vocabulary} rows of the "
            f"embedding, got {len(tokens)}; give a GGUF file of the same model"
        )
    return {
        key: value
        for key, value in metadata.items()
        if key.startswith(("tokenizer.", "general.")) and key not in NOT_COPIED and value != []
    }


def folder_tokenizer(
    folder: Path, vocabulary: int, *, trust_remote_code: bool = False
) -> dict[str, Any]:
    """Return the metadata of the tokenizer in a folder.

    Parameters
    ----------
    folder : Path
    vocabulary : int
        Rows of the embedding. Rows without a token get placeholders, as in llama.cpp's converter.

    Raises
    ------
    ExportError
        If llama.cpp would split text into other tokens, or there are more tokens than rows.
    """
    try:
        tokenizer = load_tokenizer(folder, trust_remote_code=trust_remote_code)
    except CheckpointError as error:
        raise ExportError(f"{error}; or {REMEDY}") from error
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ExportError(f"{folder}: its tokenizer has no tokenizer.json; {REMEDY}")
    state = json.loads(backend.to_str())
    model, added = state["model"], {t["id"]: t for t in state["added_tokens"]}
    if model["type"] != "BPE":
        raise ExportError(f"{folder}: its tokenizer must be BPE, got {model['type']}; {REMEDY}")
    ids = {index: token for token, index in model["vocab"].items()}
    ids |= {index: token["content"] for index, token in added.items()}
    if max(ids) >= vocabulary:
        raise ExportError(
            f"{folder}: its tokenizer has ids up to {max(ids)}, the embedding only {vocabulary} "
            f"rows; {REMEDY}"
        )
    tokens = [ids.get(index, f"[PAD{index}]") for index in range(vocabulary)]
    rules = _pieces(state, folder) if model.get("byte_fallback") else _byte_level(state, folder)
    keys: dict[str, Any] = {**rules, "tokens": tokens}
    keys["token_type"] = [int(_type(index, ids, added, model)) for index in range(vocabulary)]
    if model.get("byte_fallback"):
        scores = _scores(model["merges"])
        keys["scores"] = [scores.get(token, UNMERGED) for token in tokens]
    for attribute, key in SPECIAL.items():
        if (index := getattr(tokenizer, attribute, None)) is not None:
            keys[key] = index
    written = tokenizer("a")["input_ids"]
    keys["add_bos_token"] = written[:1] == [tokenizer.bos_token_id]
    keys["add_eos_token"] = written[-1:] == [tokenizer.eos_token_id]
    found = {f"tokenizer.ggml.{key}": value for key, value in keys.items()}
    return found | _templates(tokenizer.chat_template)


def _byte_level(state: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return the keys of a byte-level tokenizer."""
    first = (state.get("normalizer") or {"type": "NFC"})["type"]
    steps = _sequence(state.get("pre_tokenizer"), "pretokenizers")
    byte_level = steps.pop() if steps and steps[-1]["type"] == "ByteLevel" else {}
    kinds = [step["type"] for step in steps]
    name = None
    if byte_level.get("use_regex", True) and byte_level:
        digits = kinds == ["Digits"] and steps[0]["individual_digits"]
        name = "smollm" if digits else "gpt-2" if not steps else None
    elif byte_level and kinds == ["Split"] and steps[0]["behavior"] == "Isolated":
        name = PATTERNS.get(steps[0]["pattern"].get("Regex"))
    if name is None or first != "NFC":
        raise ExportError(
            f"{folder}: no rule of llama.cpp is known that splits text like the tokenizer "
            f"(normalizer {first}, pre_tokenizer {', '.join(kinds) or 'none'}); {REMEDY}"
        )
    merges = [
        " ".join(pair) if isinstance(pair, list) else pair for pair in state["model"]["merges"]
    ]
    return {
        "model": "gpt2",
        "pre": name,
        "merges": merges,
        "add_space_prefix": bool(byte_level.get("add_prefix_space")),
    }


def _pieces(state: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return the keys of a vocabulary of SentencePiece."""
    steps = _sequence(state.get("normalizer"), "normalizers")
    steps += _sequence(state.get("pre_tokenizer"), "pretokenizers")
    prefix = False
    for step in steps:
        kind, prepend = step["type"], step.get("prepend_scheme", "never")
        known = {
            "Prepend": step.get("prepend") == MARK,
            "Replace": step.get("content") == MARK,
            "Metaspace": step.get("replacement") == MARK and not step.get("split"),
            "Split": step.get("pattern") == {"String": " "},  # none is left
        }
        if not known.get(kind):
            raise ExportError(
                f"{folder}: no rule of llama.cpp is known that splits text like the tokenizer "
                f"({kind}); {REMEDY}"
            )
        prefix |= kind == "Prepend" or (kind == "Metaspace" and prepend != "never")
    return {"model": "llama", "pre": "default", "add_space_prefix": prefix}


def _scores(merges: list[Any]) -> dict[str, float]:
    """Return token -> score: llama.cpp merges the pair with the highest score first."""
    scores: dict[str, float] = {}
    for rank, pair in enumerate(merges):
        left, right = pair if isinstance(pair, list) else pair.split(" ")
        scores.setdefault(left + right, -float(rank))
    return scores


def _sequence(step: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    """Return the steps of a normalizer or pre-tokenizer."""
    if step is None:
        return []
    return list(step[key]) if step["type"] == "Sequence" else [step]


def _type(
    index: int, ids: dict[int, str], added: dict[int, dict[str, Any]], model: dict[str, Any]
) -> TokenType:
    """Return the type of a token."""
    token = ids.get(index)
    if token is None:
        return TokenType.UNUSED
    if token == model.get("unk_token") and model.get("byte_fallback"):
        return TokenType.UNKNOWN
    if index in added:
        return TokenType.CONTROL if added[index]["special"] else TokenType.USER_DEFINED
    is_byte = model.get("byte_fallback") and len(token) == 6 and token.startswith("<0x")
    return TokenType.BYTE if is_byte else TokenType.NORMAL


def _templates(template: Any) -> dict[str, Any]:
    """Return the keys of chat templates, which may have names."""
    if not template:
        return {}
    if isinstance(template, str):
        return {"tokenizer.chat_template": template}
    names = [name for name in template if name != "default"]
    found = {f"tokenizer.chat_template.{name}": template[name] for name in names}
    if names:
        found["tokenizer.chat_templates"] = names
    return found | _templates(template.get("default"))
