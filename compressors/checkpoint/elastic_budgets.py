"""The budgets of an elastic checkpoint, which can be cut to smaller ones without calibration.

The table ``elastic`` of the config has the budgets, and the configuration of every weight that can
be cut has its rank at each of them, see `lrc.compressors.checkpoint.format`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from lrc.compressors.checkpoint.format import COPY_AGAIN, EDITED, ELASTIC
from lrc.compressors.layers import CompressedLinear, WeightConfig
from lrc.configs.errors import CheckpointError

VERSION = 1
"""Raised when the table changes its meaning."""
BUDGET = "budget"
"""Key of config.json with the budget to load, an argument of `from_pretrained`."""


def elastic_table(modules: Mapping[str, WeightConfig], budgets: Sequence[float]) -> dict[str, Any]:
    """Return the table as an entry of the config; empty if no weight can be cut."""
    if not any(config.elastic for config in modules.values()):
        return {}
    return {ELASTIC: {"version": VERSION, "budgets": list(budgets)}}


def parse_budgets(table: Any, modules: Mapping[str, WeightConfig], where: str) -> tuple[float, ...]:
    """Read the budgets, the largest first, and compare them with the configurations of weights.

    Parameters
    ----------
    table : object
        Entry of the config; None in a checkpoint that is not elastic.
    modules : mapping of str to WeightConfig
    where : str
        Place of the config.

    Raises
    ------
    CheckpointError
        If this version cannot have written the table.
    """

    def invalid(text: str) -> CheckpointError:
        return CheckpointError(f"{where}: {text}", code="invalid-config")

    budgets: list[Any] = []
    if table is not None:
        if not isinstance(table, Mapping) or table.keys() != {"version", "budgets"}:
            raise invalid(
                f"elastic must be an object with 'version' and 'budgets', got {table!r:.60}; "
                f"{EDITED}"
            )
        version, budgets = table["version"], table["budgets"]
        if type(version) is not int or version != VERSION:
            raise invalid(
                f"elastic.version must be {VERSION}, got {version!r:.60}; upgrade lrc if a newer "
                f"one wrote it, or {COPY_AGAIN}"
            )
        numbers = isinstance(budgets, list) and all(
            type(each) in (int, float) and 0 < each < 1 for each in budgets
        )
        if not numbers or len(budgets) < 2 or sorted(set(budgets), reverse=True) != budgets:
            raise invalid(
                "elastic.budgets must be two or more numbers below 1 in descending order, got "
                f"{budgets!r:.60}; {EDITED}"
            )
    for name, config in modules.items():
        for component in config.components:
            if component.ranks and len(component.ranks) != len(budgets):
                raise invalid(
                    f"modules[{name!r}]: 'ranks' must have one rank for each of the "
                    f"{len(budgets)} budgets of elastic, got {len(component.ranks)}; {EDITED}"
                )
    return tuple(budgets)


def budget_index(budgets: Sequence[float], keep: Any, *, where: str, key: str) -> int:
    """Return the position of a budget among those of a checkpoint.

    Parameters
    ----------
    keep : object
        The requested budget.
    where : str
        The checkpoint.
    key : str
        The argument or option that requests it.

    Raises
    ------
    CheckpointError
        If the checkpoint does not offer this budget, or only one.
    """
    if not budgets:
        raise CheckpointError(
            f"{where}: {key}: the checkpoint is not elastic and has only the size that it is "
            f"stored in, got {keep!r:.60}; leave {key} out, or compress with 'elastic' in the "
            "recipe",
            code="not-elastic",
        )
    if keep not in budgets or isinstance(keep, bool):
        offered = ", ".join(f"{each:g}" for each in budgets)
        raise CheckpointError(
            f"{where}: {key}: must be a budget of this checkpoint, one of {offered}, got "
            f"{keep!r:.60}; choose one of these",
            code="unknown-budget",
        )
    return [*budgets].index(keep)


def cut_model_(model: nn.Module, index: int) -> None:
    """Cut a loaded model to one of its budgets, which are counted from 0.

    Raises
    ------
    CheckpointError
        If a weight that must be cut is offloaded to disk.
    """
    for name, module in model.named_modules():
        if isinstance(module, CompressedLinear) and module.config.elastic:
            if any(parameter.is_meta for parameter in module.parameters()):
                raise CheckpointError(
                    f"{BUDGET}: cannot cut {name}, which is offloaded; write the smaller "
                    "checkpoint with `lrc export FOLDER OUT --keep BUDGET` and load that",
                    code="offloaded-weight",
                )
            module.cut_(index)
