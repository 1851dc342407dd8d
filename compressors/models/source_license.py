"""The licence that a source model states."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from lrc.compressors.io.gguf_file import read_gguf
from lrc.compressors.models.source import CARD, Source

KEYS = ("license", "license_name", "license_link")
"""Keys of a model card on the Hub, of which the last two describe the licence ``other``."""


def stated_license(source: Source) -> dict[str, str]:
    """Return the keys of a model card that state the licence; empty if the source states none.

    They are read from the metadata of a GGUF file, or from the model card in the folder.
    """
    if source.gguf is not None:
        metadata, _ = read_gguf(source.folder / source.gguf)
        return _texts({key: metadata.get(f"general.{key.replace('_', '.')}") for key in KEYS})
    return _texts(_header(source.folder / CARD))


def _texts(found: Mapping[str, Any]) -> dict[str, str]:
    return {key: found[key] for key in KEYS if isinstance(found.get(key), str) and found[key]}


def _header(card: Path) -> dict[str, Any]:
    """Return the metadata at the start of a model card; empty if there is none that can be read."""
    try:
        before, _, rest = card.read_text(encoding="utf-8").partition("---\n")
        found = yaml.safe_load(rest.partition("\n---")[0])
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) and not before.strip() else {}
