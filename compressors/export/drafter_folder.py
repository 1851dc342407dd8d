"""Write a checkpoint without the embedding and output head that it shares with its parent."""

import json
import shutil
from collections.abc import Callable
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig

from lrc.compressors.checkpoint import format as layout
from lrc.compressors.checkpoint.manifest import UNLISTED, write_manifest
from lrc.compressors.checkpoint.parent_weights import (
    PARENT_MODEL,
    ParentWeights,
    hash_of,
    read_tensors,
)
from lrc.compressors.checkpoint.plain import plain_name
from lrc.compressors.checkpoint.reader import Contents, check_checkpoint, load_tokenizer
from lrc.compressors.checkpoint.writer import INDEX, write_weights
from lrc.compressors.io.machine import OnStep
from lrc.compressors.io.shards import Header
from lrc.compressors.io.weight_hash import dtype_name
from lrc.compressors.layers import sentinel
from lrc.compressors.layers.model_shapes import SHAPES
from lrc.compressors.models import source as models
from lrc.compressors.models.model_kinds import kind_of
from lrc.compressors.models.same_tokens import Tokens, why_no_drafter
from lrc.configs.errors import ExportError, Problem, UsageError
from lrc.configs.recipe import Model


def write_drafter(folder: Path, parent: str, out: Path, on_step: OnStep) -> list[str]:
    """Fill an empty folder with a checkpoint that reads its embedding and head from its parent.

    Only weights with exactly the values of the parent, in the dtype of the checkpoint, are left
    out. A plain checkpoint or slice is written in the format of lrc, because transformers alone
    does not know where its embedding is.

    Parameters
    ----------
    folder, out : Path
    parent : str
        Folder of safetensors, or Hub id.

    Returns
    -------
    list of str
        Modules whose weights are those of the parent.

    Raises
    ------
    CheckpointError, ModelError, RecipeError
        If a model is not there, or damaged.
    UsageError
        If the tokens of the models differ.
    ExportError
        If nothing can be shared.
    """
    contents = check_checkpoint(folder)
    if contents.kind.padded:
        what = "encoder" if contents.kind.encoder else "encoder-decoder model"
        raise ExportError(
            f"{folder}: --format drafter is for causal language models, got an {what}; export it "
            "with --format dense or remote-code"
        )
    block = contents.config.get("quantization_config") or {}
    if layout.PARENT in block or (block and not (contents.needs_lrc or contents.modules)):
        raise ExportError(
            f"{folder}: must be a checkpoint that lrc wrote or a dense model, with its own "
            "embedding, got one that "
            + ("shares it already" if layout.PARENT in block else "another tool has compressed")
            + "; give the folder OUTPUT/checkpoint of a run"
        )
    source = models.locate(Model(path=parent))
    _check_tokens(folder, parent, source)
    weights = _shared(folder, contents, parent, source)
    meta, read = _tensors(contents, {f"{name}.weight" for name in weights.tensors})
    done = count(1)

    def next_tensor(name: str) -> Tensor:
        on_step("export", next(done), len(meta))
        return read[name]()

    write_weights(out, meta, next_tensor)
    _write_config(out, contents, weights, parent)
    _copy_files(folder, out, contents)
    return [*weights.tensors]


def _check_tokens(folder: Path, parent: str, source: models.Source) -> None:
    """Reject a parent with other tokens, even if its embedding has the same values."""
    config = AutoConfig.from_pretrained(folder)
    tokens = (
        Tokens.of(source.config, models.load_tokenizer(source)),
        Tokens.of(config, load_tokenizer(folder)),
    )
    if (why := why_no_drafter(str(folder), parent, tokens)) is not None:
        text = f"{why}; give the model that {folder} was compressed from, with its tokenizer"
        raise UsageError([Problem("other-tokenizer", "--parent", text)])


