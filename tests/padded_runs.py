"""What runs of encoders and of encoder-decoder models, which read padded texts, have in common."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file, save_file
from tests.fresh_processes import FreshProcesses
from tests.tiny_encoders import WORDS, tiny_words
from torch import Tensor

SCRIPT = """
import json, sys
import torch
import lrc
import transformers
from safetensors.torch import load_file

inputs, found = load_file(sys.argv[2]), {}
for name, (folder, kind) in json.loads(sys.argv[1]).items():
    model = getattr(transformers, kind).from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        out = model(**inputs)
    out = out.logits if "logits" in out else out[0][inputs["attention_mask"].bool()]
    found[name] = out.tolist()
print(json.dumps(found))
"""


def write_task_recipe(
    folder: Path, model: Path, stage: dict[str, Any], task: dict[str, Any], **changes: Any
) -> Path:
    """Write a recipe into the folder of its output; `changes` replace top-level keys."""
    recipe = {
        "model": {"path": str(model), "dtype": "float32"},
        "calibration": {"task": {**task, "length": 16}, "samples": 20},
        "stages": [stage],
        "evaluate": {"task": {**task, "length": 16}},
        "output": str(folder / "run"),
        **changes,
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return path


def padded_batch() -> dict[str, Tensor]:
    """Return the inputs of an encoder for a long and a short text."""
    found = tiny_words()([" ".join(WORDS), "good film"], padding=True, return_tensors="pt")
    return {key: found[key] for key in ("input_ids", "attention_mask")}


@torch.no_grad()
def outputs_of(model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    """Return logits, or the hidden states of all tokens but padding."""
    found = model(**inputs)
    outputs: Tensor = found.logits if "logits" in found else found[0]
    return outputs if "logits" in found else outputs[inputs["attention_mask"].bool()]


def fresh_outputs(
    checkpoints: Mapping[str, tuple[Path, str]],
    inputs: dict[str, Tensor],
    scratch: Path,
    with_lrc: FreshProcesses,
) -> dict[str, list[Any]]:
    """Load checkpoints in a process without anything of this one; return their outputs.

    `checkpoints` are folders and classes of transformers.
    """
    save_file(inputs, scratch / "inputs.safetensors")
    folders = {name: (str(folder), kind) for name, (folder, kind) in checkpoints.items()}
    ended = with_lrc(SCRIPT, json.dumps(folders), scratch / "inputs.safetensors")
    assert ended.returncode == 0, ended.stderr
    found: dict[str, list[Any]] = json.loads(ended.stdout.splitlines()[-1])
    return found


@torch.no_grad()
def replace_weights_(dense: Any, weights: Mapping[str, Tensor], checkpoint: Path) -> None:
    """Give a dense model the weights that are compressed, and the biases of a checkpoint."""
    for name, weight in weights.items():
        dense.get_submodule(name).weight.copy_(weight)
    biases = load_file(checkpoint / "model.safetensors")
    for name, parameter in dense.named_parameters():
        if name.endswith(".bias"):
            parameter.copy_(biases[name])
