"""The key `serve`: what engines load without lrc is planned, everything else is refused by name."""

from collections.abc import Callable
from random import Random
from typing import Any

import pytest
import torch

from lrc.compressors.layers import QuantizationArgs
from lrc.compressors.planning import allocate as module
from lrc.compressors.planning.allocate import allocate
from lrc.compressors.planning.fused_layers import fused_groups
from lrc.compressors.planning.plan import Allocation, Plan
from lrc.compressors.planning.rate_distortion import Curve
from lrc.compressors.planning.tasks import LayerTask
from lrc.configs.engines import ENGINES
from lrc.configs.errors import RecipeError

Planner = Callable[..., Plan]
MIXED = {"method": "mixed", "components": ["dense"], "schemes": ["int8", "int4-g32", "int4"]}
LAYERS = 6


def curves(
    tasks: list[LayerTask], allocations: list[Allocation], *_: Any, **__: Any
) -> dict[str, Curve]:
    """Make up errors of which those of fused layers differ; some are not comparable, or unknown."""
    random, found = Random(0), {}
    for number, task in enumerate(tasks):
        assert task.allocation is not None
        schemes = allocations[task.allocation].quantization
        scale = 10 ** random.uniform(0, 4)
        found[task.name] = Curve(
            torch.zeros(min(task.shape)),
            1,
            comparable=number % 7 != 4,
            note="no curve" if number % 7 == 5 else None,
            total=1e9,
            quantization={str(args): scale * 4.0**-args.bits for args in schemes},
        )
    return found


def schemes_of(plan: Plan) -> dict[str, QuantizationArgs | None]:
    return {task.name: task.config.quantization for task in plan.tasks}


@pytest.mark.parametrize("keep", [0.29, 0.35, 0.45, 0.6, 0.8])
def test_fused_layers_get_one_scheme_even_where_some_have_no_comparable_errors(
    keep: float, plan_of: Planner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "curves_for", curves)
    nothing: Any = None
    stage = {**MIXED, "keep": keep, "serve": "vllm", "ignore": ["*tiny"]}
    pending = plan_of(stage, layers=LAYERS)
    assert not any("vLLM" in text for text in pending.warnings)
    plan = allocate(pending, nothing, nothing, nothing, device="cpu", on_step=lambda *_: None)
    found = schemes_of(plan)
    groups = fused_groups(found)
    assert len(groups) == LAYERS
    assert all(len({found[name] for name in group}) == 1 for group in groups)
    assert len({found[group[0]] for group in groups}) > 1 or keep == 0.29  # of different layers
    assert {str(s) for s in found.values() if s} <= {*ENGINES["vllm"].schemes}
    assert plan.kept <= keep


def quantize(**options: Any) -> dict[str, Any]:
    return {"quantize": {"method": "rtn", **options}}


SERVED = quantize(bits=4, serve="vllm", ignore=["*tiny"])
REFUSED: dict[str, tuple[list[dict[str, Any]], str]] = {
    "fused layers of two formats": (
        [
            quantize(bits=4, serve="vllm", targets=["*.q_proj"]),
            quantize(bits=8, targets=["*.k_proj"]),
        ],
        r"vLLM fuses, got q_proj, k_proj of layers\.0\.attn with different ones.*\(2 such groups\)",
    ),
    "one of the fused layers stays dense": (
        [{**MIXED, "keep": 0.5, "serve": "vllm", "ignore": ["*.k_proj"]}],
        r"got q_proj, k_proj of layers\.0\.attn with",
    ),
    "a format of another stage": (
        [quantize(bits=4, serve="vllm", targets=["*attn*"]), quantize(bits=3, targets=["*mlp*"])],
        r"vLLM has a kernel, int4, .*, got int3 of layers\.0\.mlp\.up_proj, layers\.1\.mlp",
    ),
    "factors of another stage": (
        [{"keep": 0.5, "targets": ["*mlp*"]}, quantize(bits=4, serve="vllm", targets=["*attn*"])],
        r"got low_rank of layers\.0\.mlp\.up_proj, .* from stages\[0\]; list them under 'ignore'",
    ),
    "factors that are quantized": (
        [{"keep": 0.5, "targets": ["*mlp*"]}, SERVED],
        r"got int4 low_rank of layers\.0\.mlp\.up_proj",
    ),
    "zero points of another stage": (
        [
            quantize(bits=4, serve="vllm", targets=["*attn*"]),
            quantize(bits=4, symmetric=False, targets=["*mlp*"]),
        ],
        r"got int4-asymmetric dense of layers\.0\.mlp\.up_proj",
    ),
    "a budget in time, for which fused layers are not tied": (
        [
            {**MIXED, "keep": 0.5, "serve": "vllm", "targets": ["*mlp*"]},
            {**MIXED, "keep": 0.5, "measure": "latency", "targets": ["*attn*"]},
        ],
        r"needs a budget in bits, got measure: latency in stages\[1\]\.decompose; change it",
    ),
    "shapes of which the kernel needs multiples": (
        [quantize(bits=4, serve="vllm-cpu", targets=["*attn*"])],
        r"multiples of 32, got layers\.0\.attn\.q_proj \[64, 64\], ",  # 64 + 16 outputs
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_engine_cannot_load_is_refused_by_name(name: str, plan_of: Planner) -> None:
    stages, expected = REFUSED[name]
    with pytest.raises(RecipeError, match=expected) as caught:
        plan_of(*stages)
    problems = caught.value.problems
    assert {each.code for each in problems} == {"not-servable"}
    assert all(each.where.endswith(".serve") for each in problems)
    assert all(", or remove 'serve: vllm" in each.message for each in problems)


def test_what_the_engine_loads_is_planned_without_warnings(plan_of: Planner) -> None:
    plan = plan_of(SERVED)
    assert {str(scheme) for scheme in schemes_of(plan).values() if scheme} == {"int4"}
    assert not any("vLLM" in text or "engines" in text for text in plan.warnings)


WARNINGS = {
    "int3": ("vLLM has no kernel for int3 and will", "'serve: vllm' allows"),
    "int8": None,
    "int4": None,
}


@pytest.mark.parametrize("scheme", WARNINGS)
def test_without_the_key_a_warning_names_the_weights(scheme: str, plan_of: Planner) -> None:
    plan = plan_of(quantize(bits=int(scheme[-1]), ignore=["*tiny"]))
    found = [text for text in plan.warnings if "kernel" in text]
    expected = WARNINGS[scheme]
    assert len(found) == (expected is not None)
    if expected is not None:
        assert all(part in found[0] for part in (*expected, "layers.0.attn.q_proj", "1 more"))


def test_choices_of_a_joint_plan_are_named_too(plan_of: Planner) -> None:
    plan = plan_of({**MIXED, "schemes": ["int8", "int5-g32", "int4-g16"], "keep": 0.5})
    found = [text for text in plan.warnings if "kernel" in text]
    assert len(found) == 1
    assert "vLLM has no kernel for int5-g32, int4-g16" in found[0]
