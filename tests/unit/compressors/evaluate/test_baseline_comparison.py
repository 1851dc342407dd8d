# ruff: noqa: E501  a sentence is one line here, as it is for its reader
"""Every kind of comparison with baselines; a change of wording is a change of this table."""

from typing import Any

import pytest

from lrc.compressors.evaluate.baseline_comparison import compare_with_baselines
from lrc.configs.size import MIB


def baseline(name: str, mib: float, **perplexity: float | None) -> dict[str, Any]:
    return {"name": name, "bytes": int(mib * MIB), "perplexity": perplexity}


INT8, INT4 = baseline("int8", 131, c4=28.3), baseline("int4-g64", 71, c4=35.6)
# MiB and perplexities of the result, the baselines, and the sentence.
CASES: dict[str, tuple[float, dict[str, float], list[dict[str, Any]], str]] = {
    "rounding wins": (117, {"c4": 42.1}, [INT8, INT4], "plain quantization wins: int4-g64 is smaller (71 against 117 MiB) and better (c4 35.6 against 42.1)."),
    "the best of the winners is named first": (150, {"c4": 42.1}, [INT4, INT8], "plain quantization wins: int8 is smaller (131 against 150 MiB) and better (c4 28.3 against 42.1); int4-g64 wins as well."),
    "smaller and as good wins": (117, {"c4": 35.5}, [INT4], "plain quantization wins: int4-g64 is smaller (71 against 117 MiB) and as good within 0.5 % (c4 35.6 against 35.5)."),
    "pruning wins": (117, {"c4": 42.1}, [baseline("sparse, magnitude", 116.9, c4=40.0)], "plain pruning wins: sparse is as large within 0.5 % (117 against 117 MiB) and better (c4 40 against 42.1)."),
    "better on one text and worse on none wins": (117, {"c4": 42.1, "wiki": 30.0}, [baseline("int4-g64", 71, c4=35.6, wiki=30.1)], "plain quantization wins: int4-g64 is smaller (71 against 117 MiB) and better (c4 35.6 against 42.1, wiki 30.1 against 30)."),
    "a tie": (117, {"c4": 42.1}, [INT8, baseline("int7", 117.2, c4=42.0)], "a tie: int7 is as large within 0.5 % (117 against 117 MiB) and as good within 0.5 % (c4 42 against 42.1)."),
    "the texts disagree": (117, {"c4": 42.1, "wiki": 30.0}, [baseline("int4-g64", 71, c4=35.6, wiki=33.0)], "no winner, the texts disagree: int4-g64 is smaller (71 against 117 MiB), better on c4 and worse on wiki (c4 35.6 against 42.1, wiki 33 against 30)."),
    "the texts disagree about a larger one": (117, {"c4": 28.2, "wiki": 30.0}, [baseline("int8", 131, c4=28.0, wiki=33.0)], "int8 is better on c4 and worse on wiki at 1.12 times the bytes; no baseline of this size or smaller was measured."),
    "a trade": (69, {"c4": 42.1}, [INT8, baseline("int3-g64", 56, c4=90)], "int8 is better at 1.9 times the bytes and int3-g64 is worse at 0.812 times the bytes; no baseline of this size or smaller is better."),
    "larger and as good is beaten": (117, {"c4": 28.3}, [INT8, INT4], "this result beats int8: int8 is as good within 0.5 % at 1.12 times the bytes and int4-g64 is worse at 0.607 times the bytes; no baseline of this size or smaller is better."),
    "the result wins": (70.9, {"c4": 28.0}, [INT8, INT4], "this result wins: int8 is worse at 1.85 times the bytes and int4-g64 is worse at the same bytes; no baseline of this size or smaller is better."),
    "nothing as small was measured": (60, {"c4": 42.1}, [INT8, INT4], "int8 is better at 2.18 times the bytes and int4-g64 is better at 1.18 times the bytes; no baseline of this size or smaller was measured."),
    "what is not finite is worse": (117, {"c4": 42.1}, [baseline("int2", 60, c4=None)], "int2 is worse at 0.513 times the bytes; no baseline of this size or smaller is better."),
    "small models": (2e-2, {"c4": 42.1}, [baseline("int4", 1e-2, c4=40)], "plain quantization wins: int4 is smaller (10.2 against 20.5 KiB) and better (c4 40 against 42.1)."),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_comparison_is_one_sentence(case: str) -> None:
    mib, perplexity, baselines, sentence = CASES[case]
    assert compare_with_baselines(int(mib * MIB), perplexity, baselines) == sentence


def test_there_is_none_without_baselines() -> None:
    assert compare_with_baselines(MIB, {"c4": 30.0}, []) is None
