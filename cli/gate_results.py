"""Gates in every form that continuous integration reads: table, JUnit file, GitHub annotations."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from xml.etree import ElementTree

import typer
from rich.markup import escape

from lrc.configs.errors import LrcError, Problem, UsageError
from lrc.configs.gate_text import parse_gate

if TYPE_CHECKING:
    from lrc.compressors.evaluate.gates import GateResult
    from lrc.configs.recipe import Gate

Junit = Annotated[
    Path | None,
    typer.Option(help="Write gates as test results in JUnit's XML.", metavar="FILE"),
]
GateTexts = Annotated[
    list[str] | None,
    typer.Option(
        "--gate",
        help="A threshold, exit code 4 if it is missed: `perplexity.c4 <= 1.02x`. Can be repeated.",
        metavar="GATE",
    ),
]
Results = Mapping[str, Sequence["GateResult"]]
"""Name of a model or run -> its gates."""


def read_gates(texts: Sequence[str] | None) -> "list[Gate]":
    """Read gates of the command line.

    Raises
    ------
    UsageError
        With every text that is none.
    """
    from lrc.configs.recipe import Gate

    gates, problems = [], []
    for text in texts or []:
        try:
            gates.append(Gate.model_validate(parse_gate(text)))
        except ValueError as error:
            problems.append(Problem("invalid-gate", "--gate", str(error)))
    if problems:
        raise UsageError(problems)
    return gates


def missed_gates(results: Results) -> list[str]:
    """Return the sentences of all gates that are missed; with several models, under their names."""
    several = len(results) > 1
    return [
        f"{name}: {each.sentence}" if several else each.sentence
        for name, found in results.items()
        for each in found
        if not each.passed
    ]


def print_gates(results: Results) -> None:
    """Print every gate with its value."""
    from lrc.cli.quality import OUT, new_table
    from lrc.compressors.evaluate.score_text import four_digits

    table = new_table("gates", "gate", "value", "dense", "")
    several = len(results) > 1
    for name, found in results.items():
        for each in found:
            table.add_row(
                escape(f"{name}: {each.gate}" if several else each.gate),
                f"{four_digits(each.value)}x"
                if each.gate.endswith("x") and each.dense
                else _in_unit(each, each.value),
                "" if each.dense is None else _in_unit(each, each.dense),
                "passed" if each.passed else "[red]missed[/]",
            )
    if table.rows:
        OUT.print(table)


def _in_unit(result: "GateResult", value: float) -> str:
    from lrc.compressors.evaluate.score_text import four_digits
    from lrc.configs.size import size_text

    return size_text(round(value)) if result.gate.startswith("size ") else four_digits(value)


def gates_json(results: Results) -> list[dict[str, Any]]:
    """Return every gate as a JSON value."""
    return [
        {
            "model": name,
            "gate": each.gate,
            "value": each.value,
            "dense": each.dense,
            "passed": each.passed,
        }
        for name, found in results.items()
        for each in found
    ]


def write_junit(path: Path, command: str, results: Results, error: LrcError | None = None) -> None:
    """Write a JUnit file: a test per gate, and one for the command, which `error` has ended.

    The elements are those of the schema of the JUnit task of Ant, which GitLab, Jenkins and others
    read.
    """
    from lrc.compressors.io.files import write_text

    tests = ElementTree.Element("testsuite", name=f"lrc {command}")
    run = ElementTree.SubElement(tests, "testcase", classname="lrc", name=command)
    if error is not None:
        element = ElementTree.SubElement(run, "error", type=error.code, message=str(error))
        element.text = "\n".join(f"error[{p.code}]: {p}" for p in error.problems)
    for name, found in results.items():
        for each in found:
            test = ElementTree.SubElement(tests, "testcase", classname=name, name=each.gate)
            if each.passed:
                ElementTree.SubElement(test, "system-out").text = each.sentence
            else:
                failure = ElementTree.SubElement(test, "failure", message=each.sentence)
                failure.text = each.sentence
    tests.set("tests", str(len(tests)))
    tests.set("failures", str(sum(test.find("failure") is not None for test in tests)))
    tests.set("errors", str(int(error is not None)))
    root = ElementTree.Element("testsuites")
    root.append(tests)
    ElementTree.indent(root)
    text = ElementTree.tostring(root, encoding="unicode")
    write_text(path, f'<?xml version="1.0" encoding="utf-8"?>\n{text}\n')


def annotation(problem: Problem) -> str:
    """Return a problem as a workflow command of GitHub, which shows it at the run.

    Syntax: "Workflow commands for GitHub Actions", with its escapes.
    """
    text = str(problem).replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")
    return f"::error title=lrc {problem.code}::{text}"


def on_github() -> bool:
    """Return whether the command runs in a workflow of GitHub."""
    return os.environ.get("GITHUB_ACTIONS") == "true"
