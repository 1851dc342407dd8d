"""What makes another run of the same folder: changed content, not when or how it was written."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lrc.compressors import run_identity


@pytest.fixture
def text(tiny_text: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(tiny_text, tmp_path / "text.txt"))


@pytest.fixture
def model(tiny_model_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model_folder, tmp_path / "model"))


@pytest.fixture
def done(
    lrc: Callable[..., Any],
    model: Path,
    text: Path,
    output: Path,
    tiny_recipe: Callable[..., Path],
) -> Path:
    """Run a recipe with its own copies of all inputs; return the recipe."""
    perplexity = {"source": str(text), "name": "english", "window": 32, "windows": 2}
    recipe = tiny_recipe(
        model,
        output,
        calibration={"source": str(text), "samples": 4, "length": 64},
        evaluate={"perplexity": [perplexity], "baselines": []},
    )
    assert lrc("compress", recipe, "-q").code == 0
    return recipe


def has_nothing_to_do(ended: Any) -> bool:
    assert ended.code == 0, ended.err
    return bool(ended.err.splitlines()[-1:] == [NOTHING])


NOTHING = "finished earlier, nothing to do; --overwrite runs it again"


def test_new_times_of_all_inputs_change_nothing(
    lrc: Callable[..., Any], done: Path, model: Path, text: Path
) -> None:
    for number, path in enumerate([*model.iterdir(), text]):
        os.utime(path, (number, 2_000_000_000 + number))  # the future included
    assert has_nothing_to_do(lrc("compress", done))


def test_a_moved_source_is_the_same(
    lrc: Callable[..., Any], done: Path, model: Path, output: Path
) -> None:
    before = (output / "checkpoint/model.safetensors").stat().st_mtime_ns
    moved = model.rename(model.with_name("moved"))
    assert lrc("compress", done, f"model={moved}", "-q").code == 0
    assert (output / "checkpoint/model.safetensors").stat().st_mtime_ns == before
    assert has_nothing_to_do(lrc("compress", done, f"model={moved}"))


@pytest.mark.parametrize(
    "name", ["model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"]
)
def test_changed_content_of_equal_length_is_another_run(
    lrc: Callable[..., Any], done: Path, model: Path, name: str
) -> None:
    path = model / name
    data, stat = path.read_bytes(), path.stat()
    other = data.replace(b'"pad_token": null', b'"pad_token":null ')
    other = other.replace(b"\n", b" ") if other == data else other
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]) if name[0] == "m" else other)
    assert path.read_bytes() != data
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    lrc("compress", done).refuses(1, f"differs in model.files.{name}", code="invalid-output")


def test_changed_calibration_text_is_another_run(
    lrc: Callable[..., Any], done: Path, text: Path
) -> None:
    stat, written = text.stat(), text.read_text()
    text.write_text(written[:-2] + ("A" if written[-2] != "A" else "B") + written[-1])
    os.utime(text, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    lrc("compress", done).refuses(1, "differs in calibration.source", code="invalid-output")


def test_changed_evaluation_text_is_measured_again(
    lrc: Callable[..., Any], done: Path, text: Path, output: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other.txt"
    other.write_text(text.read_text()[5_000:])
    options = f"evaluate.perplexity.0.source={other}"
    values = []
    for changed in (False, True):
        if changed:
            other.write_text(text.read_text()[6_000:])
        ended = lrc("compress", done, options, "--json", "-q")
        assert ended.code == 0, ended.err
        values.append(json.loads(ended.out)["evaluation"]["perplexity"]["english"])
    assert values[0]["text_sha256"] != values[1]["text_sha256"]
    assert values[0]["dense"] != values[1]["dense"]
    assert has_nothing_to_do(lrc("compress", done, options))


def test_a_comment_and_another_order_of_keys_change_nothing(
    lrc: Callable[..., Any], done: Path
) -> None:
    lines, blocks = done.read_text().splitlines(keepends=True), []
    for line in lines:
        if line[0] in " -":
            blocks[-1] += line
        else:
            blocks.append(line)
    done.write_text("# a comment\n" + "\n".join(reversed(blocks)))
    assert has_nothing_to_do(lrc("compress", done))


@pytest.mark.parametrize("package", ["lrc", "torch", "transformers"])
def test_another_version_is_another_run(
    lrc: Callable[..., Any], done: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    installed = run_identity.versions()
    monkeypatch.setattr(run_identity, "versions", lambda: installed | {package: "99.0"})
    lrc("compress", done).refuses(
        1, f"differs in versions.{package}", '"99.0" here', code="invalid-output"
    )


@pytest.mark.parametrize(
    ("key", "place"),
    [
        ("model.path", "checkpoint/dense"),
        ("model.tokenizer", "checkpoint"),
        ("calibration.source", "work/text.txt"),
        ("evaluate.perplexity.0.source", "checkpoint/text.txt"),
        ("stages.0.decompose.plan", "checkpoint/lrc/plan.json"),
        ("evaluate.tasks.include_path", "work/tasks"),
    ],
)
def test_an_input_that_an_overwrite_would_delete_is_refused(
    lrc: Callable[..., Any],
    done: Path,
    model: Path,
    text: Path,
    output: Path,
    key: str,
    place: str,
) -> None:
    if place.endswith("dense"):
        shutil.copytree(model, output / place)
    if place.endswith("text.txt"):
        shutil.copy(text, output / place)
    if place.endswith("tasks"):
        (output / place).mkdir()
    for options in ((), ("--overwrite",)):
        ended = lrc("compress", done, f"{key}={output / place}", *options)
        ended.refuses(2, str(output / place), code="contradiction", where="output")
    assert (output / "checkpoint/model.safetensors").exists()


def test_an_output_inside_the_source_leaves_the_source_as_it_is(
    lrc: Callable[..., Any], done: Path, model: Path
) -> None:
    before = {path.name: path.read_bytes() for path in model.iterdir()}
    inside = (done, f"output={model / 'out'}")
    assert lrc("compress", *inside, "-q").code == 0
    assert has_nothing_to_do(lrc("compress", *inside))
    assert lrc("compress", *inside, "seed=1", "--overwrite", "-q").code == 0
    shutil.rmtree(model / "out")
    assert {path.name: path.read_bytes() for path in model.iterdir()} == before
