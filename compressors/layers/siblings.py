"""Find the layers of a model that receive the same input."""

from collections.abc import Callable, Hashable, Iterable

from torch import Tensor, nn

from lrc.compressors.kernels.fast_path import ignore
from lrc.compressors.layers.block_sparse import BlockSparse
from lrc.compressors.layers.component import Component
from lrc.compressors.layers.compressed_linear import CompressedLinear
from lrc.compressors.layers.dense import Dense
from lrc.compressors.layers.joint_products import JointProducts
from lrc.compressors.layers.low_rank import LowRank
from lrc.compressors.layers.pivoted_low_rank import PivotedLowRank
from lrc.compressors.layers.shared_input import SharedInput
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


def share_inputs(
    model: nn.Module, *, replaced: Callable[[Iterable[Tensor]], None] = ignore
) -> list[SharedInput]:
    """Let layers of one parent that receive the same input compute their products together.

    Factors ``a`` of low-rank and pivoted components share one product, if they are unquantized and
    not those of another layer. Integers with the same scheme, and groups of them, share one launch
    where a kernel does it. Results differ by the rounding of the products. Factors of all other
    layers get the kernel for one row, too, on a device that runs it.

    Parameters
    ----------
    replaced : callable, optional
        Called after each group with the factors that were moved into one tensor.

    Returns
    -------
    list of SharedInput
        The groups that were made, two or more layers each.
    """
    groups: list[SharedInput] = []
    for parent in model.modules():
        if isinstance(parent, Component):
            parent.prepare()
        for names in SIBLINGS:
            alike: dict[Hashable, list[Component]] = {}
            for component in (c for name in names for c in _components(parent, name)):
                key = _shared_by(component)
                if key is not None and component.siblings is None:
                    alike.setdefault((key, component.d_in), []).append(component)
            for members in alike.values():
                if len(members) > 1:
                    groups.append(_group(members, replaced))
    return groups


def _components(parent: nn.Module, name: str) -> list[Component]:
    layer = parent._modules.get(name)
    return layer.components if isinstance(layer, CompressedLinear) else []


def _shared_by(component: Component) -> Hashable | None:
    """Return what components must have in common to be multiplied together; None if they cannot."""
    config = component.config
    if isinstance(component, LowRank | PivotedLowRank):
        alone = config.quantization is None and config.shares is None
        return StackedFactors if alone and type(component._modules["a"]) is nn.Linear else None
    if isinstance(component, Dense | BlockSparse) and config.quantization is not None:
        return type(component), config.quantization
    return None


def _group(members: list[Component], replaced: Callable[[Iterable[Tensor]], None]) -> SharedInput:
    if isinstance(members[0], Dense | BlockSparse):
        group: SharedInput = JointProducts(members)
    else:
        group = stack = StackedFactors(members)
        before = [member.get_submodule("a").get_parameter("weight").detach() for member in members]
        if stack.stack():
            replaced(before)
    for position, member in enumerate(members):
        member.siblings, member.position = group, position
    return group
