"""Load a checkpoint from a local folder, compressed or dense, and report what is wrong with it."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import AutoTokenizer

from lrc.compressors.checkpoint import format as layout
from lrc.compressors.checkpoint.config_tables import check_tables
from lrc.compressors.checkpoint.elastic_budgets import parse_budgets
from lrc.compressors.checkpoint.format import COPY_AGAIN
from lrc.compressors.checkpoint.manifest import Manifest, read_manifest, read_object
from lrc.compressors.checkpoint.plain import plain_name, read_plain
from lrc.compressors.checkpoint.tensor_checks import check_values
from lrc.compressors.io.shards import Header, read_folder
from lrc.compressors.io.shortened import shortened
from lrc.compressors.layers import TensorSpecs, WeightConfig
from lrc.compressors.layers.model_shapes import SHAPES
from lrc.compressors.models.configuration import check_code, tokenizer_needs_code
from lrc.compressors.models.model_kinds import ModelKind, kind_of
from lrc.compressors.models.tokenizer_files import why_no_tokenizer
from lrc.configs.errors import CheckpointError


def load_checkpoint(
    folder: Path,
    *,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    trust_remote_code: bool = False,
) -> Any:
    """Load a causal language model or an encoder from a local folder.

    Parameters
    ----------
    folder : Path
        A compressed checkpoint, or any folder that `save_pretrained` wrote.
    dtype : torch.dtype, optional
        Precision to run in; the stored one if left out.
    trust_remote_code : bool
        Whether to run the Python code of the checkpoint, if it has any.

    Raises
    ------
    CheckpointError
        Missing, truncated or changed files, or a newer format.
    ModelError
        If the model needs its own code, which is not trusted.
    """
    contents = read_contents(folder)
    check_code(contents.config, folder, trusted=trust_remote_code)
    # `LrcQuantizer` checks hashes and values of checkpoints in lrc's format.
    manifest = None if contents.needs_lrc else contents.manifest
    wait_for_hashes = manifest.start_check() if manifest else lambda: None
    try:
        with _without_bars():
            found: Any = contents.kind.auto_class.from_pretrained(
                folder,
                dtype=dtype or "auto",
                device_map=device,
                use_safetensors=True,
                trust_remote_code=trust_remote_code,
                output_loading_info=True,
            )
        model, loading = found
        if manifest:
            check_values(model)
    except CheckpointError as error:  # from functions that do not know the folder
        text = str(error).removeprefix(f"{folder}: ")
        raise CheckpointError(f"{folder}: {text}", code=error.code) from error
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # transformers raises nearly anything for damaged files
        wait_for_hashes()
        lines = str(error).strip().splitlines() or [repr(error)]
        raise CheckpointError(
            f"{folder}: cannot be loaded ({lines[0][:200]}); {COPY_AGAIN}"
        ) from error
    wait_for_hashes()
    missing, unused = sorted(loading["missing_keys"]), sorted(loading["unexpected_keys"])
    if missing:  # transformers has initialized them with random numbers
        names = shortened(missing, ", ")
        raise CheckpointError(f"{folder}: the weights lack {names}; {COPY_AGAIN}")
    if unused and (contents.needs_lrc or manifest):  # a table that says where they belong is lost
        raise CheckpointError(
            f"{folder}: the model has no place for {shortened(unused, ', ')}; {COPY_AGAIN}",
            code="tensor-mismatch",
        )
    model = model.eval()
    if hasattr(model, "ct_decompress_hook"):
        # compressed-tensors decompresses weights at the first call of the whole model; calls of
        # its modules need them too.
        with torch.no_grad(), _without_bars():
            model(torch.zeros(1, 1, dtype=torch.long, device=model.device))
    return model


@contextmanager
def _without_bars() -> Iterator[None]:
    """Disable progress bars, including those of compressed-tensors, which have no option."""
    drawn = tqdm.__init__

    def never(self: Any, *arguments: Any, **options: Any) -> None:
        drawn(self, *arguments, **{**options, "disable": True})

    tqdm.__init__ = never
    try:
        yield
    finally:
        tqdm.__init__ = drawn


def load_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """Load the tokenizer of a checkpoint; for the code of one, see `load_checkpoint`.

    Raises
    ------
    CheckpointError
    ModelError
        If it needs its own code, which is not trusted.
    """
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers raises nearly anything here
        if (needed := tokenizer_needs_code(error, folder)) is not None:
            raise needed from error
        raise CheckpointError(
            f"{folder}: no tokenizer could be loaded ({why_no_tokenizer(folder, error)}); copy the "
            "checkpoint again, with tokenizer.json"
        ) from error


@dataclass(frozen=True)
class Contents:
    """What config.json, the manifest and the headers of a folder say; they agree."""

    config: dict[str, Any]
    headers: dict[str, Header]
    manifest: Manifest | None
    modules: dict[str, WeightConfig]
    """Compressed layers; empty for a dense model, or one that another tool compressed."""
    needs_lrc: bool
    """Whether the format is that of lrc, so that loading calls `LrcQuantizer`."""

    @property
    def kind(self) -> ModelKind:
        """What the model computes."""
        return kind_of(self.config)

    def stored_tensors(self) -> TensorSpecs:
        """Return the tensors of compressed layers by their names in the file."""
        found: TensorSpecs = {}
        for name, config in self.modules.items():
            specs = layout.expected_tensors(name, config, bias=f"{name}.bias" in self.headers)
            if not self.needs_lrc:
                del specs[f"{name}.weight"]  # a plain checkpoint has no sentinels
                specs = {plain_name(tensor): spec for tensor, spec in specs.items()}
            found |= specs
        return found


def check_checkpoint(folder: Path) -> Contents:
    """Check everything about a checkpoint that does not require loading the model.

    Raises
    ------
    CheckpointError
    """
    contents = read_contents(folder)
    if contents.manifest is not None:
        contents.manifest.start_check()()
    return contents


def read_contents(folder: Path) -> Contents:
    """Read the tables and headers of a folder and compare them with each other.

    Raises
    ------
    CheckpointError
        Missing, truncated, contradictory or unlisted files, or a newer format.
    """
    config, manifest = read_config(folder), read_manifest(folder)
    headers = check_files(folder)
    block, path = config.get("quantization_config"), folder / "config.json"
    needs_lrc = is_ours(config)
    modules: dict[str, WeightConfig] = {}
    if needs_lrc:
        assert block is not None
        modules = layout.parse_modules(block.get("modules", {}), str(path))
        loaded = {header.file for header in headers.values()}
        if unlisted := sorted({*folder.glob("*.safetensors")} - loaded):
            raise CheckpointError(
                f"{unlisted[0]}: is not a file of this checkpoint, and loaders may read it; "
                f"remove it, or {COPY_AGAIN}",
                code="unlisted-file",
            )
    elif manifest is not None and block:
        modules = read_plain(folder, block, headers)
    if manifest is not None:
        manifest.check_names(loaded_only=True)
    contents = Contents(config, headers, manifest, modules, needs_lrc)
    try:
        expected = contents.stored_tensors()
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}; {layout.EDITED}", code="invalid-config") from None
    shapes = block[SHAPES] if needs_lrc and block and SHAPES in block else {}
    expected |= layout.resized_tensors({n: shapes[n] for n in shapes if n not in modules})
    if wrong := layout.mismatches(expected, headers):
        raise CheckpointError(
            f"{folder}: the tensors do not match config.json: {shortened(wrong)}; {COPY_AGAIN}",
            code="tensor-mismatch",
        )
    return contents


def stored_dtype(contents: Contents) -> torch.dtype:
    """Return the precision in which a checkpoint runs unless another one is requested."""
    name = contents.config.get("dtype") or contents.config.get("torch_dtype")
    found = getattr(torch, str(name), None)
    return found if isinstance(found, torch.dtype) else torch.float32


def is_ours(config: Mapping[str, Any]) -> bool:
    """Return whether a ``config.json`` has a block in lrc's format."""
    block = config.get("quantization_config")
    return isinstance(block, Mapping) and block.get("quant_method") == layout.QUANT_METHOD


