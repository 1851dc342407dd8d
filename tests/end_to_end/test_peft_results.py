"""LoRA adapters of PEFT on slices, compressed experts, and drafters without embedding.

`test_peft.py` tests every component of linear layers.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from tests.tiny_experts import tiny_experts
from torch import Tensor
from transformers import AutoModelForCausalLM

from lrc.compressors.export.drafter_folder import write_drafter
from lrc.compressors.layers.experts import split_modules

# PEFT asks for an attribute that the newest transformers has renamed.
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]


def sliced(method: str, keep: float = 0.8, **options: Any) -> list[dict[str, Any]]:
    return [{"slice": {"method": method, "keep": keep, **options}}]


SVD = {"decompose": {"method": "svd", "keep": 0.6}}
MODEGPT = {"heads": False, "width_multiple": 2}
RESULTS: dict[str, tuple[str, list[dict[str, Any]]]] = {
    "modegpt": ("llama", sliced("modegpt", **MODEGPT)),
    "uneven": ("llama", sliced("modegpt", **MODEGPT, uniform=False, allocation="lagrangian")),
    "rotations": ("llama", sliced("slicegpt", 0.9, rotations="block", width_multiple=1)),
    "reap": ("qwen3_moe", sliced("reap")),
    "ream": ("qwen3_moe", sliced("ream")),
    "factors of experts": ("qwen3_moe", [SVD]),
    "integers of experts": ("gpt_oss", [{"quantize": {"method": "rtn", "bits": 4}}]),
    "drafter": ("llama", [SVD]),
}
ATTENTION = [f"self_attn.{name}_proj" for name in "qkvo"]
MLP = [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
TOKENS = torch.arange(2, 42)[None]


@pytest.fixture(scope="module")
def checkpoint(compressed: Callable[..., Any]) -> Callable[[str], Path]:
    """Compress the model of a result, once."""
    made: dict[str, Callable[[str], Path]] = {}

    def run(name: str) -> Path:
        family, _ = RESULTS[name]
        if family not in made:
            stages = {other: each for other, (its, each) in RESULTS.items() if its == family}
            model = None if family == "llama" else tiny_experts(family)
            made[family] = compressed(stages, model)
        found = made[family](name)
        if name != "drafter":
            return found
        drafter = found.parent / "drafter"
        if not drafter.exists():
            drafter.mkdir()
            write_drafter(found, str(source_of(found)), drafter, lambda *_: None)
        return drafter

    return run


def source_of(folder: Path) -> Path:
    """Return the folder of the model that a result was made from."""
    return folder.parents[1] / "source"


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def all_linear() -> peft.LoraConfig:
    return peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")


def adapted_names(model: Any) -> set[str]:
    return {n for n, m in model.base_model.model.named_modules() if hasattr(m, "lora_A")}


@torch.no_grad()
def logits_of(model: Any) -> Tensor:
    logits: Tensor = model(TOKENS).logits
    return logits


# Of PEFT, about models whose experts are 3-D parameters.
@pytest.mark.filterwarnings("ignore:The following .*_pattern keys did not match:RuntimeWarning")
@pytest.mark.parametrize("name", RESULTS)
def test_all_linear_layers_are_adapted_saved_loaded_and_merged(name, checkpoint, tmp_path) -> None:
    folder = checkpoint(name)
    model = load(folder)
    before = logits_of(model)
    config = all_linear()
    adapted = peft.get_peft_model(model, config)
    names = adapted_names(adapted)
    expected = {f"model.layers.{i}.{leaf}" for i in (0, 1) for leaf in ATTENTION}
    expected |= {
        f"model.layers.{i}.{leaf}" for i in (0, 1) for leaf in MLP if RESULTS[name][0] == "llama"
    }
    for experts, module in split_modules(adapted.base_model.model):
        leaves = ("gate_up_proj", "down_proj")
        expected |= {f"{experts}.{n}.{leaf}" for n in range(module.n_experts) for leaf in leaves}
    if name in ("reap", "ream"):  # PEFT adapts 3-D parameters and routers, too, as in the source
        dense = load(source_of(folder))
        expected = adapted_names(peft.get_peft_model(dense, all_linear()))
    assert names == expected
    assert torch.equal(logits_of(adapted), before)
    trained = [p for p in adapted.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=0.01)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = adapted(TOKENS, labels=TOKENS).loss
        loss.backward()
        losses.append(float(loss.detach()))
        optimizer.step()
    assert losses[-1] < losses[0] - 0.1
    tuned = logits_of(adapted)
    adapted.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(load(folder), tmp_path / "adapter")
    torch.testing.assert_close(logits_of(again), tuned)
    by_transformers = load(folder)
    by_transformers.load_adapter(str(tmp_path / "adapter"))
    torch.testing.assert_close(logits_of(by_transformers), tuned)
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(logits_of(merged), tuned, rtol=0, atol=1e-4)
    merged.save_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits_of(load(tmp_path / "merged")), tuned, rtol=0, atol=1e-4)
