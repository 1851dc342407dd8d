"""Say why a tokenizer could not be loaded: transformers often names another cause."""

import json
from pathlib import Path

from tokenizers import Tokenizer
from transformers.utils.import_utils import (
    is_protobuf_available,
    is_sentencepiece_available,
    is_tiktoken_available,
)

from lrc.compressors.models.configuration import first_line

PATTERNS = ("tokenizer.json", "vocab*", "merges.txt", "*.model", "*.tiktoken", "tekken.json")
"""Files that hold a vocabulary; one is enough for some tokenizer."""
SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


def why_no_tokenizer(folder: Path, error: Exception) -> str:
    """Return why the tokenizer in a folder could not be loaded, and a remedy if there is one."""
    files = sorted({file.name for pattern in PATTERNS for file in folder.glob(pattern)})
    if not files:
        return "the folder has no tokenizer.json, vocabulary or tokenizer.model"
    for name in (*files, *SETTINGS):
        if name.endswith(".json") and (problem := _broken_json(folder / name)):
            return problem
    models = [name for name in files if name.endswith((".model", ".tiktoken"))]
    if "tokenizer.json" in files:
        try:
            Tokenizer.from_file(str(folder / "tokenizer.json"))
        except Exception as reason:  # the library raises Exception itself
            return f"tokenizer.json does not describe a tokenizer ({first_line(reason)})"
    elif "vocab.json" in files and "merges.txt" not in files:
        return "merges.txt, which belongs to vocab.json, is missing"
    elif models and (packages := _lacking_packages(folder / models[0])):
        return f"reading {models[0]} needs more packages: run `pip install {packages}`"
    return first_line(error)


def _broken_json(path: Path) -> str | None:
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        return f"{path.name} cannot be read: {error.strerror or error}"
    except ValueError as error:
        return f"{path.name} is not JSON ({first_line(error)}); copy or download it again"
    return None if isinstance(found, dict) else f"{path.name} must be a JSON object"


def _lacking_packages(path: Path) -> str:
    """Return the packages that reading a vocabulary file needs and that are not installed.

    Without sentencepiece, transformers takes every tokenizer.model for a file of tiktoken. Those
    are text, a base64 string and a rank per line; the files of sentencepiece are binary.
    """
    with path.open("rb") as file:
        first = file.readline(4096).split()
    if len(first) == 2 and first[1].isdigit() and first[0].isascii():
        needed = {"tiktoken": is_tiktoken_available()}
    else:
        needed = {
            "sentencepiece": is_sentencepiece_available(),
            "protobuf": is_protobuf_available(),
        }
    return " ".join(name for name, installed in needed.items() if not installed)