def _shared(folder: Path, contents: Contents, parent: str, source: models.Source) -> ParentWeights:
    """Return the modules of a checkpoint whose weights are those of its parent."""
    own, other = _ends(AutoConfig.from_pretrained(folder)), _ends(source.config)
    tied = bool(getattr(source.config.get_text_config(), "tie_word_embeddings", False))
    shapes = (contents.config.get("quantization_config") or {}).get(SHAPES, {})
    why, tensors, found = [], {}, {}
    for module, theirs in zip(own, other, strict=True):
        name = f"{module}.weight"
        if module in contents.modules:
            why.append(f"{module} is stored as integers: compress without 'embeddings'")
            continue
        if name not in contents.headers:
            continue  # tied to the embedding
        tensor = f"{other[0] if tied else theirs}.weight"
        weight = _read(contents.headers[name], name)
        (expected,) = read_tensors(parent, {module: tensor}, weight.dtype).values()
        if module not in shapes and torch.equal(weight, expected):
            tensors[module], found[module] = tensor, weight
        else:
            why.append(
                f"{module} has other values: it was sliced or trained, or has another parent"
            )
    dtypes = {weight.dtype for weight in found.values()}
    if len(dtypes) != 1:
        reasons = "; ".join(why) or f"no {own[0]}.weight is stored"
        raise ExportError(f"{folder}: has nothing in common with {parent} to share ({reasons})")
    return ParentWeights(tensors, dtype_name(dtypes.pop()), hash_of(found))


def _ends(config: Any) -> list[str]:
    """Return the names of the embedding and the output head of a model."""
    with init_empty_weights():
        model = kind_of(config).auto_class.from_config(config)
    names = {id(module): name for name, module in model.named_modules()}
    return [names[id(end)] for end in (model.get_input_embeddings(), model.get_output_embeddings())]


def _tensors(
    contents: Contents, left_out: set[str]
) -> tuple[dict[str, Tensor], dict[str, Callable[[], Tensor]]]:
    """Return the tensors of the new checkpoint on the meta device, and functions that read them."""
    meta: dict[str, Tensor] = {}
    read: dict[str, Callable[[], Tensor]] = {}
    renamed = {}
    if not contents.needs_lrc:
        for name, config in contents.modules.items():
            for stored in layout.expected_tensors(name, config, bias=False):
                renamed[plain_name(stored)] = stored
            meta[f"{name}.weight"] = sentinel().to("meta")
            read[f"{name}.weight"] = sentinel
    for name, header in contents.headers.items():
        if name in left_out:
            continue
        final = renamed.get(name, name)
        with safe_open(header.file, framework="pt") as file:
            found: Tensor = file.get_slice(name)[:0] if header.shape else file.get_tensor(name)
        meta[final] = torch.empty(list(header.shape), dtype=found.dtype, device="meta")
        read[final] = partial(_read, header, name)
    return meta, read


def _read(header: Header, name: str) -> Tensor:
    with safe_open(header.file, framework="pt") as file:
        tensor: Tensor = file.get_tensor(name)
    return tensor


def _write_config(out: Path, contents: Contents, weights: ParentWeights, parent: str) -> None:
    block = contents.config.get("quantization_config") or {}
    if not contents.needs_lrc:
        modules = {name: config.to_json() for name, config in contents.modules.items()}
        block = {
            "quant_method": layout.QUANT_METHOD,
            "format_version": layout.FORMAT_VERSION,
            "modules": modules,
        }
    place = Path(parent).expanduser()
    config = {
        **contents.config,
        "quantization_config": {**block, layout.PARENT: weights.to_json()},
        PARENT_MODEL: str(place.resolve()) if place.is_dir() else parent,
    }
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    (out / "config.json").write_text(text, encoding="utf-8")


def _copy_files(folder: Path, out: Path, contents: Contents) -> None:
    """Copy tokenizer, recipe and plan; not the report, which belongs to the original hashes."""
    manifest = contents.manifest
    names = [file.name for file in folder.iterdir() if file.is_file()]
    if manifest is not None:
        names = [*manifest.hashes]
    for name in names:
        left_out = name in ("config.json", INDEX, *UNLISTED)
        if not left_out and not name.endswith(".safetensors"):
            (out / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(folder / name, out / name)
    if manifest is not None:
        write_manifest(out, plain=False)
