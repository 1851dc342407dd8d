"""Read the header of a GGUF file: its metadata and tensor table, but no tensor.

`gguf.GGUFReader` needs seconds for the same, because it makes an array of every token.
"""

import mmap
import struct
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import Any

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from lrc.compressors.io.shards import Header

NUMBERS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
"""Type of a metadata value -> its format in `struct`. Type 8 is a string, 9 an array."""
STRING, ARRAY = 8, 9


def read_gguf(path: Path) -> tuple[dict[str, Any], dict[str, Header]]:
    """Return the metadata, and tensor name -> header with the shape in the order of torch.

    A file is read once per process, unless it changes. The result must not be changed.

    Raises
    ------
    ValueError
        If the file is not a whole GGUF file of version 2 or 3.
    """
    try:
        found = path.stat()
    except OSError as error:
        raise ValueError(f"{path}: not a whole GGUF file ({error})") from error
    return _read(path, (found.st_ino, found.st_size, found.st_mtime_ns))


@lru_cache(maxsize=2)
def _read(path: Path, version: tuple[int, ...]) -> tuple[dict[str, Any], dict[str, Header]]:
    """Read the header of a `version` of a file."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            metadata, headers = _Cursor(data).read(path)
            end = max((header.offset + header.nbytes for header in headers.values()), default=0)
            if end > len(data):
                raise ValueError(f"it has {len(data):,} bytes, and its tensors need {end:,}")
    except (OSError, struct.error, KeyError, ValueError) as error:
        raise ValueError(f"{path}: not a whole GGUF file ({error})") from error
    return metadata, headers


class _Cursor:
    """A position in a GGUF file."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data, self._at = data, 4

    def read(self, path: Path) -> tuple[dict[str, Any], dict[str, Header]]:
        if self._data[:4] != b"GGUF":
            raise ValueError("it does not start with GGUF")
        version, n_tensors, n_values = (self.number(4), self.number(10), self.number(10))
        if version not in (2, 3):
            raise ValueError(f"its version is {version}")
        metadata = {self.string(): self.value(self.number(4)) for _ in range(n_values)}
        table = [self.tensor() for _ in range(n_tensors)]
        alignment = metadata.get("general.alignment", 32)
        start = -(-self._at // alignment) * alignment
        headers = {}
        for name, shape, kind, offset in table:
            block, block_bytes = GGML_QUANT_SIZES[kind]
            nbytes = prod(shape) // block * block_bytes
            headers[name] = Header(path, shape, kind.name, name, start + offset, nbytes)
        if len(headers) < n_tensors:
            raise ValueError("two of its tensors have the same name")
        return metadata, headers

    def number(self, kind: int) -> Any:
        layout = f"<{NUMBERS[kind]}"
        (value,) = struct.unpack_from(layout, self._data, self._at)
        self._at += struct.calcsize(layout)
        return value

    def string(self) -> str:
        length = self.number(10)
        self._at += length
        if self._at > len(self._data):
            raise ValueError("it ends inside its metadata")
        return self._data[self._at - length : self._at].decode("utf-8", errors="replace")

    def value(self, kind: int) -> Any:
        if kind == ARRAY:
            of, length = self.number(4), self.number(10)
            return [self.value(of) for _ in range(length)]
        return self.string() if kind == STRING else self.number(kind)

    def tensor(self) -> tuple[str, list[int], GGMLQuantizationType, int]:
        name = self.string()
        shape = [self.number(10) for _ in range(self.number(4))]
        return name, shape[::-1], GGMLQuantizationType(self.number(4)), self.number(10)
