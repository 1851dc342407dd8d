"""The names and the version of what is written; one place, read by writer and loader alike.

A compressed checkpoint is the folder that `save_pretrained` would leave: safetensors shards,
`config.json` of the original architecture, tokenizer. What is ours:

* ``config.json: quantization_config`` = ``{"quant_method": "lrc", "format_version": 1,
  "modules": {NAME: {"form": "low_rank", "rank": R}}}``;
* for a ``low_rank`` module the tensors ``NAME.a.weight`` [rank, d_in], ``NAME.b.weight``
  [d_out, rank], ``NAME.b.bias`` where the dense layer had a bias, and ``NAME.weight``, a sentinel
  of one uint8 that makes loaders without lrc stop instead of starting from random weights;
* the folder ``lrc/``: the recipe as given and written out, the executed plan, the report, and
  ``manifest.json`` with the SHA-256 of every other file.
"""

from collections.abc import Mapping
from typing import Any

from lrc.configs.errors import CheckpointError

QUANT_METHOD = "lrc"
FORMAT_VERSION = 1
AGAIN = "copy or download the checkpoint again, or compress again"
FOLDER = "lrc"
RECIPE, RECIPE_GIVEN, PLAN, REPORT, MANIFEST = (
    f"{FOLDER}/recipe.yaml",
    f"{FOLDER}/recipe.given.yaml",
    f"{FOLDER}/plan.json",
    f"{FOLDER}/report.json",
    f"{FOLDER}/manifest.json",
)


def low_rank_shapes(
    name: str, d_out: int, d_in: int, rank: int, *, bias: bool
) -> dict[str, list[int]]:
    """Return tensor name -> shape of one ``low_rank`` module, as the file holds them."""
    shapes = {
        f"{name}.weight": [1],
        f"{name}.a.weight": [rank, d_in],
        f"{name}.b.weight": [d_out, rank],
    }
    if bias:
        shapes[f"{name}.b.bias"] = [d_out]
    return shapes


def check_version(version: Any, where: str) -> None:
    """Refuse a checkpoint that was written by a later lrc.

    Raises
    ------
    CheckpointError
        If `version` is not a whole number, or above `FORMAT_VERSION`.
    """
    if version is True or not isinstance(version, int) or version < 1:
        raise CheckpointError(
            f"{where}: format_version must be a whole number in [1, {FORMAT_VERSION}], got "
            f"{version!r}; the file was edited: copy or download the checkpoint again"
        )
    if version > FORMAT_VERSION:
        raise CheckpointError(
            f"{where}: format_version is {version}, this lrc reads up to {FORMAT_VERSION}; the "
            "checkpoint was written by a newer lrc: upgrade lrc to read it"
        )


def check_modules(modules: Any, where: str) -> None:
    """Refuse a module table that this version cannot have written."""
    if not isinstance(modules, Mapping):
        raise CheckpointError(
            f"{where}: modules must map names to forms, got {modules!r:.60}; the file was edited: "
            "copy or download the checkpoint again"
        )
    for name, spec in modules.items():
        rank = spec.get("rank") if isinstance(spec, Mapping) else None
        if (
            not isinstance(spec, Mapping)
            or spec.get("form") != "low_rank"
            or not isinstance(rank, int)
            or rank < 1
        ):
            raise CheckpointError(
                f"{where}: modules[{name!r}] must be {{'form': 'low_rank', 'rank': N >= 1}}, "
                f"got {spec!r}; the file was edited: copy or download the checkpoint again"
            )
