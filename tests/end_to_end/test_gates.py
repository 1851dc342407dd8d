"""Gates of `lrc compress`, `lrc eval` and `lrc bench`: tables, JUnit files, annotations."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from lrc.cli.bench import check_speeds
from lrc.cli.gate_results import annotation, missed_gates, read_gates
from lrc.configs.errors import Problem
from lrc.configs.size import size_text

GATES = "evaluate.gates=['perplexity.english <= 1.5', 'size <= 0.99x', 'agreement.english >= 0']"


def cases(file: Path) -> dict[str, list[str]]:
    """Return the names of the tests in a JUnit file, and the tags of what is in them."""
    root = ElementTree.parse(file).getroot()
    (suite,) = root
    found = {test.get("name", ""): [each.tag for each in test] for test in suite}
    assert int(suite.get("tests", "")) == len(found)
    assert int(suite.get("failures", "")) == sum("failure" in tags for tags in found.values())
    assert int(suite.get("errors", "")) == sum("error" in tags for tags in found.values())
    return found


def test_compress_prints_every_gate_and_writes_them_as_tests(
    lrc: Callable[..., Any],
    recipe: Path,
    output: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file = tmp_path / "gates.xml"
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    ended = lrc("compress", recipe, GATES, "--junit", file, "-q")
    assert ended.code == 4
    rows = [line.split() for line in ended.out.splitlines() if " <= " in line or " >= " in line]
    assert [row[-1] for row in rows] == ["missed", "passed", "passed"]
    value = json.loads((output / "report.json").read_text())["evaluation"]["perplexity"]["english"]
    assert f"{value['compressed']:.4g}" in rows[0]
    sizes = json.loads((output / "report.json").read_text())["size"]["model"]["file_bytes"]
    ratio = f"{sizes['compressed'] / sizes['dense']:.4g}x"
    assert rows[1][3:-1] == [ratio, *size_text(sizes["dense"]).split()]
    assert cases(file) == {
        "compress": [],
        "perplexity.english <= 1.5": ["failure"],
        "size <= 0.99x": ["system-out"],
        "agreement.english >= 0": ["system-out"],
    }
    (note,) = [line for line in ended.err.splitlines() if line.startswith("::")]
    assert note.startswith("::error title=lrc gate-missed::perplexity.english is ")


def test_a_run_that_fails_is_a_failed_test(
    lrc: Callable[..., Any], recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("GITHUB_ACTIONS", raising=False)
    file = tmp_path / "gates.xml"
    ended = lrc("compress", recipe, "stages.0.decompose.keep=0.0001", "--junit", file, "-q")
    assert ended.code == 2
    assert cases(file) == {"compress": ["error"]}
    assert "::error" not in ended.err  # outside of GitHub


def test_eval_compares_others_with_the_first(
    lrc: Callable[..., Any],
    recipe: Path,
    output: Path,
    tiny_model_folder: Path,
    tiny_text: Path,
    tmp_path: Path,
) -> None:
    assert lrc("compress", recipe, "-q").code == 0
    checkpoint, file = output / "checkpoint", tmp_path / "gates.xml"
    texts = ("--perplexity", tiny_text, "--window", 32, "--windows", 2)
    gates = ("--gate", "perplexity.english <= 9x", "--gate", "size <= 0.01x")
    gates += ("--gate", "kl.english >= 0", "--junit", file)
    ended = lrc("eval", tiny_model_folder, checkpoint, *texts, *gates, "--json", "-q")
    assert ended.code == 4
    found = json.loads(ended.out)
    assert [each["passed"] for each in found["gates"]] == [True, False, True]
    blocks = found["checkpoints"].values()
    dense, compressed = (block["perplexity"]["english"]["perplexity"] for block in blocks)
    assert found["gates"][0]["value"] == compressed / dense
    sizes = [
        sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        for folder in (tiny_model_folder, checkpoint)
    ]
    assert found["gates"][1]["value"] == sizes[1] / sizes[0]
    assert [*cases(file).values()] == [[], ["system-out"], ["failure"], ["system-out"]]
    alone = lrc("eval", checkpoint, *texts, "--gate", "perplexity.english <= 1", "-q")
    assert alone.code == 4
    assert "must be at most 1" in alone.errors[0]


@pytest.mark.parametrize(
    ("gate", "words"),
    [
        ("perplexity.english < 1", "must be a gate such as"),
        ("perplexity.englis <= 1", "did you mean 'perplexity.english'"),
        ("perplexity.english <= 1x", "give the dense model before it"),
        ("kl.english <= 1", "give the dense model before it"),
        ("speed <= 1", "must be perplexity.NAME"),
    ],
)
def test_eval_refuses_gates_on_what_it_does_not_measure(
    lrc: Callable[..., Any], tiny_model_folder: Path, tiny_text: Path, gate: str, words: str
) -> None:
    ended = lrc("eval", tiny_model_folder, "--perplexity", tiny_text, "--gate", gate, "-q")
    ended.refuses(2, words)
    assert "--gate" in ended.errors[0]


def test_gates_on_speed_hold_at_every_point() -> None:
    common = {"mode": "eager", "prompt": 8, "repeated": False, "failed": None}
    slow, fast = ({"median": 10.0, "ratio": ratio} for ratio in (0.5, 2.0))
    results = [
        {**common, "batch": 1, "model": "dense", "prefill": fast, "decode": fast},
        {**common, "batch": 1, "model": "mine", "prefill": slow, "decode": fast},
        {**common, "batch": 4, "model": "mine", "prefill": fast, "decode": slow},
    ]
    gates = read_gates(["decode >= 1x", "prefill >= 10"])
    found = check_speeds(gates, {"against": "dense", "results": results})
    assert list(found) == [f"mine, eager, batch {n}, prompt 8" for n in (1, 4)]
    passed = [[each.passed for each in one] for one in found.values()]
    assert passed == [[True, True], [False, True]]
    (sentence,) = missed_gates(found)
    assert sentence.startswith("mine, eager, batch 4, prompt 8: decode is 10 (dense 20)")


def test_annotations_escape_what_would_end_them() -> None:
    problem = Problem("gate-missed", "", "50 % is\nlow")
    assert annotation(problem) == "::error title=lrc gate-missed::50 %25 is%0Alow"
