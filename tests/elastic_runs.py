"""What tests of elastic checkpoints have in common: stages, tables of ranks, cuts by hand."""

import json
from math import ceil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

BUDGETS = [0.9, 0.8, 0.7, 0.6]
SVD_LLM = {"method": "svd-llm", "elastic": BUDGETS}
KFAC = {
    "method": "kfac",
    "storage": "low_rank",
    "elastic": BUDGETS,
    "compensate": {},
    "overrides": [{"match": "*.1.mlp.down_proj", "rank": 7}],
}
REFINED = {"method": "kfac", "elastic": BUDGETS}
EVENLY_REFINED = {**REFINED, "allocation": "uniform"}
STAGES = {"svd-llm": SVD_LLM, "kfac": KFAC, "refined": REFINED, "evenly refined": EVENLY_REFINED}


def block_of(folder: Path) -> dict[str, Any]:
    """Return the block of lrc in the config of a checkpoint."""
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config["quantization_config"]


def elastic_component(record: dict[str, Any]) -> dict[str, Any] | None:
    """Return the component of a configuration in JSON that can be cut."""
    found: list[dict[str, Any]] = [c for c in record["components"] if "ranks" in c]
    return found[0] if found else None


def ranks_of(folder: Path) -> dict[str, list[int]]:
    """Return the table of ranks: name of a layer -> rank at every budget."""
    found = {}
    for name, record in block_of(folder)["modules"].items():
        component = elastic_component(record)
        if component is not None:
            found[name] = component["ranks"]
    return found


def component_bits(record: dict[str, Any], rank: int) -> int:
    """Return the size of a component that can be cut, at a rank, in a model with 16 bits."""
    d_out, d_in = record["shape"]
    component = elastic_component(record)
    assert component is not None
    if "quantization" not in component or rank == 0:
        return 16 * rank * (d_out + d_in)
    words = rank * ceil(d_in / 4) + d_out * ceil(rank / 4)  # of four codes
    return 32 * words + 16 * (rank + d_out) + 2 * 2 * 64  # and scales, and two shapes


def cut_by_hand(folder: Path, out: Path, index: int) -> Path:
    """Write an ordinary checkpoint of truncated factors, without the code that is tested.

    Integers become numbers.
    """
    out.mkdir()
    tensors = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    del config["budget"], config["quantization_config"]["elastic"]
    for name, record in config["quantization_config"]["modules"].items():
        component = elastic_component(record)
        if component is None:
            continue
        rank = component["ranks"][index]
        factors = []
        for factor, columns in (("a", record["shape"][1]), ("b", component["rank"])):
            prefix = f"{name}.low_rank.{factor}.weight"
            if component.get("quantization"):
                packed, scale, _ = (
                    tensors.pop(f"{prefix}_{leaf}") for leaf in ("packed", "scale", "shape")
                )
                codes = torch.from_numpy(packed.numpy().view("uint8"))[:, :columns].float() - 128
                factors.append(codes * scale.float())
            else:
                factors.append(tensors.pop(prefix))
        if rank == 0:
            record["components"].remove(component)
            continue
        A, B = factors
        tensors[f"{name}.low_rank.a.weight"] = A[:rank].contiguous()
        tensors[f"{name}.low_rank.b.weight"] = B[:, :rank].contiguous()
        component["rank"] = rank
        component.pop("quantization", None)
        del component["ranks"]
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_text(json.dumps(config))
    return out


@torch.no_grad()
def logits(folder: Path, sample: Tensor, **options: Any) -> Tensor:
    """Return the logits of a checkpoint, which is loaded in float32."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)
    found: Tensor = model(sample).logits
    return found
