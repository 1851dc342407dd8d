"""Compress the difference between two models, or an adapter, into a folder."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from lrc.compressors.checkpoint.companions import copy_companions
from lrc.compressors.checkpoint.writer import write_weights
from lrc.compressors.deltas.adapter_delta import encode_adapter
from lrc.compressors.deltas.calibrated_moments import (
    Moments,
    MomentsOf,
    collected_moments,
    no_moments,
)
from lrc.compressors.deltas.delta_codecs import (
    ENCODERS,
    Encoded,
    add,
    decode,
    encode_exact,
    encode_low_rank,
)
from lrc.compressors.deltas.delta_format import FILES, write_delta
from lrc.compressors.deltas.encoded_tensors import EncodedTensors
from lrc.compressors.deltas.lora_folder import CONFIG, Lora, is_adapter, read_lora
from lrc.compressors.deltas.ranks import matrix_ranks
from lrc.compressors.deltas.weight_files import WeightFiles
from lrc.compressors.io.fingerprint import sha256
from lrc.compressors.io.finite import all_finite
from lrc.compressors.io.machine import Machine
from lrc.compressors.io.shortened import shortened
from lrc.compressors.io.weight_hash import WeightHash, dtype_name
from lrc.compressors.models.source import Source, locate
from lrc.configs.delta_methods import DeltaMethod, LowRank
from lrc.configs.errors import DeltaError
from lrc.configs.recipe import Model


def make_delta(
    base: str, tuned: Path, folder: Path, options: DeltaMethod, machine: Machine | None = None
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
    options : DeltaMethod
    machine : Machine, optional
        Its device is used for calibration.

    Returns
    -------
    dict
        Kind, method, sizes, and one entry per tensor.

    Raises
    ------
    DeltaError, ModelError, RecipeError
        If the models do not fit each other or the options.
    """
    machine = machine or Machine()
    original = WeightFiles(base)
    files = folder / FILES
    files.mkdir()
    if is_adapter(tuned):
        kind, numbers, base_hash, found = _adapter(original, tuned, files, options, machine)
    else:
        kind, numbers, base_hash, found = _model(original, tuned, files, options, machine)
    if not any(files.iterdir()):
        files.rmdir()
    sizes = found.sizes(numbers)
    description = {
        "kind": kind,
        "method": options.model_dump(mode="json"),
        "base": {"name": base, **base_hash.hashes},
        "sizes": sizes,
    }
    write_delta(folder, description, found.records, found.parts, base_hash.dtypes)
    return description | {"tensors": found.to_json()}


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


_Made = tuple[str, int, _BaseHash, EncodedTensors]


def _model(
    original: WeightFiles, tuned: Path, files: Path, options: DeltaMethod, machine: Machine
) -> _Made:
    other = WeightFiles(str(tuned))
    _refuse_other_tensors(original, other)
    if not any(_differ(*pair) for _, *pair in _pairs(original, other)):
        raise DeltaError(
            f"{tuned}: has the same weights as {original.path}, so that there is no delta; give "
            "the tuned model",
            code="no-difference",
        )
    ranks: dict[str, int] = {}
    found, base_hash, numbers = EncodedTensors(), _BaseHash(), 0
    with tuned_moments(options, original, other.source, files, machine) as moments:
        if isinstance(options, LowRank):
            changed = (pair for pair in _pairs(original, other) if _differ(*pair[1:]))
            ranks = matrix_ranks(changed, options, moments)
        for done, (name, before, after) in enumerate(_pairs(original, other), 1):
            changed_here = _differ(before, after)
            base_hash.add(name, before, changed=changed_here)
            if changed_here:
                numbers += after.numel()
                metric = moments(name)
                encoded = _encode(name, before, after, options, ranks, metric)
                decoded = decode(encoded, before, after.dtype)
                found.add(name, after, encoded, found.measure(before, after, decoded, metric))
            machine.on_step("delta", done, len(original.headers))
    copy_companions(other.source, files)
    for file in files.iterdir():
        same = original.folder / file.name
        if same.is_file() and sha256(same) == sha256(file):
            file.unlink()
    return "model", numbers, base_hash, found


