"""The products whose times a budget in time needs: all that its stages may choose from."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import lcm

from lrc.compressors.latency.latency_table import Product
from lrc.compressors.layers import ComponentConfig, QuantizationArgs
from lrc.compressors.methods.base import LOW_RANK_TYPES
from lrc.compressors.methods.size_families import coarse
from lrc.compressors.planning.candidates import schemes_for
from lrc.compressors.planning.measures import BITS
from lrc.compressors.planning.sizes import SizeSteps
from lrc.compressors.planning.tasks import LayerTask

FRACTIONS = (1 / 16, 1 / 8, 1 / 4, 3 / 8, 1 / 2, 3 / 4, 1)
"""Sizes to measure, as fractions of the largest one that is smaller than the dense weight."""


@dataclass(frozen=True)
class Choices:
    """What a stage may choose for its weights."""

    types: tuple[str, ...]
    """Sums of component types."""
    schemes: tuple[QuantizationArgs, ...] = ()
    ratios: tuple[float, ...] = (2.0,)
    rank_multiple: int = 1


def needed_products(tasks: Iterable[LayerTask], choices: Choices) -> list[Product]:
    """Return the products to measure for tasks, at a few sizes of every form; equal ones once."""
    found: dict[tuple[object, int], Product] = {}
    for task in tasks:
        components = [c for config in _offered(task, choices) for c in config]
        components += task.config.components  # of a given plan
        for component in (None, *components):
            product = Product(task.shape, component)
            found.setdefault((product.key, product.size), product)
    return list(found.values())


def _offered(task: LayerTask, choices: Choices) -> Iterator[tuple[ComponentConfig, ...]]:
    for args in schemes_for(task, choices.schemes):
        if args is not None:
            yield SizeSteps(task, "dense", args).config(1).components
        for types in choices.types:
            group = 1 if args is None else args.row_multiple
            if "+" in types and group > 1:
                continue  # never offered, see `candidates_for`
            ratios = choices.ratios if types == "dictionary" else (2.0,)
            for ratio in ratios:
                steps = SizeSteps(task, types, args, ratio)
                multiple = lcm(choices.rank_multiple, group) if types in LOW_RANK_TYPES else 1
                for step in _grid(steps, multiple):
                    yield steps.config(step).components


def _grid(steps: SizeSteps, multiple: int) -> list[int]:
    """Return the steps to measure: all if there are only a few, ascending."""
    try:
        largest = steps.within(1, BITS, multiple=multiple)
    except ValueError:  # no weight of this shape can have the pattern
        return []
    if coarse(steps.types):
        return list(range(1, largest + 1))
    rounded = (multiple * round(part * largest / multiple) for part in FRACTIONS)
    return sorted({max(step, multiple) for step in rounded}) if largest else []
