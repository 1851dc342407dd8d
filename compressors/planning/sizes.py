"""Find the sizes of a task that fit a fraction of its cost."""

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import cached_property

from lrc.compressors.layers import QuantizationArgs, WeightConfig
from lrc.compressors.methods.size_families import components_at, largest_step
from lrc.compressors.planning.measures import Measure
from lrc.compressors.planning.tasks import LayerTask

# Allocation enumerates thousands of ranks for every weight, and many weights have the same shape.
_CONFIGS: dict[Hashable, dict[int, WeightConfig]] = {}
_COSTS: dict[Hashable, dict[int, int]] = {}


@dataclass(frozen=True)
class SizeSteps:
    """The configurations of a task of given types, from the smallest to the largest."""

    task: LayerTask
    types: str
    args: QuantizationArgs | None = None
    ratio: float = 2.0

    @cached_property
    def largest(self) -> int:
        """The number of the largest configuration; they are counted from 1."""
        task = self.task
        return largest_step(self.types, *task.stacked_shape, pattern=task.pattern)

    def config(self, step: int) -> WeightConfig:
        """Return configuration number `step`; for low-rank types that is the rank.

        Raises
        ------
        ValueError
            If no weight of the task's shape can have its pattern.
        """
        configs = self._configs
        if step not in configs:
            shape, pattern = self.task.stacked_shape, self.task.pattern
            found = components_at(self.types, step, *shape, ratio=self.ratio, pattern=pattern)
            configs[step] = self.task.with_components(found).quantized(self.args)
        return configs[step]

    def cost(self, step: int, measure: Measure) -> int:
        """Return the cost of configuration number `step`."""
        return self.costs(measure)(step)

    def costs(self, measure: Measure) -> Callable[[int], int]:
        """Return the function from the number of a configuration to its cost."""
        known = _COSTS.setdefault((self._key, measure), {})  # hashing the key takes long

        def cost(step: int) -> int:
            if step not in known:
                known[step] = self.task.cost(self.config(step), measure)
            return known[step]

        return cost

    @cached_property
    def _configs(self) -> dict[int, WeightConfig]:
        return _CONFIGS.setdefault(self._key, {})

    @cached_property
    def _key(self) -> Hashable:
        """Everything that configurations and costs depend on."""
        task = self.task
        stored = task.shape, len(task.weights), task.number_bits, task.config.bias, task.source_bias
        return stored, task.pattern, self.types, self.args, self.ratio

    def within(self, keep: float, measure: Measure, *, multiple: int = 1) -> int:
        """Return the largest step that costs at most `keep` of the dense weights; 0 if none."""
        dense = self.task.dense_cost(measure)
        # A configuration that costs as much as the dense weights is useless even at keep 1.
        limit = min(keep, (dense - 1) / dense) * dense
        return largest_within(self.costs(measure), limit, self.largest, multiple=multiple)

    def cheapest(self, measure: Measure, *, multiple: int, min_keep: float) -> int:
        """Return the lowest cost that is at least `min_keep` of dense, or the dense cost."""
        dense = self.task.dense_cost(measure)
        cost = self.costs(measure)
        step = smallest_reaching(cost, min_keep * dense, self.largest, multiple=multiple)
        return dense if step == 0 else min(cost(step), dense)


def largest_within(
    cost: Callable[[int], int], limit: float, largest: int, *, multiple: int = 1
) -> int:
    """Return the largest multiple of `multiple` up to `largest` that costs at most `limit`.

    Returns 0 if there is none. `cost` must not decrease.
    """
    steps = range(1, largest // multiple + 1)
    return multiple * bisect_right(steps, limit, key=lambda k: cost(k * multiple))


def smallest_reaching(
    cost: Callable[[int], int], floor: float, largest: int, *, multiple: int = 1
) -> int:
    """Return the smallest multiple of `multiple` that costs at least `floor`; 0 if none does."""
    steps = range(1, largest // multiple + 1)
    index = bisect_left(steps, floor, key=lambda k: cost(k * multiple))
    return steps[index] * multiple if index < len(steps) else 0
