"""The documentation: links, commands, recipes, keys and numbers are those of the repository."""

import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import click
import pytest
import typer
import yaml
from tests import recipe_reference

from lrc.cli.main import app
from lrc.compressors.benchmark.results import SCHEMA as BENCHMARK_SCHEMA
from lrc.compressors.evaluate.gates import check_gate_names
from lrc.compressors.methods.table import METHODS
from lrc.compressors.report import SCHEMA
from lrc.compressors.slicing import METHODS as SLICERS
from lrc.configs.load import parse_recipe
from lrc.configs.recipe import Recipe

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
GUIDE = [README, *sorted((ROOT / "docs").rglob("*.md"))]
METHOD_PAGES = sorted((ROOT / "docs/methods").glob("*.md"))
PAGES = [*GUIDE, ROOT / "BENCHMARKS.md", ROOT / "tests/benchmarks/peers.md"]
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
FENCE = re.compile(r"^ *```(\w*)\n(.*?)^ *```$", re.DOTALL | re.MULTILINE)
NUMBER = re.compile(r"\d+\.\d+(?:e\d+)?")
MOST_LINES = 350
HEAL_METHODS = ("distill", "scales", "block")


@cache
def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def prose(page: Path) -> str:
    """Return a page without its code blocks."""
    return FENCE.sub("", text_of(page))


def blocks(page: Path, *languages: str) -> Iterator[str]:
    for language, content in FENCE.findall(text_of(page)):
        if language in languages:
            yield content


