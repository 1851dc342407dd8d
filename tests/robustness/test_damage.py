"""A checkpoint in which one byte is wrong is refused, or loads as if nothing had happened.

Every storage form is compressed once and damaged at random positions, one at a time. Positions are
drawn by kind of file, because nearly all bytes are weights.
"""

import json
import random
import shutil
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from lrc.compressors.checkpoint import assemble
from lrc.compressors.checkpoint.reader import load_checkpoint, load_tokenizer
from lrc.compressors.checkpoint.writer import write_weights
from lrc.compressors.io.machine import Machine
from lrc.compressors.pipeline import compress
from lrc.configs.errors import CheckpointError
from lrc.configs.load import load_recipe

INT4 = {"quantize": {"method": "rtn", "bits": 4, "group_size": 8}}
SLICE = {"keep": 0.9, "width_multiple": 1}
MIXED = {"method": "mixed", "keep": 0.5, "components": ["pivoted_low_rank+sparse"]}
JOINT = {"method": "mixed", "keep": 0.3, "schemes": ["int8", "int3-g16"], "embeddings": "int8"}

FORMS: dict[str, list[dict[str, Any]]] = {
    "low_rank": [{"decompose": {"method": "svd-llm", "keep": 0.6}}],
    "low_rank, shared": [{"decompose": {"method": "basis-sharing", "keep": 0.6}}],
    "low_rank, int4": [{"decompose": {"method": "svd-llm", "keep": 0.8}}, INT4],
    "pivoted_low_rank": [{"decompose": {"method": "kfac", "keep": 0.6}}],
    "pivoted_low_rank+sparse": [{"decompose": MIXED}],
    "sparse": [{"decompose": {"method": "magnitude", "keep": 0.6}}],
    "sparse, 2:4, int4": [
        {"decompose": {"method": "magnitude", "pattern": "2:4", "keep": 0.6}},
        INT4,
    ],
    "semi_structured": [{"decompose": {"method": "magnitude", "pattern": "n:8", "keep": 0.6}}],
    "dictionary": [{"decompose": {"method": "compot", "keep": 0.6}}],
    "dictionary, shared": [{"decompose": {"method": "cospadi", "keep": 0.6}}],
    "block_sparse": [{"quantize": {"method": "gqsa", "bits": 4, "group_size": 16}}],
    "dense, asymmetric": [{"quantize": {"method": "rtn", "bits": 3, "symmetric": False}}],
    "dense, correction": [{"quantize": {"method": "rtn", "low_rank_correction": {"rank": 4}}}],
    "joint, int8 embedding": [{"decompose": JOINT}],
    "two shards": [{"decompose": {"method": "svd-llm", "keep": 0.8}}],
    "plain integers": [INT4],
    "plain, sliced": [{"slice": {"method": "modegpt", **SLICE}}],
    "sliced, uneven": [{"slice": {"method": "modegpt", "uniform": False, **SLICE}}],
    "sliced, by block": [{"slice": {"method": "slicegpt", "rotations": "block", **SLICE}}],
}
# Damage to whole files does not depend on the type of a component.
EXCHANGED = ("low_rank", "two shards", "plain integers", "plain, sliced", "sliced, by block")
POSITIONS = {
    "values": 9,
    "headers": 5,
    "config": 5,
    "tokenizer": 3,
    "manifest": 3,
    "report": 2,
    "recipe and plan": 2,
}
"""Kind of bytes -> how many of each form are damaged: 29 for each of 19 forms, 551 in all."""
PROMPT = "The function"


