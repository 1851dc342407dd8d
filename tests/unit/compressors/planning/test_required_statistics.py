"""What calibration collects for the tasks of a plan."""

from collections.abc import Callable
from typing import Any

import pytest

from lrc.compressors.planning.plan import Plan
from lrc.compressors.planning.required_statistics import caps_tokens

SVD = {"method": "svd-llm", "keep": 0.5, "ignore": ["*.tiny"]}


def quantize(method: str, **options: Any) -> dict[str, Any]:
    return {"quantize": {"method": method, "ignore": ["*.tiny"], **options}}


@pytest.mark.parametrize(
    ("stages", "statistics"),
    [
        ([quantize("gptq")], ("capped_inputs", "inputs", "whole_inputs")),
        ([quantize("rtn")], ()),
        ([SVD], ("inputs",)),
        ([SVD, quantize("gptq")], ("inputs", "whole_inputs")),
    ],
)
def test_massive_tokens_weigh_less_where_nothing_but_integers_is_fitted(
    plan_of: Callable[..., Plan], stages: list[dict[str, Any]], statistics: tuple[str, ...]
) -> None:
    task = plan_of(*stages).tasks[0]
    assert task.statistics == statistics
    assert caps_tokens(task) == ("quantize" in stages[0])


def test_inputs_that_compensation_measures_are_not_collected(plan_of: Callable[..., Plan]) -> None:
    task = plan_of(quantize("gptq", compensate={})).tasks[0]
    assert not task.statistics
    assert caps_tokens(task)
