"""The page of a report: complete, self-contained, and drawn after every run."""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

from lrc.compressors import pipeline
from lrc.compressors.evaluate.score_text import four_digits
from lrc.compressors.page import page_file, render
from lrc.compressors.page.gate_parts import gate_rows
from lrc.compressors.page.saved_runs import SavedRun
from lrc.compressors.page.sections import SECTIONS
from lrc.configs.load import load_recipe
from lrc.configs.size import size_text

JOINT = {
    "decompose": {
        "method": "mixed",
        "keep": 0.4,
        "components": ["dense", "pivoted_low_rank"],
        "schemes": ["int8", "int4-g16"],
        "embeddings": "int8",
    }
}
LOW_RANK = {"decompose": {"method": "kfac", "keep": 0.6}}
SLICE = {"slice": {"method": "modegpt", "keep": 0.9}}
HEAL = {"heal": {"method": "distill", "steps": 2, "batch": 1, "held_out": 64, "rate": 1e-3}}
ALWAYS = {
    "overview",
    "warnings",
    "size",
    "quality",
    "baselines",
    "timing",
    "recipe",
    "environment",
    "missing",
}
MATRICES = {"bytes", "matrices"}
RUNS: dict[str, tuple[list[dict[str, Any]], set[str]]] = {
    "joint": ([JOINT], MATRICES | {"calibration", "spectra"}),
    "low rank": ([LOW_RANK], MATRICES | {"calibration", "profile", "spectra"}),
    "slice": ([SLICE], {"slices", "calibration"}),
    "healed": ([{"quantize": {"method": "rtn", "bits": 4}}, HEAL], MATRICES | {"healing", "gates"}),
}
"""Stages, and the sections that a run has besides `ALWAYS`."""
GATES = ["size <= 3MiB", "size <= 0.99x", "perplexity.english <= 1e9"]
NEVER_EMPTY = {"h1", "h2", "section", "table", "caption", "tbody", "figcaption", "title", "desc"}
VOID = {"meta", "br", "hr", "img", "input", "link"}


@dataclass(frozen=True)
class Drawn:
    """A finished run with the page that it has drawn."""

    output: Path
    recipe: Path

    @property
    def page(self) -> str:
        return (self.output / "report.html").read_text(encoding="utf-8")


