"""Compress the difference between two models, or an adapter, into a folder."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lrc.compressors.checkpoint.companions import copy_companions
from lrc.compressors.deltas.delta_codecs import (
    ENCODERS,
    Encoded,
    decode,
    encode_exact,
    encode_low_rank,
)
from lrc.compressors.deltas.delta_format import FILES, Record, write_delta
from lrc.compressors.deltas.lora_folder import CONFIG, Lora, is_adapter, keys, read_lora
from lrc.compressors.deltas.ranks import adapter_ranks, matrix_ranks, truncated
from lrc.compressors.deltas.weight_files import WeightFiles
from lrc.compressors.deltas.weight_hash import WeightHash, dtype_name
from lrc.compressors.io.fingerprint import sha256
from lrc.compressors.io.machine import OnStep
from lrc.compressors.io.shortened import shortened
from lrc.configs.delta_methods import DeltaMethod, LowRank
from lrc.configs.errors import DeltaError

DENSE_BITS = 16
"""Bits per number with which deltas are compared, whatever the dtype of the tuned model."""


@dataclass(frozen=True)
class TensorReport:
    """Size and error of one tensor of a delta."""

    name: str
    codec: str
    shape: list[int]
    bits: int
    relative_error: float
    """Norm of the error over the norm of the difference."""


@dataclass
class _Collected:
    """Encoded tensors, ready to be written."""

    records: list[Record] = field(default_factory=list)
    parts: dict[str, list[Tensor]] = field(default_factory=dict)
    reports: list[TensorReport] = field(default_factory=list)
    error: float = 0.0
    energy: float = 0.0

    def add(self, name: str, tuned: Tensor, encoded: Encoded, relative_error: float) -> None:
        """Add a tensor."""
        record = Record.of(name, tuned, encoded)
        self.records.append(record)
        for part, key, _ in record.keys:
            self.parts.setdefault(key, []).append(encoded.parts[part])
        shape = list(tuned.shape)
        report = TensorReport(name, encoded.codec, shape, encoded.bits, relative_error)
        self.reports.append(report)

    def measure(self, base: Tensor, tuned: Tensor, decoded: Tensor) -> float:
        """Add the error of a decoded tensor to the totals; return its relative error."""
        error = float((decoded.double() - tuned.double()).square().sum())
        energy = float((tuned.double() - base.double()).square().sum())
        self.error += error
        self.energy += energy
        return (error / energy) ** 0.5 if energy else 0.0


def make_delta(
    base: str, tuned: Path, folder: Path, options: DeltaMethod, on_step: OnStep
) -> dict[str, Any]:
    """Fill an empty folder with the compressed difference between two models.

    Parameters
    ----------
    base : str
        Folder or Hub id of the base model.
    tuned : Path
        Folder of a model with the same tensors, or of a LoRA adapter of PEFT.
    folder : Path
        Existing folder.

    Returns
    -------
    dict
        Kind, method, sizes, and one entry per tensor.

    Raises
    ------
    DeltaError, ModelError, RecipeError
        If the models do not fit each other or the options.
    """
    original = WeightFiles(base)
    files = folder / FILES
    files.mkdir()
    if is_adapter(tuned):
        kind, numbers, base_hash, found = _adapter(original, tuned, files, options, on_step)
    else:
        kind, numbers, base_hash, found = _model(original, tuned, files, options, on_step)
    if not any(files.iterdir()):
        files.rmdir()
    bits = sum(report.bits for report in found.reports)
    sizes = {
        "tensors": len(found.records),
        "numbers": numbers,
        "bits": bits,
        "bits_per_number": bits / numbers,
        "ratio": DENSE_BITS * numbers / bits,
        "relative_error": (found.error / found.energy) ** 0.5,
    }
    description = {
        "kind": kind,
        "method": options.model_dump(mode="json"),
        "base": {"name": base, **base_hash.hashes},
        "sizes": sizes,
    }
    write_delta(folder, description, found.records, found.parts, base_hash.dtypes)
    return description | {"tensors": [asdict(report) for report in found.reports]}


class _BaseHash:
    """Hashes of the weights of a base model: of all, and of those that a delta changes."""

    def __init__(self) -> None:
        self._all, self._changed = WeightHash(), WeightHash()
        self.dtypes: dict[str, str] = {}

    def add(self, name: str, tensor: Tensor, *, changed: bool) -> None:
        self._all.add(name, tensor)
        if changed:
            self._changed.add(name, tensor)
            self.dtypes[name] = dtype_name(tensor.dtype)

    @property
    def hashes(self) -> dict[str, str]:
        return {"sha256": self._all.hexdigest(), "changed_sha256": self._changed.hexdigest()}


_Made = tuple[str, int, _BaseHash, _Collected]


def _model(
    original: WeightFiles, tuned: Path, files: Path, options: DeltaMethod, on_step: OnStep
) -> _Made:
    other = WeightFiles(str(tuned))
    _refuse_other_tensors(original, other)
    ranks: dict[str, int] = {}
    if isinstance(options, LowRank):
        changed = (pair for pair in _pairs(original, other) if _differ(*pair[1:]))
        ranks = matrix_ranks(changed, options)
    found, base_hash, numbers = _Collected(), _BaseHash(), 0
    for done, (name, before, after) in enumerate(_pairs(original, other), 1):
        changed_here = _differ(before, after)
        base_hash.add(name, before, changed=changed_here)
        if changed_here:
            numbers += after.numel()
            encoded = _encode(name, before, after, options, ranks)
            error = found.measure(before, after, decode(encoded, before, after.dtype))
            found.add(name, after, encoded, error)
        on_step("delta", done, len(original.headers))
    if not found.records:
        raise DeltaError(
            f"{tuned}: has the same weights as {original.path}, so that there is no delta; give "
            "the tuned model",
            code="no-difference",
        )
    copy_companions(other.source, files)
    for file in files.iterdir():
        same = original.folder / file.name
        if same.is_file() and sha256(same) == sha256(file):
            file.unlink()
    return "model", numbers, base_hash, found


def _encode(
    name: str, before: Tensor, after: Tensor, options: DeltaMethod, ranks: dict[str, int]
) -> Encoded:
    """Encode a tensor; in full if the method cannot, or if that is smaller."""
    exact = encode_exact(after)
    if not after.is_floating_point():
        return exact
    if not isinstance(options, LowRank):
        encoded = ENCODERS[type(options)](before, after, options)
    elif name in ranks:
        encoded = encode_low_rank(before, after, ranks[name], getattr(torch, options.dtype))
    else:
        return exact
    return encoded if encoded.bits < exact.bits else exact


def _adapter(
    original: WeightFiles, tuned: Path, files: Path, options: DeltaMethod, on_step: OnStep
) -> _Made:
    lora = read_lora(tuned)
    targets = _targets(original, lora)
    for name, tensor in lora.tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise DeltaError(f"{tuned}: {name} contains NaN or Inf; train the adapter again")
    if not any(bool((B.float() @ A.float()).any()) for B, A in map(lora.factors, lora.modules)):
        raise DeltaError(
            f"{tuned}: the adapter is zero, so that there is no delta; give a trained adapter",
            code="no-difference",
        )
    numbers = sum(tensor.numel() for tensor in lora.tensors.values())
    found = _Collected()
    if isinstance(options, LowRank):
        _add_products(found, lora, options, files)
    else:
        for name, tensor in lora.tensors.items():
            zeros = torch.zeros_like(tensor)
            encoded = ENCODERS[type(options)](zeros, tensor, options)
            error = found.measure(zeros, tensor, decode(encoded, zeros, tensor.dtype))
            found.add(name, tensor, encoded, error)
        (files / CONFIG).write_text(lora.config_text, encoding="utf-8")
    base_hash = _BaseHash()
    for done, name in enumerate(sorted(original.headers), 1):
        base_hash.add(name, original.read(name), changed=name in targets)
        on_step("delta", done, len(original.headers))
    return "adapter", numbers, base_hash, found


def _add_products(found: _Collected, lora: Lora, options: LowRank, files: Path) -> None:
    """Add the factors of the products of an adapter, cut to lower ranks."""
    smaller = truncated(lora, adapter_ranks(lora, options))
    for module in lora.modules:
        B, A = (factor.double() for factor in lora.factors(module))
        factors = smaller.factors(module)
        encoded = [encode_exact(factor, getattr(torch, options.dtype)) for factor in factors]
        B_hat, A_hat = (
            decode(each, factor, torch.float64)
            for each, factor in zip(encoded, factors, strict=True)
        )
        # Of the scaled product, to which both factors belong.
        product, shorter = (lora.scaling(module) * each for each in (B @ A, B_hat @ A_hat))
        error = found.measure(torch.zeros_like(product), product, shorter)
        for name, factor, each in zip(reversed(keys(module)), factors, encoded, strict=True):
            found.add(name, factor, each, error)
    (files / CONFIG).write_text(smaller.config_text, encoding="utf-8")


def _pairs(original: WeightFiles, other: WeightFiles) -> Iterator[tuple[str, Tensor, Tensor]]:
    for name in sorted(original.headers):
        yield name, original.read(name), other.read(name)


def _differ(before: Tensor, after: Tensor) -> bool:
    """Return whether two tensors have different values, whatever their dtypes."""
    dtype = torch.promote_types(before.dtype, after.dtype)
    return not torch.equal(before.to(dtype), after.to(dtype))


def _refuse_other_tensors(original: WeightFiles, other: WeightFiles) -> None:
    before, after = original.headers, other.headers
    problems = [f"{name} is missing" for name in sorted(before.keys() - after.keys())]
    problems += [f"{n} is not in the base model" for n in sorted(after.keys() - before.keys())]
    problems += [
        f"{name} is {after[name].shape}, not {before[name].shape}"
        for name in sorted(before.keys() & after.keys())
        if after[name].shape != before[name].shape
    ]
    if problems:
        raise DeltaError(
            f"{other.path}: must have the tensors of {original.path}, got: {shortened(problems)}; "
            "give the base model that it was tuned from, and load and save both with the same "
            "version of transformers if only names differ",
            code="tensor-mismatch",
        )


def _targets(original: WeightFiles, lora: Lora) -> set[str]:
    """Return the matrices of the base to which an adapter is added."""
    problems = []
    for module in lora.modules:
        B, A = lora.factors(module)
        shape, header = [len(B), A.shape[1]], original.headers.get(f"{module}.weight")
        if header is None:
            problems.append(f"{module}.weight is missing")
        elif header.shape != shape:
            problems.append(f"{module}.weight is {header.shape}, not {shape}")
    if problems:
        raise DeltaError(
            f"{original.path}: must be the model that the adapter {lora.folder} belongs to: "
            f"{shortened(problems)}; give its base model "
            f"({lora.config.get('base_model_name_or_path')})",
            code="tensor-mismatch",
        )
    return {f"{module}.weight" for module in lora.modules}
