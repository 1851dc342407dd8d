"""The section of a model card about speed."""

from typing import Any

from lrc.compressors.benchmark.run_report import results_of, section, with_section

CARD = "# Title\n\ntext\n\n## Load it\n\ncode\n"


def speed(ratio: float | None, verdict: str | None, against: str | None = "d") -> dict[str, Any]:
    def phase(ratio: float | None, verdict: str | None) -> dict[str, Any]:
        return {"median": 1234.5, "p10": 1, "p90": 2, "ratio": ratio, "verdict": verdict}

    def row(model: str, *, repeated: bool, **phases: Any) -> dict[str, Any]:
        place = {"mode": "eager", "batch": 1, "prompt": 2048, "tokens": 8, "failed": None}
        return {"model": model, "repeated": repeated, **place, **phases}

    plain, found = phase(None, None), phase(ratio, verdict)
    form = {"form": "sparse", "layers": 3, "example": "x.y", "reason": "needs Triton"}
    return {
        "against": against,
        "environment": {"device": "cpu", "threads": 2},
        "settings": {"dtype": "float32"},
        "models": [{"name": "d", "slow_forms": []}, {"name": "m", "slow_forms": [form]}],
        "results": [
            row("d", repeated=False, prefill=plain, decode=plain),
            row("m", repeated=False, prefill=plain, decode=found),
            row("other", repeated=False, prefill=plain, decode=plain),
            row("d", repeated=True, prefill=plain, decode=plain),
        ],
    }


def test_it_states_where_the_model_is_slower_and_what_has_no_fast_path() -> None:
    text = section(results_of("m", speed(0.873, "slower")))
    assert "| eager | 1 | 2,048 | 8 | dense | 1,234.5 |  | 1,234.5 |  |" in text
    assert "| eager | 1 | 2,048 | 8 | this model | 1,234.5 |  | 1,234.5 | 0.87x slower |" in text
    assert text.count("| eager") == 2
    assert (
        "**Slower than dense in 1 of 1 measurements: decode (eager, batch 1, prompt 2,048) 0.87x.**"
        in text
    )
    assert "No fast path: sparse in 3 layers, such as `x.y` (needs Triton)." in text


def test_it_states_if_nothing_is_slower_or_nothing_was_compared() -> None:
    assert "**In no measurement slower than dense.**" in section(speed(1.5, "faster"))
    assert "**Not compared with the dense model.**" in section(speed(None, None, against=None))
    failed = speed(1.5, "faster")
    failed["results"][1] |= {"prefill": None, "decode": None, "failed": "no kernel"}
    text = section(results_of("m", failed))
    assert "**m: not measured (eager, batch 1, prompt 2048): no kernel.**" in text
    assert "In no measurement" not in text


def test_the_section_comes_before_loading_or_last_and_is_replaced() -> None:
    first, second = (section(speed(ratio, "faster")) for ratio in (1.5, 2.5))
    card = with_section(CARD, first)
    assert card.startswith("# Title\n\ntext\n\n<!-- lrc bench -->\n## Speed\n")
    assert card.endswith("<!-- end of lrc bench -->\n\n## Load it\n\ncode\n")
    assert with_section(card, first) == card
    again = with_section(card, second)
    assert again == with_section(CARD, second)
    assert "1.50x" not in again
    other = with_section("# Other card", first)
    assert other == f"# Other card\n\n{first}\n"