def read_config(folder: Path) -> dict[str, Any]:
    """Read ``config.json`` of a checkpoint and check its block of lrc, if there is one.

    Raises
    ------
    CheckpointError
    """
    path = folder / "config.json"
    if not path.is_file():
        what = "no checkpoint here (no config.json)" if folder.is_dir() else "no such folder"
        raise CheckpointError(
            f"{folder}: {what}; the checkpoint of a run is its folder OUTPUT/checkpoint"
        )
    config = read_object(path, finite=False)
    where = f"{path}: quantization_config"
    manifest = read_manifest(folder)
    block: Any = config.get("quantization_config")
    if is_ours(config):
        read_object(path)
        layout.check_version(block.get("format_version"), where)
        modules = layout.parse_modules(block.get("modules", {}), where)
        check_tables(block, where)
        parse_budgets(block.get(layout.ELASTIC), modules, where)
    elif manifest is not None and not manifest.plain:
        raise CheckpointError(
            f"{path}: has lost its quantization_config, which names the matrices; {COPY_AGAIN}"
        )
    names = config.get("architectures")
    if names and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise CheckpointError(
            f"{path}: architectures must be a list of class names, got {names!r:.80}; {COPY_AGAIN}"
        )
    if block is not None and not isinstance(block, dict):
        raise CheckpointError(f"{where} must be an object, got {block!r:.80}; {COPY_AGAIN}")
    return config


def check_files(folder: Path) -> dict[str, Header]:
    """Read the header of every shard; return tensor name -> header.

    Raises
    ------
    CheckpointError
        If a file is truncated or a shard named by the index is missing.
    """
    try:
        headers = read_folder(folder)
    except ValueError as error:
        raise CheckpointError(f"{error}; {COPY_AGAIN}") from error
    if not headers:
        raise CheckpointError(
            f"{folder}: holds no weights as safetensors, the only supported format; {COPY_AGAIN}"
        )
    return headers


def missing_files(folder: Path) -> list[str]:
    """Return the files that the manifest of a checkpoint names but its folder lacks.

    Raises
    ------
    CheckpointError
        If the manifest cannot be read or a weight file is truncated.
    """
    manifest = read_manifest(folder)
    check_files(folder)
    if manifest is None:
        return [layout.MANIFEST]
    return [name for name in manifest.hashes if not (folder / name).is_file()]
