"""LoRA adapters of PEFT on slices, compressed experts, and drafters without embedding.

`test_peft.py` tests every component of linear layers.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from tests.shared_runs import checkpoints_of
from tests.tiny_experts import save_experts, tiny_experts
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaForCausalLM

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
def checkpoint(
    tiny_llama: Callable[..., LlamaForCausalLM],
    make_tokenizer: Callable[..., Any],
    tiny_recipe: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[str], Path]:
    """Compress the model of a result, once."""
    base = tmp_path_factory.mktemp("results")
    made: dict[str, Callable[[str], Path]] = {}

    def run(name: str) -> Path:
        family, _ = RESULTS[name]
        if family not in made:
            model = (
                tiny_llama(tie_word_embeddings=True) if family == "llama" else tiny_experts(family)
            )
            save_experts(model, make_tokenizer(), base / family / "source")
            stages = {other: each for other, (its, each) in RESULTS.items() if its == family}
            made[family] = checkpoints_of(base / family, tiny_recipe, stages)
        found = made[family](name)
        if name == "drafter" and not (found.parent / "drafter").exists():
            parent = str(base / family / "source")
            (found.parent / "drafter").mkdir()
            write_drafter(found, parent, found.parent / "drafter", lambda *_: None)
        return found.parent / "drafter" if name == "drafter" else found

    return run


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


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
    config = peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(model, config)
    names = {n for n, m in adapted.base_model.model.named_modules() if hasattr(m, "lora_A")}
    expected = {f"model.layers.{i}.{leaf}" for i in (0, 1) for leaf in ATTENTION}
    expected |= {
        f"model.layers.{i}.{leaf}" for i in (0, 1) for leaf in MLP if "llama" in folder.parts
    }
    for experts, module in split_modules(adapted.base_model.model):
        leaves = ("gate_up_proj", "down_proj")
        expected |= {f"{experts}.{n}.{leaf}" for n in range(module.n_experts) for leaf in leaves}
    if name not in ("reap", "ream"):  # where PEFT adapts 3-D parameters and routers, too
        assert names == expected
    assert names >= expected
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
