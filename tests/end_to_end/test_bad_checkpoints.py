"""A checkpoint that is damaged, tampered with or too new is refused by name, never half loaded."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

EVAL = ("--perplexity", "python-docs", "--window", 32, "--windows", 1, "-q")


@pytest.fixture(scope="module")
def sound(
    tiny_model_folder: Path,
    tiny_recipe: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """Return a sound checkpoint. Shared: copy it before changing anything."""
    from lrc.compressors.io.machine import Machine
    from lrc.compressors.pipeline import compress
    from lrc.configs.load import load_recipe

    output = tmp_path_factory.mktemp("sound") / "out"
    compress(load_recipe(tiny_recipe(tiny_model_folder, output)), Machine(device="cpu"))
    return output / "checkpoint"


@pytest.fixture
def checkpoint(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "checkpoint"))


def edit(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def rewrite(checkpoint: Path) -> None:
        config = json.loads((checkpoint / "config.json").read_text())
        change(config)
        (checkpoint / "config.json").write_text(json.dumps(config))

    return rewrite


def edit_block(**changes: Any) -> Callable[[Path], None]:
    return edit(lambda config: config["quantization_config"].update(changes))


def edit_first_component(**changes: Any) -> Callable[[Path], None]:
    def change(config: dict[str, Any]) -> None:
        module = next(iter(config["quantization_config"]["modules"].values()))
        module["components"][0].update(changes)

    return edit(change)


def rename_tensor(old: str, new: str | None) -> Callable[[Path], None]:
    def rewrite(checkpoint: Path) -> None:
        tensors = load_file(checkpoint / "model.safetensors")
        moved = tensors.pop(old)
        tensors |= {new: moved} if new else {}
        save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})

    return rewrite


def write(name: str, content: str) -> Callable[[Path], object]:
    return lambda checkpoint: (checkpoint / name).write_text(content)


def remove(name: str) -> Callable[[Path], object]:
    return lambda checkpoint: (checkpoint / name).unlink()


def cut(length: int) -> Callable[[Path], object]:
    return lambda checkpoint: os.truncate(checkpoint / "model.safetensors", length)


def lose_a_shard(checkpoint: Path) -> None:
    names = list(load_file(checkpoint / "model.safetensors"))
    first, second = (f"model-0000{n}-of-00002.safetensors" for n in (1, 2))
    (checkpoint / "model.safetensors").rename(checkpoint / first)
    weight_map = dict.fromkeys(names, first) | {names[-1]: second}
    index = {"metadata": {}, "weight_map": weight_map}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))


LAYER = "model.layers.0.mlp.up_proj"
DAMAGED: dict[str, tuple[Callable[[Path], object], str, tuple[str, ...]]] = {
    "truncated": (
        cut(50_000),
        "invalid-checkpoint",
        ("model.safetensors: not a whole safetensors file", "again"),
    ),
    "empty": (
        cut(0),
        "invalid-checkpoint",
        ("model.safetensors: not a whole safetensors file",),
    ),
    "no weights": (remove("model.safetensors"), "invalid-checkpoint", ("holds no weights",)),
    "a shard missing": (
        lose_a_shard,
        "invalid-checkpoint",
        ("model-00002-of-00002.safetensors: missing",),
    ),
    "no config": (
        remove("config.json"),
        "invalid-checkpoint",
        ("no config.json", "OUTPUT/checkpoint"),
    ),
    "config not JSON": (
        write("config.json", "{"),
        "invalid-checkpoint",
        ("config.json: not a readable JSON file",),
    ),
    "config a list": (
        write("config.json", "[1]"),
        "invalid-checkpoint",
        ("config.json: must be a JSON object",),
    ),
    "older": (edit_block(format_version=1), "old-version", ("format_version is 1", "recipe")),
    "newer": (edit_block(format_version=9), "newer-version", ("format_version is 9", "upgrade")),
    "no version": (edit_block(format_version="a"), "invalid-version", ("got 'a'",)),
    "rank edited": (edit_first_component(rank=3), "tensor-mismatch", ("config.json",)),
    "rank no number": (edit_first_component(rank="3"), "invalid-config", ("'rank'", "got '3'")),
    "component unknown": (
        edit_first_component(type="tensor_train"),
        "invalid-config",
        ("low_rank, pivoted_low_rank", "got 'tensor_train'", "newer lrc", "upgrade"),
    ),
    "modules a list": (edit_block(modules=[1]), "invalid-config", ("modules must map names",)),
    "block lost": (
        edit(lambda config: config.pop("quantization_config")),
        "invalid-checkpoint",
        ("config.json: has lost its quantization_config", "again"),
    ),
    "tensor renamed": (
        rename_tensor(f"{LAYER}.low_rank.a.weight", "other"),
        "tensor-mismatch",
        (LAYER, "low_rank.a.weight"),
    ),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_checkpoint_is_refused_by_name(lrc, checkpoint: Path, case: str) -> None:
    spoil, code, words = DAMAGED[case]
    spoil(checkpoint)
    lrc("inspect", checkpoint).refuses(1, str(checkpoint), *words, code=code)
    lrc("eval", checkpoint, *EVAL).refuses(1, str(checkpoint), *words, code=code)


def test_a_missing_tensor_is_not_replaced_by_random_numbers(lrc, checkpoint: Path) -> None:
    rename_tensor("model.norm.weight", None)(checkpoint)
    lrc("eval", checkpoint, *EVAL).refuses(1, str(checkpoint), "lack model.norm.weight", "again")


def test_no_tokenizer(lrc, checkpoint: Path) -> None:
    for file in checkpoint.glob("token*"):
        file.unlink()
    lrc("eval", checkpoint, *EVAL).refuses(1, str(checkpoint), "no tokenizer", "tokenizer.json")


def flip_a_bit(name: str) -> Callable[[Path], object]:
    def flip(checkpoint: Path) -> None:
        content = bytearray((checkpoint / name).read_bytes())
        content[-2] ^= 1
        (checkpoint / name).write_bytes(content)

    return flip


TAMPERED: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "weights": (flip_a_bit("model.safetensors"), ("model.safetensors has changed",)),
    "tokenizer": (flip_a_bit("tokenizer.json"), ("tokenizer.json has changed",)),
    "recipe": (flip_a_bit("lrc/recipe.yaml"), ("lrc/recipe.yaml has changed",)),
    "plan": (write("lrc/plan.json", "{"), ("lrc/plan.json has changed",)),
    "config": (edit(lambda c: c.update(rope_theta=1.0)), ("config.json has changed",)),
    "a file missing": (remove("generation_config.json"), ("generation_config.json is missing",)),
    "manifest missing": (remove("lrc/manifest.json"), ("has no lrc/manifest.json", "again")),
    "manifest damaged": (write("lrc/manifest.json", "{"), ("manifest.json: not a readable JSON",)),
    "manifest empty": (write("lrc/manifest.json", "{}"), ("manifest.json: holds no hashes",)),
}


@pytest.mark.parametrize("case", TAMPERED)
def test_verify_names_what_has_changed(lrc, checkpoint: Path, case: str) -> None:
    assert lrc("inspect", checkpoint, "--verify").code == 0
    spoil, words = TAMPERED[case]
    spoil(checkpoint)
    lrc("inspect", checkpoint, "--verify").refuses(1, str(checkpoint), *words, "again")


def test_a_folder_without_a_checkpoint(lrc, tiny_model_folder: Path, tmp_path: Path) -> None:
    lrc("inspect", tmp_path / "no").refuses(2, "no such folder", "OUTPUT/checkpoint")
    lrc("inspect", tiny_model_folder).refuses(1, "not one that lrc compressed", "`lrc eval`")
    lrc("inspect", tmp_path).refuses(1, "no checkpoint here (no config.json)")


def test_a_bad_checkpoint_is_found_before_a_good_one_is_measured(
    lrc, sound: Path, checkpoint: Path
) -> None:
    cut(50_000)(checkpoint)
    ended = lrc("eval", sound, checkpoint, *EVAL[:-1])
    ended.refuses(1, str(checkpoint), "not a whole safetensors file")
    assert "perplexity" not in ended.err
