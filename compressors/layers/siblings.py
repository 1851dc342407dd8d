"""Find the layers of a model that receive the same input."""

from collections.abc import Callable, Iterable, Iterator

from torch import Tensor, nn

from lrc.compressors.kernels.fast_path import ignore
from lrc.compressors.layers.component import Component
from lrc.compressors.layers.compressed_linear import CompressedLinear
from lrc.compressors.layers.low_rank import LowRank
from lrc.compressors.layers.pivoted_low_rank import PivotedLowRank
from lrc.compressors.layers.stacked_factors import StackedFactors

SIBLINGS = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("to_q", "to_k", "to_v"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("wi_0", "wi_1"),
    ("fc_1", "fc_2"),
)
"""Children of one module that receive the same input, unless it is a cross-attention."""


def stack_first_factors(
    model: nn.Module, *, replaced: Callable[[Iterable[Tensor]], None] = ignore
) -> list[StackedFactors]:
    """Make layers that receive the same input share one product for their first factors.

    These are layers of one parent with low-rank or pivoted components whose factor ``a`` is
    unquantized and not that of another layer. The results differ by the rounding of the product.
    Factors of all other layers get the kernel for one row, too, on a device that runs it.

    Parameters
    ----------
    replaced : callable, optional
        Called after each group with the factors that were moved into one tensor.

    Returns
    -------
    list of StackedFactors
        The groups that were made, two or more layers each.
    """
    groups = []
    for parent in model.modules():
        if isinstance(parent, Component):
            parent.prepare()
        for names in SIBLINGS:
            members = [c for name in names for c in _candidates(parent, name)]
            widths = {member.d_in for member in members}
            if len(members) < 2 or len(widths) > 1:
                continue
            group = StackedFactors(members)
            for position, member in enumerate(members):
                member.stack, member.position = group, position
            before = [
                member.get_submodule("a").get_parameter("weight").detach() for member in members
            ]
            if group.stack():
                replaced(before)
            groups.append(group)
    return groups


def _candidates(parent: nn.Module, name: str) -> Iterator[Component]:
    layer = parent._modules.get(name)
    if not isinstance(layer, CompressedLinear):
        return
    for component in layer.components:
        if isinstance(component, LowRank | PivotedLowRank) and component.stack is None:
            alone = component.config.quantization is None and component.config.shares is None
            if alone and type(component._modules["a"]) is nn.Linear:
                yield component