class Checked(HTMLParser):
    """A page whose elements are closed in order; collects what tests ask for."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self._open: list[tuple[str, int]] = []
        self.ids: list[str] = []
        self.sections: list[str] = []
        self.attributes: list[tuple[str, str, str | None]] = []
        self.counts: dict[str, int] = {}
        self.empty: list[str] = []
        self.text = ""
        self.feed(page)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.counts[tag] = self.counts.get(tag, 0) + 1
        self.attributes += [(tag, key, value) for key, value in attrs]
        found = dict(attrs)
        if identity := found.get("id"):
            self.ids.append(identity)
            self.sections += [identity] if tag == "section" else []
        if tag not in VOID:
            self._open.append((tag, len(self.text)))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self._open.pop()

    def handle_endtag(self, tag: str) -> None:
        opened, length = self._open.pop()
        assert opened == tag
        if tag in NEVER_EMPTY and not self.text[length:].strip():
            self.empty.append(tag)

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def drawn(
    tiny_model_folder: Path,
    tiny_text: Path,
    tiny_recipe: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[dict[str, Drawn]]:
    text = tmp_path_factory.mktemp("texts") / "other.txt"  # healing refuses the calibration text
    text.write_text(tiny_text.read_text(encoding="utf-8")[:4000], encoding="utf-8")
    perplexity = {"source": str(text), "name": "english", "window": 32, "windows": 2}
    found = {}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "write_page", page_file.write_page)
        for name, (stages, expected) in RUNS.items():
            output = tmp_path_factory.mktemp("pages") / name.replace(" ", "-")
            evaluate: dict[str, Any] = {"perplexity": [perplexity], "baselines": ["int4-g16"]}
            if "gates" in expected:
                evaluate["gates"] = GATES
            recipe = tiny_recipe(tiny_model_folder, output, stages=stages, evaluate=evaluate)
            loaded = load_recipe(recipe)
            if "profile" in expected:
                pipeline.profile(loaded, 1)
            pipeline.compress(loaded)
            found[name] = Drawn(output, recipe)
    yield found
    torch.set_num_threads(threads)


@pytest.fixture(params=RUNS)
def run(request: pytest.FixtureRequest, drawn: dict[str, Drawn]) -> Drawn:
    found: Drawn = drawn[request.param]
    return found


def check_self_contained(page: str) -> Checked:
    found = Checked(page)
    assert len(found.ids) == len({*found.ids})
    assert found.empty == []
    for tag, key, value in found.attributes:
        assert value is not None or tag == "details"
        if key in ("href", "xlink:href"):
            assert value is not None
            assert value.startswith("#")
            assert value[1:] in found.ids
        if key in ("aria-labelledby", "aria-describedby"):
            assert {*str(value).split()} <= {*found.ids}
        assert key not in ("src", "srcset", "action", "data", "poster")
        assert "url(" not in str(value) or str(value).count("url(#") == str(value).count("url(")
    style = page.partition("<style>")[2].partition("</style>")[0]
    assert "url(" not in style
    assert "@import" not in style
    assert not {"script", "link", "iframe", "img", "object"} & {*found.counts}
    return found


def test_a_page_is_well_formed_and_refers_to_nothing_outside(run: Drawn) -> None:
    found = check_self_contained(run.page)
    counts = found.counts
    assert counts["caption"] == counts["table"] > 3
    assert counts["figure"] == counts["svg"] == counts["desc"] == counts["figcaption"] > 1
    assert counts["title"] == counts["svg"] + 1
    assert "prefers-color-scheme: dark" in run.page
    assert "@media print" in run.page


def test_a_page_has_the_sections_of_its_run_and_no_others(drawn: dict[str, Drawn]) -> None:
    seen = set()
    for name, (_, expected) in RUNS.items():
        sections = Checked(drawn[name].page).sections
        assert sections == [key for key in SECTIONS if key in ALWAYS | expected], name
        seen |= {*sections}
    assert seen == {*SECTIONS} - {"speed", "latency"}


def test_a_page_holds_the_recipe_as_written_and_the_numbers_of_the_report(run: Drawn) -> None:
    text = Checked(run.page).text
    report = json.loads((run.output / "report.json").read_text())
    assert run.recipe.read_text() in text
    entry = report["evaluation"]["perplexity"]["english"]
    assert f"{entry['compressed']:.3f}" in text
    assert f"{report['size']['model']['parameters']['compressed']:,}" in text
    assert report["evaluation"]["baseline_comparison"] in text
    assert report["environment"]["versions"]["torch"] in text
    for layer in report["layers"]:
        assert layer["name"] in text


def test_measured_losses_of_the_profile_are_in_report_and_page(drawn: dict[str, Drawn]) -> None:
    report = json.loads((drawn["low rank"].output / "report.json").read_text())
    compressed = {e["name"] for e in report["layers"] if e["config"]["components"]}
    assert {*report["profile"]["divergences"]} == {*report["profile"]["increases"]} == compressed
    assert (report["profile"]["windows"], report["profile"]["tokens"]) == (1, 63)
    assert "rank correlation (Spearman)" in Checked(drawn["low rank"].page).text
    joint = json.loads((drawn["joint"].output / "report.json").read_text())
    assert joint["profile"] is None


def test_report_draws_the_same_page_again_and_keeps_the_checkpoint(
    lrc, run: Drawn, tmp_path: Path
) -> None:
    ended = lrc("report", run.output, "--output", tmp_path / "other.html")
    assert (ended.out, ended.err) == (f"page: {tmp_path / 'other.html'}\n", "")
    assert (tmp_path / "other.html").read_text() == run.page
    assert lrc("inspect", run.output / "checkpoint", "--verify").code == 0


@pytest.mark.parametrize("given", ["", "checkpoint", "report.json"])
def test_a_run_is_named_by_its_folder_its_checkpoint_or_its_report(
    lrc, drawn: dict[str, Drawn], given: str
) -> None:
    run = drawn["slice"]
    before = run.page
    (run.output / "report.html").unlink()
    ended = lrc("report", run.output / given, "--json")
    assert (ended.code, ended.err) == (0, "")
    assert json.loads(ended.out)["page"] == str(run.output / "report.html")
    assert run.page == before


def test_several_runs_are_compared_on_one_page(lrc, drawn: dict[str, Drawn], tmp_path) -> None:
    page = tmp_path / "all.html"
    outputs = [each.output for each in drawn.values()]
    assert lrc("report", *outputs, outputs[0], "--output", page).code == 0
    found = check_self_contained(page.read_text())
    assert found.counts["svg"] == 1  # one text
    assert found.sections == [
        "comparison",
        "quality",
        "gates",
        "timing",
        *(f"run-{n + 1}" for n in range(5)),
    ]
    for name in [*(each.output.name for each in drawn.values()), "joint (2)"]:
        assert name in found.text
    assert "decompose mixed" in found.text
    assert "quantize rtn, heal distill" in found.text


def test_gates_are_shown_with_bound_value_and_outcome(
    drawn: dict[str, Drawn], tmp_path: Path
) -> None:
    report = json.loads((drawn["healed"].output / "report.json").read_text())
    assert "all 3 passed" in Checked(drawn["healed"].page).text
    gates = report["recipe"]["evaluate"]["gates"]
    gates[2]["at_most"] = 1.0
    gates.append({"metric": "tasks.piqa.acc", "at_least": 0.5, "relative": True})
    rows = gate_rows(SavedRun("run", report, None, tmp_path))
    files = report["size"]["model"]["file_bytes"]
    assert [row.cells for row in rows] == [
        ["size <= 3MiB", *map(size_text, (files["compressed"], files["dense"])), "passed"],
        [
            "size <= 0.99x",
            f"{files['compressed'] / files['dense']:.4g}x",
            size_text(files["dense"]),
            "passed",
        ],
        [
            "perplexity.english <= 1",
            *(
                four_digits(report["evaluation"]["perplexity"]["english"][model])
                for model in ("compressed", "dense")
            ),
            "missed",
        ],
        ["tasks.piqa.acc >= 0.5x", "", "", "not measured"],
    ]
    report["warnings"].append("domain-gap: much more")
    report["evaluation"]["domain_gap"] = "domain-gap: much more"
    assert page_file.write_page(tmp_path, report, pytest.fail)
    found = check_self_contained((tmp_path / "report.html").read_text())
    assert found.text.count("domain-gap: much more") == 1
    assert found.text.count("2 of 4 passed") == 2  # overview and table


def test_perplexities_of_other_windows_are_not_plotted_together(
    lrc, drawn: dict[str, Drawn], tmp_path: Path
) -> None:
    report = json.loads((drawn["joint"].output / "report.json").read_text())
    report["evaluation"]["perplexity"]["english"]["window"] = 16
    other = tmp_path / "other"
    other.mkdir()
    (other / "report.json").write_text(json.dumps(report))
    page = tmp_path / "both.html"
    assert lrc("report", drawn["joint"].output, other, "--output", page).code == 0
    found = check_self_contained(page.read_text())
    assert "svg" not in found.counts
    assert "the runs differ in window" in found.text


def test_a_failure_to_draw_is_one_warning(
    lrc, recipe: Path, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*arguments: object) -> str:
        raise RuntimeError("no fonts")

    monkeypatch.setattr(pipeline, "write_page", page_file.write_page)
    with monkeypatch.context() as patch:
        patch.setattr(render, "render", fails)
        ended = lrc("compress", recipe)
    assert ended.code == 0
    warning = f"warning: report.html: not drawn (RuntimeError: no fonts); `lrc report {output}`"
    assert ended.err.count(warning) == 1
    assert f"{output}/report.json\n" in ended.out
    assert not (output / "report.html").exists()
    again = lrc("compress", recipe)  # a finished run draws a missing page
    assert "report.html" in again.out
    assert (output / "report.html").is_file()
    assert lrc("compress", recipe, "--overwrite", "stages.0.decompose.keep=0.5").code == 0
    assert "keep: 0.5" in (output / "report.html").read_text()


def test_values_with_special_characters_are_escaped(drawn: dict[str, Drawn], tmp_path) -> None:
    shutil.copytree(drawn["joint"].output, tmp_path / "run")
    report = json.loads((tmp_path / "run/report.json").read_text())
    name = "<b onclick=\"alert(1)\">$x^2$ & 'y'</b>"
    evaluation = report["evaluation"]
    evaluation["perplexity"] = {name: evaluation["perplexity"]["english"]}
    evaluation["baselines"][0]["perplexity"] = {name: 12.5}
    evaluation["baselines"][0]["name"] = name
    report["warnings"].append(name)
    report["timing"]["seconds"][name] = 1.0
    report["recipe"]["model"]["path"] = name
    assert page_file.write_page(tmp_path / "run", report, pytest.fail)
    found = check_self_contained((tmp_path / "run/report.html").read_text())
    assert "b" not in found.counts
    assert name in found.text


def test_what_was_measured_later_or_by_other_options_is_shown(
    drawn: dict[str, Drawn], tmp_path: Path
) -> None:
    """Speed, tasks, divergences, continuations and predicted times; no warnings."""
    report = json.loads((drawn["joint"].output / "report.json").read_text())
    phase = {"median": 100.0, "p10": 90.0, "p90": 120.0, "ratio": 1.25, "verdict": "faster"}
    place = {"mode": "eager", "batch": 1, "prompt": 16, "tokens": 4, "repeated": False}
    common = {**place, "failed": None, "peak_bytes": 2**20}
    report["speed"] = {
        "against": "d",
        "environment": {"device": "cpu", "threads": 2},
        "settings": {"dtype": "float32"},
        "notes": ["a note"],
        "results": [
            {"model": "d", **common, "prefill": {**phase, "ratio": None}, "decode": phase},
            {"model": "m", **common, "prefill": phase, "decode": None, "failed": "no kernel"},
        ],
    }
    form = {"form": "dense int8", "weights": 14, "seconds": 0.25, "dense_seconds": 1.0}
    times = {"dense_seconds": 1.0, "seconds": 0.25, "ratio": 0.25, "place": "cpu, 1 row"}
    report["latency"] = {**times, "forms": [form]}
    evaluation = report["evaluation"]
    scores = {"dense": 0.61, "compressed": 0.58, "stderr": {"dense": 0.012, "compressed": 0.013}}
    rest = {"recovery": 95.1, "higher_is_better": True, "documents": 100, "version": 1}
    evaluation["tasks"] = {"piqa": {"acc": {**scores, **rest}}}
    errors = {"forward": 0.004, "reverse": 0.005, "agreement": 0.01}
    numbers = {"forward": 0.123, "reverse": 0.234, "agreement": 0.876, "tokens": 62}
    evaluation["kl"] = {"english": {**numbers, "stderr": errors, "positions": []}}
    evaluation["generations"] = [{"prompt": "A", "dense": "compiler", "compressed": "cat"}]
    report["warnings"] = []
    assert page_file.write_page(tmp_path, report, pytest.fail)
    found = check_self_contained((tmp_path / "report.html").read_text())
    assert {"speed", "latency"} <= {*found.sections}
    assert "warnings" not in found.sections
    for text in (
        "100.0 (90.0 to 120.0)",
        "1.25 faster",
        "Not measured: no kernel",
        "25.0 %",
        "0.5800 ± 0.0130",
        "0.1230 ± 0.0040",
        "compiler",
    ):
        assert text in found.text


@pytest.mark.parametrize(
    ("make", "exit_code", "words", "code"),
    [
        (None, 2, ["no such folder; give the output folder of a finished run"], "usage"),
        ({}, 2, ["not the output folder of a run, it has no report.json"], "usage"),
        ({"work/run.json": "{}"}, 2, ["a run that is not finished"], "usage"),
        ({"report.json": "{"}, 1, ["not a readable JSON file", "again"], "invalid-report"),
        ({"report.json": "[]"}, 1, ["must be a JSON object, got []"], "invalid-report"),
        ({"report.json": "{}"}, 1, ["schema_version must be 2, got None"], "invalid-report"),
        (
            {"report.json": '{"schema_version": 1}'},
            1,
            ["another version of lrc", "must be 2, got 1", "--overwrite"],
            "report-version",
        ),
        ({"report.json": '{"schema_version": 99}'}, 1, ["upgrade lrc"], "report-version"),
        (
            {"report.json": '{"schema_version": 2}'},
            1,
            ["not as `lrc compress` writes it (KeyError: 'recipe')"],
            "invalid-report",
        ),
    ],
)
def test_what_is_no_report_is_refused(
    lrc,
    tmp_path: Path,
    make: dict[str, str] | None,
    exit_code: int,
    words: list[str],
    code: str,
) -> None:
    folder = tmp_path / "some"
    if make is not None:
        folder.mkdir()
        for name, text in make.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(text)
    lrc("report", folder).refuses(exit_code, "some", *words, code=code)
    assert not (folder / "report.html").exists()


def test_an_edited_report_is_refused(lrc, drawn: dict[str, Drawn], tmp_path: Path) -> None:
    shutil.copytree(drawn["healed"].output, tmp_path / "run")
    path = tmp_path / "run/report.json"
    path.write_text(path.read_text().replace('"seed": 0', '"seed": 1', 1))
    lrc("report", tmp_path / "run").refuses(
        1, "has changed since it was written", code="changed-file"
    )


def test_only_pages_are_overwritten(lrc, drawn: dict[str, Drawn], tmp_path: Path) -> None:
    lrc("report", drawn["healed"].output, "--output", tmp_path / "recipe.yaml").refuses(
        2, "--output", "must end in .html", code="usage"
    )
