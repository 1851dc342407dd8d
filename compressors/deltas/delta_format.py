"""The files of a delta.

* ``delta.json``: ``format_version``; ``kind``, ``model`` or ``adapter``; ``method``, the method and
  its options; ``base``, hashes of the weights of the base; ``sizes``; ``sha256`` of the weight
  file and of every file in ``files/``.
* ``delta.safetensors``: ``table``, JSON compressed by zlib with one record per stored tensor and
  the tensors of the base to which ``base.changed_sha256`` belongs; and the parts of all tensors.
  Parts of the same codec, name and dtype follow each other in one tensor, in the order of the
  records: thousands of small tensors would need more bytes for their headers than for their values.
* ``files/``: configuration and tokenizer of the tuned model where they differ from those of the
  base, or ``adapter_config.json``.
"""

import json
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lrc.compressors.deltas.delta_codecs import CODECS, Encoded, decode
from lrc.compressors.io.fingerprint import sha256
from lrc.compressors.io.json_text import parse_json
from lrc.compressors.io.shards import listed_file
from lrc.compressors.io.weight_hash import dtype_name
from lrc.configs.errors import DeltaError

FORMAT_VERSION = 1
DESCRIPTION, WEIGHTS, FILES, TABLE = "delta.json", "delta.safetensors", "files", "table"
MAX_TABLE_BYTES = 2**27
SIZES = frozenset({"numbers", "bits", "bits_per_number", "ratio", "relative_error"})
COPY_AGAIN = "copy the delta again, or make it again with `lrc delta make`"


@dataclass(frozen=True)
class Record:
    """One tensor of a delta."""

    name: str
    """In the files of the tuned model or of the adapter."""
    shape: list[int]
    dtype: str
    """Of the tuned tensor."""
    codec: str
    facts: dict[str, int]
    counts: dict[str, list[Any]]
    """Name of a part -> [number of its values, their dtype]."""

    @classmethod
    def of(cls, name: str, tuned: Tensor, encoded: Encoded) -> "Record":
        """Describe an encoded tensor."""
        counts = {n: [p.numel(), dtype_name(p.dtype)] for n, p in encoded.parts.items()}
        shape, dtype = list(tuned.shape), dtype_name(tuned.dtype)
        return cls(name, shape, dtype, encoded.codec, encoded.facts, counts)

    @property
    def keys(self) -> Iterator[tuple[str, str, int]]:
        """Name of every part, the tensor of the file that contains it, and its number of values."""
        for part, (count, dtype) in self.counts.items():
            yield part, f"{self.codec}.{part}.{dtype}", count

    @property
    def bits(self) -> int:
        """Bits of the parts in the file."""
        sizes = ((count, getattr(torch, dtype)) for count, dtype in self.counts.values())
        return sum(8 * count * dtype.itemsize for count, dtype in sizes)


@dataclass(frozen=True)
class Delta:
    """A delta in memory, compressed."""

    folder: Path
    description: dict[str, Any]
    """The content of ``delta.json``."""
    records: dict[str, Record]
    base_dtypes: dict[str, str]
    """Tensors of the base that are changed -> their dtypes in its files."""
    stored: dict[str, Tensor]

    @property
    def is_adapter(self) -> bool:
        """Whether the tuned model is given as an adapter."""
        return bool(self.description["kind"] == "adapter")

    @property
    def files(self) -> list[Path]:
        """The files of the tuned model that are not weights."""
        return [self.folder / name for name in self.description["sha256"] if name != WEIGHTS]

    @cached_property
    def _starts(self) -> dict[tuple[str, str], int]:
        starts, ends = {}, dict.fromkeys(self.stored, 0)
        for record in self.records.values():
            for part, key, count in record.keys:
                starts[record.name, part] = ends[key]
                ends[key] += count
        return starts

    def read(self, name: str, base: Tensor) -> Tensor:
        """Return the tuned tensor `name` from that of the base.

        Raises
        ------
        DeltaError
            If the stored parts do not fit.
        """
        record = self.records[name]
        parts = {}
        for part, key, count in record.keys:
            start = self._starts[name, part]
            parts[part] = self.stored[key][start : start + count]
        try:
            dtype: torch.dtype = getattr(torch, record.dtype)
            return decode(Encoded(record.codec, record.facts, parts), base, dtype)
        except ValueError as error:
            raise DeltaError(
                f"{self.folder / WEIGHTS}: {name} is damaged ({error}); {COPY_AGAIN}"
            ) from error

    def read_adapter(self) -> dict[str, Tensor]:
        """Return all tensors of an adapter."""
        return {
            name: self.read(name, torch.zeros(record.shape))
            for name, record in self.records.items()
        }

    def refuse_other_base(self, where: str, found: str, key: str) -> None:
        """Raise a `DeltaError` if the hash of a base model is not that under `key`."""
        if found != self.description["base"][key]:
            raise DeltaError(
                f"{where}: is not the model that {self.folder} was made for: the SHA-256 of its "
                f"weights must be {self.description['base'][key]}, got {found}; give the original "
                f"base model ({self.description['base']['name']}), in the dtype of its files",
                code="other-base",
            )


