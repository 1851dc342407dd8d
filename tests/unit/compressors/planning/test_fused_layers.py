"""Groups of layers that serving engines fuse, and choices that give them one scheme."""

import pytest

from lrc.compressors.layers import ComponentConfig, QuantizationArgs, WeightConfig
from lrc.compressors.planning.allocators import lagrangian
from lrc.compressors.planning.candidates import Candidate, joint_candidates
from lrc.compressors.planning.fused_layers import fused_groups

MLP = [f"a.mlp.{n}_proj" for n in ("gate", "up", "down")]
ATTENTION = [f"model.layers.{i}.self_attn.{n}_proj" for i in (0, 1) for n in "qkvo"]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (ATTENTION, [ATTENTION[:3], ATTENTION[4:7]]),
        (MLP, [MLP[:2]]),
        (["a.experts.0.w1", "a.experts.1.w3"], []),  # of different experts
        (["a.query_key_value", "a.dense", "b.q_proj"], []),
    ],
)
def test_groups_are_siblings_that_read_the_same_input(names, expected) -> None:
    assert fused_groups(names) == expected


def candidate(scheme: str | None, cost: int, loss: float) -> Candidate:
    args = None if scheme is None else QuantizationArgs.parse(scheme)
    components = () if args is None else (ComponentConfig("dense", {}, args),)
    return Candidate(WeightConfig((8, 8), components), cost, loss)


def test_choices_of_a_group_have_one_scheme_and_the_sums_of_costs_and_losses() -> None:
    first = [candidate("int3", 3, 9.0), candidate("int4", 4, 4.0), candidate(None, 16, 0.0)]
    second = [candidate("int3", 6, 1.0), candidate("int8", 8, 0.5), candidate(None, 32, 0.0)]
    joint = joint_candidates([first, second])
    assert [(each.cost, each.loss) for each in joint] == [(9, 10.0), (48, 0.0)]
    assert all(len({part.config.quantization for part in each.parts}) == 1 for each in joint)
    assert [each.parts for each in joint_candidates([first])] == [(one,) for one in first]
    assert lagrangian([joint, joint_candidates([first])], 13) == [0, 1]