def _encode(
    name: str,
    before: Tensor,
    after: Tensor,
    options: DeltaMethod,
    ranks: dict[str, int],
    metric: Moments,
) -> Encoded:
    """Encode a tensor; in full if the method cannot, or if that is smaller."""
    exact = encode_exact(after)
    if not after.is_floating_point():
        return exact
    if not isinstance(options, LowRank):
        encoded = ENCODERS[type(options)](before, after, options)
    elif name in ranks:
        dtype = getattr(torch, options.dtype)
        encoded = encode_low_rank(before, after, ranks[name], dtype, metric.spectrum)
    else:
        return exact
    return encoded if encoded.bits < exact.bits else exact


def _adapter(
    original: WeightFiles, tuned: Path, files: Path, options: DeltaMethod, machine: Machine
) -> _Made:
    lora = read_lora(tuned)
    targets = _targets(original, lora)
    for name, tensor in lora.tensors.items():
        if not all_finite(tensor):
            raise DeltaError(f"{tuned}: {name} contains NaN or Inf; train the adapter again")
    if not any(bool((B.float() @ A.float()).any()) for B, A in map(lora.factors, lora.modules)):
        raise DeltaError(
            f"{tuned}: the adapter is zero, so that there is no delta; give a trained adapter",
            code="no-difference",
        )
    numbers = sum(tensor.numel() for tensor in lora.tensors.values())
    with TemporaryDirectory(prefix="merged-", dir=files) as merged:
        source = original.source
        if isinstance(options, LowRank) and options.calibration is not None:
            source = _merge(original, lora, Path(merged))
        with tuned_moments(options, original, source, files, machine) as moments:
            smaller, found = encode_adapter(lora, options, moments)
    (files / CONFIG).write_text(smaller.config_text, encoding="utf-8")
    base_hash = _BaseHash()
    for done, name in enumerate(sorted(original.headers), 1):
        base_hash.add(name, original.read(name), changed=name in targets)
        machine.on_step("delta", done, len(original.headers))
    return "adapter", numbers, base_hash, found


@contextmanager
def tuned_moments(
    options: DeltaMethod, original: WeightFiles, tuned: Source, folder: Path, machine: Machine
) -> Iterator[MomentsOf]:
    """Calibrate the tuned model if the options require it; see `collected_moments`."""
    if not isinstance(options, LowRank) or options.calibration is None:
        yield no_moments
        return
    with collected_moments(
        tuned,
        options.calibration,
        folder,
        machine,
        gradients=options.gradients,
        base=original.source,
        names=original.headers,
    ) as moments:
        yield moments


def _merge(original: WeightFiles, lora: Lora, folder: Path) -> Source:
    """Write the base model with an adapter added to its weights."""
    modules = {f"{module}.weight": module for module in lora.modules}
    dtypes = {name: original.read(name).dtype for name in original.headers}
    meta = {
        name: torch.empty(header.shape, dtype=dtypes[name], device="meta")
        for name, header in original.headers.items()
    }

    def read(name: str) -> Tensor:
        tensor = original.read(name)
        return add(tensor, lora.change(modules[name]), tensor.dtype) if name in modules else tensor

    write_weights(folder, meta, read)
    copy_companions(original.source, folder)
    return locate(Model(path=str(folder)))


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
        name = lora.config.get("base_model_name_or_path")
        raise DeltaError(
            f"{original.path}: must be the model that the adapter {lora.folder} belongs to: "
            f"{shortened(problems)}; give its base model{f' ({name})' if name else ''}",
            code="tensor-mismatch",
        )
    return {f"{module}.weight" for module in lora.modules}
