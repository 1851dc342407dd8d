"""The tables of a checkpoint's config that say how its model differs from the config: checked."""

from collections.abc import Callable, Mapping
from typing import Any

from lrc.compressors.checkpoint.format import COPY_AGAIN
from lrc.compressors.layers.model_shapes import SHAPES
from lrc.compressors.layers.residual_basis import BIASES, NORMS
from lrc.configs.errors import CheckpointError


def check_tables(tables: Mapping[str, Any], where: str) -> None:
    """Refuse tables that this version cannot have written.

    Parameters
    ----------
    tables : mapping
        A ``quantization_config``; what is no table of these is passed over.

    Raises
    ------
    CheckpointError
    """
    for key, (check, rule) in RULES.items():
        table = tables.get(key)
        if table is None:
            continue
        if not isinstance(table, list if key == BIASES else Mapping):
            raise CheckpointError(
                f"{where}: {key} {WORDS[key]}, got {table!r:.60}; the file was edited: {COPY_AGAIN}"
            )
        entries = table.items() if isinstance(table, Mapping) else enumerate(table)
        for name, entry in entries:
            if not check(entry):
                raise CheckpointError(
                    f"{where}: {key}[{name!r}] must be {rule}, got {entry!r:.60}; the file was "
                    f"edited: {COPY_AGAIN}"
                )


def _is_shape(entry: Any) -> bool:
    return isinstance(entry, list | tuple) and len(entry) == 2 and all(map(_is_size, entry))


def _is_shortcut(entry: Any) -> bool:
    if not isinstance(entry, Mapping) or not entry:
        return entry == {}
    return isinstance(entry.get("writer"), str) and _is_size(entry.get("rank"))


def _is_size(number: Any) -> bool:
    return type(number) is int and number >= 1


RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    SHAPES: (_is_shape, "[d_out, d_in], whole numbers >= 1"),
    BIASES: (lambda entry: isinstance(entry, str), "the name of a linear"),
    NORMS: (_is_shortcut, "{} or {'writer': NAME, 'rank': N >= 1}"),
}
WORDS = {
    SHAPES: "must map names of linears to [d_out, d_in]",
    BIASES: "must be a list of names of linears",
    NORMS: "must map names of norms to their shortcuts",
}