def write_delta(
    folder: Path,
    description: Mapping[str, Any],
    records: list[Record],
    parts: dict[str, list[Tensor]],
    base_dtypes: Mapping[str, str],
) -> None:
    """Write weights and description; ``files/`` exists already if there are any.

    `parts` maps a tensor of the file to the parts that it consists of.
    """
    table = {"tensors": [asdict(record) for record in records], "base": base_dtypes}
    text = json.dumps(table, separators=(",", ":")).encode()
    stored = {key: torch.cat(each) for key, each in sorted(parts.items())}
    packed = bytearray(zlib.compress(text, 9))
    stored[TABLE] = torch.frombuffer(packed, dtype=torch.uint8)
    save_file(stored, folder / WEIGHTS, metadata={"format": "pt"})
    files = [WEIGHTS, *(f"{FILES}/{file.name}" for file in sorted((folder / FILES).glob("*")))]
    content = {
        "format_version": FORMAT_VERSION,
        **description,
        "sha256": {name: sha256(folder / name) for name in files},
    }
    (folder / DESCRIPTION).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def is_delta(folder: Path) -> bool:
    """Return whether a folder contains the description of a delta."""
    return (folder / DESCRIPTION).is_file()


def read_delta(folder: Path) -> Delta:
    """Read a delta and compare its files with their hashes.

    Raises
    ------
    DeltaError
        If it is missing, changed, damaged, or of another version.
    """
    description = _read_description(folder)
    for name, expected in description["sha256"].items():
        file = listed_file(folder, name)
        if not file.is_file() or sha256(file) != expected:
            state = "has changed since it was written" if file.is_file() else "is missing"
            raise DeltaError(f"{folder}: {name} {state}; {COPY_AGAIN}", code="changed-file")
    try:
        stored = load_file(folder / WEIGHTS)
        table = _read_table(stored.pop(TABLE))
        records = {each["name"]: Record(**each) for each in table["tensors"]}
        if unknown := {record.codec for record in records.values()} - CODECS.keys():
            raise ValueError(f"unknown codec {min(unknown)!r}")
        return Delta(folder, description, records, dict(table["base"]), stored)
    except (SafetensorError, OSError, ValueError, TypeError, KeyError) as error:
        raise DeltaError(
            f"{folder / WEIGHTS}: cannot be read ({str(error)[:200]}); {COPY_AGAIN}"
        ) from error


def _read_table(packed: Tensor) -> Any:
    reader = zlib.decompressobj()
    try:
        text = reader.decompress(packed.numpy().tobytes(), MAX_TABLE_BYTES)
    except zlib.error as error:
        raise ValueError(f"the table is damaged: {error}") from error
    return parse_json(text.decode())


def _read_description(folder: Path) -> dict[str, Any]:
    path = folder / DESCRIPTION
    if not path.is_file():
        raise DeltaError(
            f"{folder}: must be a delta, but has no {DESCRIPTION}; give the folder that `lrc delta "
            "make` wrote"
        )
    try:
        found = parse_json(path.read_text(encoding="utf-8"))
        version = found["format_version"]
        if version != FORMAT_VERSION:
            raise DeltaError(
                f"{path}: format_version must be {FORMAT_VERSION}, got {version!r:.40}; make the "
                "delta again, or use the version of lrc that wrote it",
                code="other-version",
            )
        hashes, base = found["sha256"], found["base"]
        for name in hashes:
            listed_file(folder, name)
        complete = (
            WEIGHTS in hashes
            and {"name", "sha256", "changed_sha256"} <= base.keys()
            and "method" in found["method"]
            and found["sizes"].keys() >= SIZES
        )
        if not complete or found["kind"] not in ("model", "adapter"):
            raise ValueError("keys are missing")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DeltaError(
            f"{path}: not the description of a delta ({error!r:.200}); {COPY_AGAIN}"
        ) from error
    assert isinstance(found, dict)
    return found
