"""Changes to the files of a checkpoint, for tests that it is refused."""

import json
import os
from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor


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
        first_module(config)["components"][0].update(changes)

    return edit(change)


def first_module(config: dict[str, Any]) -> dict[str, Any]:
    module: dict[str, Any] = next(iter(config["quantization_config"]["modules"].values()))
    return module


def rename_tensor(old: str, new: str | None) -> Callable[[Path], None]:
    def rewrite(checkpoint: Path) -> None:
        tensors = load_file(checkpoint / "model.safetensors")
        moved = tensors.pop(old)
        tensors |= {new: moved} if new else {}
        save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})

    return rewrite


def change_tensor(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[Path], None]:
    def rewrite(checkpoint: Path) -> None:
        tensors = load_file(checkpoint / "model.safetensors")
        tensors[name] = change(tensors[name])
        save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})

    return rewrite


def replace_text(name: str, old: str, new: str) -> Callable[[Path], None]:
    def rewrite(checkpoint: Path) -> None:
        text = (checkpoint / name).read_text()
        assert old in text
        (checkpoint / name).write_text(text.replace(old, new))

    return rewrite


def index_names(*names: str) -> Callable[[Path], None]:
    """Replace the weights by an index that lists these files, which are different copies."""

    def rewrite(checkpoint: Path) -> None:
        content = (checkpoint / "model.safetensors").read_bytes()
        tensors = load_file(checkpoint / "model.safetensors")
        (checkpoint / "model.safetensors").unlink()
        for number, name in enumerate(names):
            if name and "/" not in name:
                (checkpoint / name).write_bytes(content[:-1] + bytes([content[-1] ^ number]))
        index = {"metadata": {}, "weight_map": dict(zip(tensors, cycle(names)))}
        (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))

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


def flip_a_bit(name: str) -> Callable[[Path], object]:
    def flip(checkpoint: Path) -> None:
        content = bytearray((checkpoint / name).read_bytes())
        content[-2] ^= 1
        (checkpoint / name).write_bytes(content)

    return flip


def edit_manifest(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def rewrite(checkpoint: Path) -> None:
        manifest = json.loads((checkpoint / "lrc/manifest.json").read_text())
        change(manifest)
        (checkpoint / "lrc/manifest.json").write_text(json.dumps(manifest))

    return rewrite


def list_in_manifest(name: str, value: Any = "0" * 64) -> Callable[[Path], None]:
    return edit_manifest(lambda manifest: manifest["sha256"].update({name: value}))


def link_outside(checkpoint: Path) -> None:
    moved = checkpoint.with_name("elsewhere.json")
    (checkpoint / "tokenizer.json").rename(moved)
    (checkpoint / "tokenizer.json").symlink_to(moved)


def forget_weights(manifest: dict[str, Any]) -> None:
    del manifest["sha256"]["model.safetensors"]
