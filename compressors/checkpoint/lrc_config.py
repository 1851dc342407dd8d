"""The part of config.json that describes a compressed checkpoint, as transformers reads it."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from transformers.utils.quantization_config import QuantizationConfigMixin

from lrc.compressors.checkpoint import format as layout
from lrc.compressors.checkpoint.config_tables import check_tables
from lrc.compressors.checkpoint.elastic_budgets import parse_budgets
from lrc.compressors.checkpoint.model_tables import MODULES
from lrc.compressors.checkpoint.parent_weights import ParentWeights
from lrc.compressors.layers.model_shapes import TABLES
from lrc.configs.errors import CheckpointError

BLOCK = "config.json: quantization_config"


class LrcConfig(QuantizationConfigMixin):  # type: ignore[no-untyped-call, misc, unused-ignore]
    """The `quantization_config` block of a compressed checkpoint.

    Parameters
    ----------
    modules : dict
        Name of a layer or embedding -> its `WeightConfig` as JSON.
    format_version : int
    elastic : dict, optional
        Budgets that the checkpoint can be cut to, see `parse_budgets`.
    parent : dict, optional
        What the checkpoint reads from its parent, see `ParentWeights`.
    **tables
        How a sliced model differs from its architecture: shapes of resized modules, added biases,
        and norms, see `TABLES`.
    """

    def __init__(
        self,
        modules: dict[str, dict[str, Any]] | None = None,
        format_version: int = layout.FORMAT_VERSION,
        elastic: dict[str, Any] | None = None,
        parent: dict[str, Any] | None = None,
        **tables: Any,
    ) -> None:
        self.quant_method = layout.QUANT_METHOD  # type: ignore[assignment]  # an out-of-tree name
        self.format_version = format_version
        layout.check_version(format_version, BLOCK)
        parsed = layout.parse_modules(modules or {}, BLOCK)
        check_tables(tables, BLOCK)
        if parse_budgets(elastic, parsed, BLOCK):
            self.elastic = elastic  # not set otherwise, so that it is not saved
        if ParentWeights.parse(parent, BLOCK) is not None:
            self.parent = parent
        self.tables = {MODULES: modules or {}, **tables}

    @property
    def budgets(self) -> tuple[float, ...]:
        """The budgets that the checkpoint can be cut to, the stored one first."""
        return tuple(vars(self).get(layout.ELASTIC, {}).get("budgets", ()))

    @property
    def tables(self) -> dict[str, Any]:
        """The tables `modules`, and those of a sliced model that are not empty."""
        return {key: table for key, table in vars(self).items() if key in (MODULES, *TABLES)}

    @tables.setter
    def tables(self, tables: Mapping[str, Any]) -> None:
        for key in (MODULES, *TABLES):  # empty ones are not set, so that they are not saved either
            vars(self).pop(key, None)
            if tables.get(key) or key == MODULES:
                setattr(self, key, tables[key])


@contextmanager
def edited_config(where: str) -> Iterator[None]:
    """Convert a ValueError about a part of the config to a CheckpointError."""
    try:
        yield
    except ValueError as error:
        raise CheckpointError(
            f"{where}: {error}; the config was edited, or belongs to another model"
        ) from error
