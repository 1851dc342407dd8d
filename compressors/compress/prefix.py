"""What error compensation needs of the dense and the partly compressed model, in order."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Protocol

from torch import Tensor

from lrc.compressors.planning.required_statistics import caps_tokens
from lrc.compressors.planning.tasks import LayerTask
from lrc.compressors.solvers.error_compensation import PrefixMoments

EXPERTS_TOGETHER = 16
"""Experts whose moments are kept at the same time."""


class Prefix(Protocol):
    """The dense and the partially compressed model up to a layer, for error compensation."""

    def groups(self, layer: int) -> list[list[str]]:
        """Return the linear layers of a decoder layer grouped by input, in execution order."""

    def measure(
        self,
        layer: int,
        names: Sequence[str],
        *,
        deficit: bool,
        capped: bool,
        gated: bool,
        last: bool,
    ) -> PrefixMoments:
        """Return the moments of a common input, and with `deficit` what the residual stream lacks.

        With `capped` tokens are weighted by `token_weights`, and with `gated` those of experts by
        the router. With `last`, nothing else of the layer will be measured. See `PrefixMoments`.
        """

    def insert(self, name: str, W_hat: Tensor) -> None:
        """Use `W_hat` [d_out, d_in] as a weight of the present layer in the compressed model."""

    def advance(self, layer: int) -> None:
        """Advance the hidden states of both models by one layer."""


def rounds(
    groups: Sequence[list[str]], refit: Mapping[str, LayerTask]
) -> Iterator[list[list[str]]]:
    """Yield groups of linears that are fitted before the next inputs are measured.

    One at a time, but consecutive ones of experts together: they do not depend on each other.
    """

    def kind(names: list[str]) -> str | None:
        compensates = [refit[name].compensate for name in names if name in refit]
        routed = compensates and all(each is not None and each.routed for each in compensates)
        return names[0].rpartition(".")[2] if routed else None

    for key, members in groupby(groups, kind):
        each = list(members)
        size = 1 if key is None else EXPERTS_TOGETHER
        yield from (each[start : start + size] for start in range(0, len(each), size))


def measure(
    prefix: Prefix,
    layer: int,
    names: Sequence[str],
    targets: Sequence[LayerTask],
    *,
    last: bool,
) -> PrefixMoments:
    """Return the moments that the tasks of some linears with a common input need.

    `last` tells that nothing else of the layer will be measured.
    """
    # Gradients are weighted by the router already, see `LinearStatistics.forward`.
    weighted = any({"gradients", "input_mean"} & {*task.statistics} for task in targets)
    return prefix.measure(
        layer,
        names,
        deficit=any(t.compensate and t.compensate.residual > 0 for t in targets),
        capped=all(caps_tokens(task) for task in targets),
        gated=not weighted,
        last=last,
    )
