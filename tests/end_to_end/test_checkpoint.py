"""What users do with a compressed checkpoint after loading it."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from lrc.compressors.layers import Component, CompressedLinear

# transformers wants every module named where one of them is offloaded.
DISK = {
    "model.embed_tokens": "cpu",
    "model.rotary_emb": "cpu",
    "model.layers.0": "cpu",
    "model.layers.1": "disk",
    "model.norm": "cpu",
    "lm_head": "cpu",
}
ROUNDING = 5e-5
"""Of products in another order, for logits up to 5; measured 4e-6."""


@pytest.fixture(scope="module")
def run(families):
    return families("llama")


@pytest.fixture(scope="module")
def expected(run, sample):
    return logits_of(run.load(), sample)


def logits_of(model: Any, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        device = model.get_input_embeddings().weight.device
        logits: Tensor = model(tokens.to(device if device.type == "cuda" else "cpu")).logits
        return logits.float().cpu()


def names_in(folder: Path) -> set[str]:
    names: set[str] = set()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as shard:
            names.update(shard.keys())
    return names


def loss_of(model: Any, tokens: Tensor) -> Tensor:
    loss: Tensor = model(tokens, labels=tokens).loss
    return loss


@pytest.mark.parametrize(
    "device_map",
    ["auto", "cpu", {"": "cpu"}, DISK],
    ids=["auto", "cpu", "explicit", "disk"],
)
def test_every_device_map_gives_the_same_logits(run, sample, expected, tmp_path, device_map):
    model = run.load(device_map=device_map, offload_folder=tmp_path / "offload")
    offloaded = any(p.is_meta for p in model.parameters())
    assert offloaded == ("disk" in str(device_map))
    logits = logits_of(model, sample)
    if device_map == "auto" and torch.cuda.is_available():  # a GPU adds in another order
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    elif offloaded:  # what is on disk does not share a product
        torch.testing.assert_close(logits, expected, rtol=0, atol=ROUNDING)
    else:
        assert torch.equal(logits, expected)


# transformers warns that saving needs memory for one shard.
@pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded modules:UserWarning")
def test_a_model_on_disk_is_saved_completely(run, sample, expected, tmp_path):
    model = run.load(device_map=DISK, offload_folder=tmp_path / "offload")
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.float32)
    assert torch.equal(logits_of(again, sample), expected)


def test_a_skeleton_needs_no_weights(run):
    model = run.load(device_map="meta")
    assert all(p.is_meta for p in model.parameters())
    assert model.model.layers[0].mlp.up_proj.config.types == "low_rank"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtype_at_load_converts_the_factors(run, sample, expected, dtype):
    """The way to another precision: transformers refuses `.half()` on any quantized model."""
    model = run.load(dtype=dtype)
    layer = model.model.layers[0].mlp.up_proj
    a, b = layer.low_rank.a, layer.low_rank.b
    assert (a.weight.dtype, b.weight.dtype) == (dtype, dtype)
    assert layer.state_dict()["weight"].dtype == torch.uint8  # the sentinel is not converted
    # Measured 0.008 and 0.09, of logits up to 5.
    bound = {torch.float16: 0.02, torch.bfloat16: 0.2, torch.float32: 0.0}[dtype]
    assert (logits_of(model, sample) - expected).abs().max() <= bound


def test_saving_again_changes_nothing(run, sample, expected, tmp_path):
    run.load().save_pretrained(tmp_path)
    blocks = [
        json.loads((folder / "config.json").read_text())["quantization_config"]
        for folder in (run.checkpoint, tmp_path)
    ]
    assert blocks[0] == blocks[1]
    assert names_in(tmp_path) == names_in(run.checkpoint)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert torch.equal(logits_of(again, sample), expected)


def test_saving_again_in_small_shards(run, sample, expected, tmp_path):
    run.load().save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert torch.equal(logits_of(again, sample), expected)


def test_layers_with_the_same_input_share_a_product(run, sample):
    model = run.load()
    before = sum(p.nbytes for p in model.parameters())
    groups = {c.siblings for c in model.modules() if isinstance(c, Component)} - {None}
    assert sorted(len(group.members) for group in groups) == [2, 2, 3, 3]  # two layers
    logits_of(model, sample)
    assert all(group._confirmed for group in groups)
    assert sum(p.nbytes for p in model.parameters()) == before


def test_factors_learn_as_ordinary_parameters(run, sample):
    model = run.load().train()
    factors = [p for n, p in model.named_parameters() if n.endswith((".a.weight", ".b.weight"))]
    assert len(factors) == 2 * 14
    before = loss_of(model, sample)
    before.backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in factors)
    torch.optim.SGD(factors, lr=0.02).step()
    assert loss_of(model, sample) < before


# PEFT asks for an attribute that the newest transformers has renamed.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("name", ["llama", "opt-bare"])
def test_lora_on_the_factors_trains_and_merges(families, sample, tmp_path, name):
    model = families(name).load()
    before = logits_of(model, sample)
    config = peft.LoraConfig(
        r=2, target_modules=r".*\.[qv]_proj\.low_rank\.(a|b)", task_type="CAUSAL_LM"
    )
    adapted = peft.get_peft_model(model, config)
    trained = [p for p in adapted.parameters() if p.requires_grad]
    assert len(trained) == 2 * 2 * 2 * 2  # layers, linears, factors, LoRA's own two
    # Layers with adapters multiply alone, others together with their siblings.
    torch.testing.assert_close(logits_of(adapted, sample), before, rtol=0, atol=ROUNDING)
    optimizer = torch.optim.Adam(trained, lr=0.01)
    first = loss_of(adapted, sample)
    for _ in range(2):  # LoRA's B starts at zero, so its A moves in the second step only
        optimizer.zero_grad()
        loss_of(adapted, sample).backward()
        optimizer.step()
    assert loss_of(adapted, sample) < first
    tuned = logits_of(adapted.eval(), sample)
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(logits_of(merged, sample), tuned, rtol=0, atol=1e-4)
    merged.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert torch.equal(logits_of(again, sample), logits_of(merged, sample))


PLAIN = """
import sys, torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
model, found = AutoModelForCausalLM.from_pretrained(
    sys.argv[1], dtype=torch.float32, output_loading_info=True
)
assert not any(found.values()), found
tensors = load_file(sys.argv[2])
with torch.no_grad():
    print(float((model(tensors["sample"]).logits - tensors["logits"]).abs().max()))
