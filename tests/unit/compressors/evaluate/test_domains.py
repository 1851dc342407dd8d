"""Which texts are in domain, and when others are warned of."""

from typing import Any

import pytest

from lrc.compressors.evaluate.domains import domain_gap, texts_read, with_domains
from lrc.configs import shipped
from lrc.configs.load import load_recipe
from lrc.configs.recipe import Perplexity
from lrc.configs.sources import fractions

C4 = {"source": "c4", "text_sha256": "0"}
MIXED = {
    "source": "{c4: 0.5, self: 0.5}",
    "text_sha256": None,
    "texts": [C4, {"source": "self", "text_sha256": None}],
}


def domains(read: list[Any]) -> dict[str, bool | None]:
    specs = [
        Perplexity(source="c4"),
        Perplexity(source="wikitext2"),
        Perplexity(source="mine.txt"),
        Perplexity(source="self.txt"),
    ]
    hashes = {"c4": "1", "wikitext2": "2", "mine": "0", "self": "3"}
    entries = {name: {"text_sha256": sha256, "ratio": 1.5} for name, sha256 in hashes.items()}
    marked = with_domains(entries, specs, texts_read(read))
    assert all(marked[name]["ratio"] == 1.5 for name in hashes)
    return {name: entry["in_domain"] for name, entry in marked.items()}


@pytest.mark.parametrize("read", [[C4], [None, C4], [MIXED]])
def test_a_text_is_in_domain_if_its_source_or_its_hash_was_read(read: list[Any]) -> None:
    assert domains(read) == {"c4": True, "wikitext2": False, "mine": True, "self": False}


def test_training_text_was_read_too() -> None:
    healed = {"source": "wikitext2", "text_sha256": "9"}
    assert domains([C4, healed])["wikitext2"] is True


def test_without_text_there_is_no_domain() -> None:
    assert set(domains([None]).values()) == {None}


def entries(**ratios: tuple[float | None, bool | None]) -> dict[str, Any]:
    return {name: {"ratio": r, "in_domain": inside} for name, (r, inside) in ratios.items()}


@pytest.mark.parametrize(
    ("found", "warns"),
    [
        (entries(c4=(1.1, True), wiki=(1.1**2.1, False)), True),
        (entries(c4=(1.1, True), wiki=(1.1**1.9, False)), False),
        (entries(c4=(1.1, True), wiki=(1.1, False), code=(1.3, False)), True),
        (entries(c4=(1.1, True), docs=(1.2, True), code=(1.3, False)), False),
        (entries(c4=(1.001, True), code=(1.019, False)), False),
        (entries(c4=(1.001, True), code=(1.021, False)), True),
        (entries(c4=(0.99, True), code=(1.03, False)), True),
        (entries(c4=(0.9, True), code=(0.99, False)), False),
        (entries(c4=(1.1, True), code=(None, False)), False),
        (entries(c4=(1.1, True)), False),
        (entries(wiki=(1.1, False), code=(1.5, False)), False),
        (entries(wiki=(1.1, None), code=(1.5, None)), False),
    ],
)
def test_a_warning_compares_the_worst_of_both_kinds(found: dict[str, Any], warns: bool) -> None:
    sentence = domain_gap(found)
    assert (sentence is not None) == warns
    if sentence is not None:
        worst = max(entry["ratio"] or 0 for entry in found.values())
        assert f"{worst:.3f} times that of the dense model on " in sentence
        assert "on c4, which resembles" in sentence


PACKAGED = {"demo"}  # has no other text


def test_shipped_recipes_are_evaluated_on_another_kind_of_text(tmp_path: Any) -> None:
    names = set(shipped.names()) - PACKAGED
    assert names
    for name in names:
        path = tmp_path / f"{name}.yaml"
        path.write_text(shipped.read(name), encoding="utf-8")
        recipe = load_recipe(path).recipe
        sources = {spec.source for spec in recipe.evaluate.perplexity}
        assert sources - fractions(recipe.calibration.source).keys(), name
        assert recipe.evaluate.compared_texts, name
