"""Check the tables of a checkpoint's config that describe how its model differs from it."""

from collections.abc import Callable, Mapping
from typing import Any

from lrc.compressors.checkpoint.format import EDITED, ELASTIC, PARENT
from lrc.compressors.layers.model_shapes import SHAPES
from lrc.compressors.layers.residual_basis import BIASES, NORMS
from lrc.configs.errors import CheckpointError


def check_tables(tables: Mapping[str, Any], where: str) -> None:
    """Reject tables that this version cannot have written.

    Parameters
    ----------
    tables : mapping
        A ``quantization_config``.

    Raises
    ------
    CheckpointError
    """
    unknown = sorted(map(str, tables.keys() - {*RULES, *OTHER_KEYS}))
    if unknown:
        raise CheckpointError(
            f"{where}: has the unknown key {unknown[0]!r}; a newer lrc wrote it: upgrade lrc, or "
            f"{EDITED}",
            code="invalid-config",
        )
    for key, (contents, check, rule) in RULES.items():
        table = tables.get(key)
        if table is None:
            continue
        if not isinstance(table, list if key == BIASES else Mapping):
            raise CheckpointError(f"{where}: {key} must {contents}, got {table!r:.60}; {EDITED}")
        entries = table.items() if isinstance(table, Mapping) else enumerate(table)
        for name, entry in entries:
            if not check(entry):
                raise CheckpointError(
                    f"{where}: {key}[{name!r}] must be {rule}, got {entry!r:.60}; {EDITED}"
                )


def _is_shape(entry: Any) -> bool:
    return isinstance(entry, list | tuple) and len(entry) == 2 and all(map(_is_size, entry))


def _is_shortcut(entry: Any) -> bool:
    if not isinstance(entry, Mapping) or not entry:
        return entry == {}
    return isinstance(entry.get("writer"), str) and _is_size(entry.get("rank"))


def _is_size(number: Any) -> bool:
    return type(number) is int and number >= 1


OTHER_KEYS = ("quant_method", "format_version", "modules", ELASTIC, PARENT)
RULES: dict[str, tuple[str, Callable[[Any], bool], str]] = {
    SHAPES: (
        "map names of linear layers to [d_out, d_in]",
        _is_shape,
        "[d_out, d_in], whole numbers >= 1",
    ),
    BIASES: (
        "be a list of names of linear layers",
        lambda entry: isinstance(entry, str),
        "the name of a linear layer",
    ),
    NORMS: (
        "map names of norms to their shortcuts",
        _is_shortcut,
        "{} or {'writer': NAME, 'rank': N >= 1}",
    ),
}
"""Key -> what the table must contain, the check of an entry, and what an entry must be."""
