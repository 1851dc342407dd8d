"""Every encoder-decoder model of transformers is compressed correctly, or rejected by the plan."""

from pathlib import Path

import pytest
from tests.robustness.encoder_decoders import families, outcomes, read_statuses

PAGE = Path(__file__).parents[2] / "docs/encoder-decoders.md"


def test_the_page_lists_all_types() -> None:
    listed = read_statuses(PAGE.read_text(encoding="utf-8"))
    assert not listed or listed.keys() == families().keys()


@pytest.mark.robustness
def test_types_are_compressed_correctly_or_rejected() -> None:
    found = outcomes()
    assert not {each.family: each.failures for each in found if each.failures}
    known = read_statuses(PAGE.read_text(encoding="utf-8"))
    assert {each.family: each.status for each in found} == (
        known or {each.family: each.status for each in found}
    )