"""


def test_a_dequantized_model_needs_no_lrc(run, sample, expected, tmp_path, without_lrc):
    model = run.load()
    model.dequantize()
    assert not any(isinstance(module, CompressedLinear) for module in model.modules())
    model.save_pretrained(tmp_path / "dense")
    config = json.loads((tmp_path / "dense/config.json").read_text())
    assert "quantization_config" not in config
    source = json.loads((run.source / "config.json").read_text())
    assert {**config, "dtype": None} == {**source, "dtype": None}
    assert names_in(tmp_path / "dense") == names_in(run.source)
    save_file({"sample": sample, "logits": expected}, tmp_path / "logits.safetensors")
    ended = without_lrc(PLAIN, tmp_path / "dense", tmp_path / "logits.safetensors")
    assert ended.returncode == 0, ended.stderr
    assert float(ended.stdout) <= 1e-4  # measured 5e-6, of logits up to 5


def test_tied_embeddings_stay_tied_and_are_stored_once(families, tmp_path):
    run = families("llama-tied")
    assert "lm_head.weight" not in names_in(run.checkpoint)
    model = run.load()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.save_pretrained(tmp_path)
    assert names_in(tmp_path) == names_in(run.checkpoint)


# lm-eval hands the checkpoint's own block to transformers, which says that it was there already.
@pytest.mark.filterwarnings("ignore:You passed `quantization_config`:UserWarning")
def test_lm_eval_loads_it_by_path(run):
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    model = HFLM(pretrained=str(run.checkpoint), dtype="float32", device="cpu", batch_size=1)
    request = Instance("loglikelihood", {}, ("The statement", " is executed"), 0)
    ((score, _),) = model.loglikelihood([request], disable_tqdm=True)
    assert score < 0
    assert isinstance(model.model.model.layers[0].mlp.up_proj, CompressedLinear)