@cache
def anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub gives to the headings of a page, and explicit ones."""
    found = set(re.findall(r'<a id="([^"]+)">', text_of(page)))
    for heading in re.findall(r"^#+ (.*)$", prose(page), flags=re.MULTILINE):
        words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").strip().lower()
        found.add(re.sub(r"[^\w\- ]", "", words).replace(" ", "-"))
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_and_headings(page: Path) -> None:
    for target in LINK.findall(prose(page)):
        if re.match(r"https?://", target):
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        assert path.exists(), target
        assert path.is_relative_to(ROOT), target
        assert not anchor or anchor in anchors(path), target


def test_every_page_can_be_reached_from_the_readme() -> None:
    reached, waiting = set[Path](), [README]
    while waiting:
        page = waiting.pop()
        if page in reached or page.suffix != ".md":
            continue
        reached.add(page)
        targets = (target.partition("#")[0] for target in LINK.findall(prose(page)))
        waiting += [(page.parent / name).resolve() for name in targets if name and ":" not in name]
    assert set(PAGES) <= reached


def test_the_readme_is_a_guide() -> None:
    assert len(text_of(README).splitlines()) <= MOST_LINES


def test_make_targets_that_are_named_exist() -> None:
    found = re.findall(r"(?m)^make (\w+)|`make (\w+)`", "\n".join(map(text_of, PAGES)))
    targets = {name for pair in found for name in pair if name}
    assert {"demo", "test", "model", "check"} <= targets
    makefile = text_of(ROOT / "Makefile")
    assert all(re.search(rf"^{target}:", makefile, flags=re.MULTILINE) for target in targets)


def test_files_of_the_repository_that_are_named_exist() -> None:
    named = re.compile(r"(?<![\w/.-])(?:tests|recipes|configs|compressors|cli)/[\w./-]+\.\w+")
    for page in GUIDE:
        if page.name != "development.md":  # names the files of its examples
            for name in named.findall(text_of(page)):
                assert (ROOT / name).is_file(), f"{page.name}: {name}"


def test_the_documented_report_keys_are_those_of_the_code() -> None:
    for page, schema in (("reports.md", SCHEMA), ("speed.md", BENCHMARK_SCHEMA)):
        text = text_of(ROOT / "docs" / page)
        for key, meaning in schema.items():
            assert f"| `{key}` | {meaning} |" in text, key


def test_the_page_of_recipe_keys_is_that_of_the_schema() -> None:
    page = recipe_reference.page()
    assert text_of(recipe_reference.PAGE) == page, "run `python -m tests.recipe_reference`"
    assert "| `stages` |" in page


def test_every_shipped_recipe_is_named() -> None:
    text = "\n".join(map(text_of, GUIDE))
    shipped = [path.stem for path in (ROOT / "recipes").glob("*.yaml")]
    assert len(shipped) > 30
    assert [name for name in shipped if f"`{name}`" not in text] == []


def whole_recipe() -> dict[str, object]:
    """Return the recipe of the README."""
    first = next(blocks(README, "yaml"))
    return dict(yaml.safe_load(first))


@pytest.mark.parametrize("page", GUIDE, ids=lambda page: str(page.relative_to(ROOT)))
def test_parts_of_recipes_are_valid(page: Path) -> None:
    if page.name == "development.md":  # test_worked_examples runs its recipes
        return
    for part in blocks(page, "yaml"):
        values = yaml.safe_load(part)
        if values.keys() <= Recipe.model_fields.keys():
            recipe = Recipe.model_validate({**whole_recipe(), **values})
            check_gate_names(recipe.evaluate.gates, recipe.evaluate)


def test_every_kind_of_stage_has_an_example() -> None:
    parts = (yaml.safe_load(part) for page in GUIDE for part in blocks(page, "yaml"))
    kinds = {kind for part in parts for stage in part.get("stages", ()) for kind in stage}
    assert kinds >= {"slice", "decompose", "quantize", "heal"}


def sections(page: Path) -> dict[str, str]:
    """Return the text under every heading of the second level."""
    found = re.findall(r"^## ([^\n]*)\n(.*?)(?=^## |\Z)", text_of(page), re.DOTALL | re.MULTILINE)
    return dict(found)


def test_every_method_has_a_section_with_formula_source_and_recipe() -> None:
    described = {name: text for page in METHOD_PAGES for name, text in sections(page).items()}
    described["mixed"] = text_of(ROOT / "docs/methods/mixed.md")
    for name in (*METHODS, *SLICERS, *HEAL_METHODS):
        assert name in described, name
        assert "$" in described[name], name
        assert "Source" in described[name], name
    recipes = [part for page in METHOD_PAGES for part in blocks(page, "yaml")]
    for name in (*METHODS, *SLICERS, *HEAL_METHODS):
        assert any(re.search(rf"method: {name}\b", part) for part in recipes), name


def test_measured_numbers_are_those_of_the_benchmarks() -> None:
    measured = [set(NUMBER.findall(line)) for line in text_of(ROOT / "BENCHMARKS.md").splitlines()]
    checked = 0
    for page in METHOD_PAGES:
        table = False
        for line in prose(page).splitlines():
            table = line.startswith("|") and (table or ("C4" in line and "WikiText-2" in line))
            cells = "|".join(line.split("|")[2:])  # the first cell has options
            numbers = set(NUMBER.findall(cells)) if table else set()
            if numbers:
                assert any(numbers <= of_row for of_row in measured), f"{page.name}: {line}"
                checked += 1
    assert checked > 50


def commands(page: Path) -> Iterator[tuple[list[str], bool]]:
    """Yield the arguments of every `lrc` command, and whether it is complete."""
    for content in blocks(page, "", "bash", "sh"):
        for line in re.sub(r"\\?\n +", " ", content).splitlines():
            if line.startswith("lrc "):
                words = shlex.split(line, comments=True)
                end = words.index(">") if ">" in words else len(words)
                yield words[1:end], "[" not in words[-1] and not re.search(r" \[[-K]", line)
    for code in re.findall(r"`lrc ([^`\n]+)`", prose(page)):
        yield shlex.split(code), False


def subcommand(arguments: list[str]) -> tuple[click.Command, list[str]]:
    """Return the command that arguments call, and the remaining arguments."""
    found, rest = typer.main.get_command(app), arguments
    while rest and hasattr(found, "commands") and not rest[0].startswith("-"):
        found, rest = found.commands[rest[0]], rest[1:]
    return found, rest


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_have_these_options_and_keys(page: Path) -> None:
    for arguments, complete in commands(page):
        command, rest = subcommand(arguments)
        options = {name for parameter in command.params for name in parameter.opts} | {"--help"}
        given = {word.strip("[]").partition("=")[0] for word in rest if re.match(r"\[?--?\w", word)}
        assert given <= options, arguments
        if complete:
            rest = [word for word in rest if word != "..."]
            parsed = command.make_context(str(command.name), rest)
            if command.name in ("plan", "compress"):
                overrides = parsed.params["overrides"] or []
                placeholder = re.compile(r"=[A-Z]+$")
                overrides = [each for each in overrides if not placeholder.search(each)]
                check_recipe(parsed.params["recipe"], overrides)


def check_recipe(path: Path, overrides: list[str]) -> None:
    """Apply overrides to a recipe of the repository or of the README."""
    if path.name == "my-recipe.yaml":
        parse_recipe(next(blocks(README, "yaml")), name=str(path), overrides=overrides)
    elif (ROOT / path).is_file():
        parse_recipe(text_of(ROOT / path), name=str(path), overrides=overrides)


def test_commands_were_found() -> None:
    found = [arguments[0] for page in PAGES for arguments, complete in commands(page) if complete]
    assert {"plan", "compress", "eval", "export", "bench", "delta", "sweep"} <= set(found)
