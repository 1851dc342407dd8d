"""Figures of a page: colors of the page, text as text, ids of their own."""

import re
from xml.etree import ElementTree

import pytest

from lrc.compressors.page import charts
from lrc.compressors.page.charts import Bar, Interval, Point
from lrc.compressors.page.drawing import VARIABLES, Page
from lrc.compressors.page.heat_maps import FAINT, FULL, heat_map
from lrc.compressors.page.matrices import Grid

GRID = Grid(
    [0, 3], ["q_proj", "k_proj"], {(0, "q_proj"): 0.0123, (3, "q_proj"): 4.0, (0, "k_proj"): 4.0}
)


def opacities(svg: str) -> list[str]:
    """Return the opacities of the cells of a heat map."""
    return re.findall(r"fill: var\(--series-0\);[^\"]*opacity: ([0-9.]+)", svg)


def figures(page: Page) -> list[str]:
    """Return one figure of every kind."""
    return [
        charts.size_and_quality(page, "c4", [Point("a", 2**20, 9.0, "dense")]),
        charts.size_and_quality(
            page, "c4", [Point("a", 2**20, 9.0, "dense"), Point("b", 2**19, 9e4, "result")]
        ),
        charts.bytes_by_part(page, "title", [Bar("q", 2e6, 1e6), Bar("none", 0, 0)]),
        charts.bytes_by_layer(page, [0, 1], [Bar("0", 2e6, 1e6), Bar("1", 2e6, 5e5)]),
        charts.pairs(page, "title", "accuracy", [("piqa", None, Interval(0.5, 0.1, 0.1))]),
        charts.training_losses(page, "title", [(0, 1.0), (5, 0.5)], 5),
        charts.before_and_after(page, "title", "error", [(1.0, 0.5), (0.0, 0.0)]),
        charts.by_layer(page, "energy", [(0, 0.1), (1, 0.0)]),
        charts.predicted_and_measured(
            page, "title", "nats per token", [("q", [(1e-7, 1e-6), (3e-4, 1e-3)])]
        ),
        charts.durations(page, [("slice", 0.0)]),
        heat_map(page, "Rank", "", GRID),
    ]


def test_every_figure_is_xml_with_title_and_text_in_colors_of_the_page() -> None:
    for number, svg in enumerate(figures(Page()), start=1):
        root = ElementTree.fromstring(svg)
        title, description = root[0], root[1]
        assert (title.tag, description.tag) == ("title", "desc")
        assert title.text
        assert description.text
        name = f"figure-{number}"
        assert root.get("aria-labelledby") == f"{name}-title {name}-text"
        assert [*root.iter("text")] != []
        assert not any(color in svg for color in VARIABLES)
        assert re.search(r"#[0-9a-f]{6}", svg) is None  # a color that does not follow the page
        assert "font-family" not in svg
        assert "$" not in svg  # numbers of logarithmic axes, too, are plain text
        ids = [each.get("id") for each in root.iter() if each.get("id")]
        assert len(ids) == len({*ids})
        assert all(str(each).startswith(name) for each in ids)
        used = re.findall(r'(?:url\(|href=")#([^")]+)', svg)
        assert {*used} <= {*ids}


def test_the_same_figures_have_the_same_bytes_and_coordinates_are_rounded() -> None:
    first, second = figures(Page()), figures(Page())
    assert first == second
    for svg in first:
        tags = re.findall(r"<[^>]*>", svg)
        assert not any(re.search(r"\d\.\d{3}", tag) for tag in tags)


def test_numbers_in_cells_are_not_cut() -> None:
    texts = [each.text for each in ElementTree.fromstring(figures(Page())[-1]).iter("text")]
    assert {"0.012", "4", "Rank", "q_proj", "k_proj", "3"} <= {*texts}


@pytest.mark.parametrize("logarithmic", [False, True])
def test_equal_values_have_equal_colors_and_nearly_equal_ones_similar_colors(
    logarithmic: bool,
) -> None:
    cells = {(0, "q"): 3.25, (1, "q"): 3.25, (0, "k"): 3.26, (1, "k"): 0.0}
    svg = heat_map(Page(), "Size", "bits", Grid([0, 1], ["q", "k"], cells), logarithmic=logarithmic)
    first, second, third, zero = (float(x) for x in opacities(svg))
    assert first == second
    assert third == pytest.approx(FULL, abs=0.01)
    assert first == pytest.approx(third, abs=0.02)
    assert zero == pytest.approx(FAINT, abs=0.01)


def test_names_are_neither_formulas_nor_markup() -> None:
    svg = charts.durations(Page(), [("$x^2$ <b> & 'y'", 1.0)])
    texts = [each.text for each in ElementTree.fromstring(svg).iter("text")]
    assert "$x^2$ <b> & 'y'" in texts