class Checkpoint:
    """A sound checkpoint, and what it computes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.plain = json.loads((folder / "lrc/manifest.json").read_text())["plain"]
        self.expected = self.outputs(load_checkpoint(folder))

    def outputs(self, model: Any) -> tuple[Tensor, Any, Any]:
        """Return everything that a user sees: logits, text and generation settings."""
        tokens = load_tokenizer(self.folder)(PROMPT, return_tensors="pt")
        with torch.no_grad():
            logits = model(**tokens).logits
        return logits, tokens["input_ids"], model.generation_config.to_dict()

    def computes_the_same(self, model: Any) -> bool:
        """Return whether a model, and the tokenizer in its folder, give the same bits."""
        found, expected = self.outputs(model), self.expected
        same = torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
        return same and found[2] == expected[2]

    def positions(self, kind: str) -> list[tuple[Path, range]]:
        """Return files and the places in them that belong to a kind of bytes."""
        weights = sorted(self.folder.glob("*.safetensors"))
        if kind in ("values", "headers"):
            sizes = [(file, file.stat().st_size, _header_size(file)) for file in weights]
            whole = kind == "values"
            return [(f, range(head, size) if whole else range(head)) for f, size, head in sizes]
        names = {
            "config": ["config.json", *(f.name for f in self.folder.glob("*.index.json"))],
            "tokenizer": ["tokenizer.json", "tokenizer_config.json", "generation_config.json"],
            "manifest": ["lrc/manifest.json"],
            "report": ["lrc/report.json", "README.md"],
            "recipe and plan": ["lrc/recipe.yaml", "lrc/recipe.given.yaml", "lrc/plan.json"],
        }[kind]
        files = [self.folder / name for name in names]
        return [(file, range(file.stat().st_size)) for file in files]


def _header_size(file: Path) -> int:
    with file.open("rb") as raw:
        return 8 + int.from_bytes(raw.read(8), "little")


@pytest.fixture
def make(
    tiny_model_folder: Path,
    tiny_recipe: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[..., Checkpoint]:
    """Compress a form."""

    def compressed(form: str, name: str = "run", **changes: Any) -> Checkpoint:
        if form == "two shards":
            small = partial(write_weights, max_shard_bytes=100_000)
            monkeypatch.setattr(assemble, "write_weights", small)
        recipe = tiny_recipe(tiny_model_folder, tmp_path / name, stages=FORMS[form], **changes)
        compress(load_recipe(recipe), Machine(device="cpu"))
        return Checkpoint(tmp_path / name / "checkpoint")

    return compressed


@pytest.fixture
def outcome(lrc: Callable[..., Any]) -> Callable[[Checkpoint, Path], str]:
    """Say how a damaged copy of a checkpoint is treated, and hold every way of using it to that."""

    def find(sound: Checkpoint, changed: Path) -> str:
        folder = str(sound.folder)
        verified = lrc("inspect", folder, "--verify")
        if verified.code:
            verified.refuses(1)
        used = lrc("generate", folder, "--prompt", PROMPT, "--tokens", 1)
        if used.code:
            used.refuses(1)
        stock = _load(AutoModelForCausalLM.from_pretrained, folder)
        if isinstance(stock, Exception):
            # transformers itself reads these before it calls lrc, and looks for the weights.
            parsed = changed.name in ("config.json", "generation_config.json")
            parsed |= changed.name.endswith(".index.json") or not changed.exists()
            assert sound.plain or parsed or isinstance(stock, CheckpointError), repr(stock)
        elif not sound.plain and used.code:  # the tokenizer is loaded separately
            raise AssertionError(f"from_pretrained accepts {changed}")
        if used.code:
            return "refused by loading"
        # Loaded: it must be the same model, even where verification fails.
        if not sound.computes_the_same(load_checkpoint(sound.folder)):
            return "undetected"
        return "refused by --verify" if verified.code else "harmless"

    return find


def _load(load: Callable[..., Any], *arguments: Any) -> Any:
    try:
        return load(*arguments)
    except Exception as error:
        return error


def damage(sound: Checkpoint, kind: str, choice: random.Random) -> tuple[Path, int, bytes, bytes]:
    """Return a file, a position, the byte there, and another one to put there."""
    places = sound.positions(kind)
    file, inside = choice.choices(places, weights=[len(inside) for _, inside in places])[0]
    if kind in ("config", "tokenizer", "report", "recipe and plan"):
        file, inside = choice.choice(places)
    position = choice.choice(inside)
    old = file.read_bytes()[position]
    # Half of the damage is one bit; the other half is any byte, of text another printable one.
    flipped = old ^ (1 << choice.randrange(8))
    printable = choice.choice([b for b in range(33, 127) if b != old])
    new = flipped if choice.random() < 0.5 else printable
    return file, position, bytes([old]), bytes([new])


def put(file: Path, position: int, byte: bytes) -> None:
    with file.open("r+b") as raw:
        raw.seek(position)
        raw.write(byte)


def unnoticed_without_hashes(sound: Checkpoint, tmp_path: Path) -> bool:
    """Return whether a copy without the folder lrc loads as another model."""
    hidden = tmp_path / "hidden"
    (sound.folder / "lrc").rename(hidden)
    try:
        model = _load(load_checkpoint, sound.folder)
        if isinstance(model, Exception):
            assert isinstance(model, CheckpointError), repr(model)
            return False
        same = _load(sound.computes_the_same, model)
        return same is not True
    finally:
        hidden.rename(sound.folder / "lrc")


def run(
    sound: Checkpoint,
    outcome: Callable[[Checkpoint, Path], str],
    positions: dict[str, int],
    choice: random.Random,
    tmp_path: Path,
) -> tuple[Counter[str], list[str]]:
    """Damage a checkpoint; return the number of outcomes, and what was undetected."""
    counts: Counter[str] = Counter()
    undetected = []
    for kind, number in positions.items():
        for _ in range(number):
            file, position, old, new = damage(sound, kind, choice)
            put(file, position, new)
            found = outcome(sound, file)
            counts[found] += 1
            # The model card is not checked, and white space of the report means nothing.
            assert found != "harmless" or file.name in ("README.md", "report.json"), file
            if found == "undetected":
                undetected.append(f"{file} at {position}: {old!r} -> {new!r}")
            if kind in ("values", "headers"):
                counts["only by hashes"] += unnoticed_without_hashes(sound, tmp_path)
            put(file, position, old)
    return counts, undetected


@pytest.mark.robustness
@pytest.mark.parametrize("form", FORMS)
def test_a_wrong_byte_is_refused_or_harmless(
    form: str,
    make: Callable[..., Checkpoint],
    outcome: Callable[[Checkpoint, Path], str],
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    sound = make(form)
    choice = random.Random(f"damage {form}")
    counts, undetected = run(sound, outcome, POSITIONS, choice, tmp_path)
    assert not undetected
    row = {"form": form, "bytes": sum(POSITIONS.values())}
    columns = ("refused by loading", "refused by --verify", "harmless", "undetected")
    row |= {name: counts[name] for name in columns}
    record_property("table one wrong byte", row | {"only by hashes": counts["only by hashes"]})


@pytest.mark.robustness
@pytest.mark.parametrize("form", EXCHANGED)
def test_truncated_and_exchanged_files_are_refused(
    form: str,
    make: Callable[..., Checkpoint],
    outcome: Callable[[Checkpoint, Path], str],
    tiny_llama: Callable[..., Any],
    make_tokenizer: Callable[..., Any],
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    other_model = tmp_path / "other-model"
    tiny_llama(seed=1).save_pretrained(other_model)
    make_tokenizer(bos=True).save_pretrained(other_model)
    sound, other = make(form), make(form, "other", model=str(other_model)).folder
    choice, counts = random.Random(f"files {form}"), Counter[str]()
    for file in sorted(path for path in sound.folder.rglob("*") if path.is_file()):
        if file.name == "README.md":
            continue
        content, name = file.read_bytes(), file.relative_to(sound.folder)
        ours, theirs = content[: choice.randrange(len(content))], (other / name).read_bytes()
        for changed in {ours, b"", theirs} - {content}:
            file.write_bytes(changed)
            found = outcome(sound, file)
            assert found in ("refused by loading", "refused by --verify"), (file, found)
            counts[found] += 1
        file.unlink()
        if name.as_posix() != "lrc/report.json":  # is written last
            assert outcome(sound, file) in ("refused by loading", "refused by --verify"), file
        file.write_bytes(content)
    assert outcome(sound, sound.folder / "config.json") == "harmless"
    shutil.rmtree(other)
    row = {name: counts[name] for name in ("refused by loading", "refused by --verify")}
    record_property("table truncated, empty and exchanged files", {"form": form, **row})


def test_a_sample_of_wrong_bytes(
    make: Callable[..., Checkpoint], outcome: Callable[[Checkpoint, Path], str], tmp_path: Path
) -> None:
    """What `make test` runs of the above."""
    sound = make("pivoted_low_rank+sparse")
    choice = random.Random("sample")
    counts, undetected = run(sound, outcome, dict.fromkeys(POSITIONS, 2), choice, tmp_path)
    assert not undetected
    assert counts["refused by loading"] >= 8
