"""The config that transformers makes of the metadata of a GGUF file."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from functools import lru_cache
from pathlib import Path
from typing import Any
from unittest import mock

from transformers import AutoConfig, configuration_utils, modeling_gguf_pytorch_utils
from transformers.models.auto import tokenization_auto

_READ: Callable[..., dict[str, Any]] = modeling_gguf_pytorch_utils.load_gguf_checkpoint
_READERS = (modeling_gguf_pytorch_utils, configuration_utils, tokenization_auto)
"""Modules in which configs and tokenizers find the function, depending on the version."""


class _Contents(dict[str, Any]):
    """The config in a file; anything else is read when it is used."""

    def __init__(self, path: Path, config: dict[str, Any]) -> None:
        super().__init__(config=config)
        self._path = path

    def __missing__(self, key: str) -> Any:
        return _READ(self._path)[key]


def gguf_config(path: Path) -> Any:
    """Return the config of a file, which transformers makes once for each version of it."""
    with configs_read_once():
        return AutoConfig.from_pretrained(path.parent, gguf_file=path.name)


@contextmanager
def configs_read_once() -> Iterator[None]:
    """Let transformers take the config of a file from the first time that it was read.

    It needs seconds to read the metadata, because it makes an array of every token. It does so for
    the config, and again to choose the class of the tokenizer.
    """

    def read(path: Any, return_tensors: bool = False, **options: Any) -> Any:
        if return_tensors:
            return _READ(path, return_tensors, **options)
        file = Path(path).resolve()
        found = file.stat()
        return _Contents(file, deepcopy(_config_of(file, (found.st_mtime_ns, found.st_size))))

    with ExitStack() as stack:
        for module in _READERS:
            if hasattr(module, "load_gguf_checkpoint"):
                stack.enter_context(mock.patch.object(module, "load_gguf_checkpoint", read))
        yield


@lru_cache(maxsize=8)
def _config_of(path: Path, version: tuple[int, int]) -> dict[str, Any]:
    config: dict[str, Any] = _READ(path, return_tensors=False)["config"]
    return config
