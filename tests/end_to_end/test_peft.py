"""LoRA adapters of PEFT on layers of every form: train, save, load, merge, unmerge."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from lrc.compressors.integrations.peft_lora import AdapterError
from lrc.compressors.layers import COMPONENTS, CompressedLinear

# PEFT asks for an attribute that the newest transformers has renamed.
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]


def decompose(method: str, **options: Any) -> dict[str, Any]:
    return {"decompose": {"method": method, "keep": 0.8, **options}}


def rtn(**options: Any) -> dict[str, Any]:
    return {"quantize": {"method": "rtn", **options}}


FORMS: dict[str, list[dict[str, Any]]] = {
    "low_rank": [decompose("svd")],
    "pivoted_low_rank": [decompose("svd", storage="pivoted_low_rank")],
    "sparse": [decompose("magnitude")],
    "semi_structured": [decompose("magnitude", pattern="n:8")],
    "dictionary": [decompose("compot")],
    "tensor_train": [decompose("tensor-train", rounds=1)],
    "block_sparse": [{"quantize": {"method": "gqsa", "bits": 4, "group_size": 8}}],
    "dense": [rtn(bits=4, symmetric=False, embeddings="int8")],
    "dense+low_rank": [rtn(bits=4, group_size=16, low_rank_correction={"rank": 4})],
    "integer low_rank": [decompose("svd"), rtn(bits=8, group_size=4)],
    "integer pivoted_low_rank": [
        decompose("svd", storage="pivoted_low_rank"),
        rtn(bits=8, group_size=4),
    ],
    "biased low_rank": [decompose("lord")],
    "shared low_rank": [decompose("basis-sharing")],
}
UNMERGEABLE = {"integer low_rank": "are quantized", "shared low_rank": "are shared"}
LINEARS = [f"self_attn.{n}_proj" for n in "qkvo"] + [
    f"mlp.{n}_proj" for n in ("gate", "up", "down")
]
TOKENS = torch.arange(2, 42)[None]


@pytest.fixture(scope="module")
def checkpoint(compressed: Callable[..., Any]) -> Any:
    """Run the recipe of a form once, and return its checkpoint."""
    return compressed(FORMS)


def load(folder: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()


@torch.no_grad()
def logits_of(model: Any) -> Tensor:
    logits: Tensor = model(TOKENS).logits
    return logits


def lora(targets: Any, **options: Any) -> peft.LoraConfig:
    return peft.LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM", **options)


@torch.no_grad()
def loss_of(model: Any) -> float:
    return float(model(TOKENS, labels=TOKENS).loss)


def train(adapted: Any, steps: int = 3) -> tuple[float, float]:
    """Return the loss before and after some steps."""
    trained = [p for p in adapted.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=0.01)
    first = loss_of(adapted)
    for _ in range(steps):
        optimizer.zero_grad()
        adapted(TOKENS, labels=TOKENS).loss.backward()
        optimizer.step()
    return first, loss_of(adapted)


def test_every_component_is_covered(checkpoint) -> None:
    found = set()
    for form in FORMS:
        layers = [m for m in load(checkpoint(form)).modules() if isinstance(m, CompressedLinear)]
        types = {layer.config.types for layer in layers}
        assert form.split()[-1] in types
        found |= {kind for each in types for kind in each.split("+")}
    assert found == COMPONENTS.keys()


@pytest.mark.parametrize("form", FORMS)
def test_an_adapter_is_trained_saved_loaded_merged_and_unmerged(form, checkpoint, tmp_path) -> None:
    model = load(checkpoint(form))
    before = logits_of(model)
    adapted = peft.get_peft_model(model, lora(["q_proj", "up_proj"]))
    assert len([p for p in adapted.parameters() if p.requires_grad]) == 2 * 2 * 2
    assert torch.equal(logits_of(adapted), before)
    first, last = train(adapted)
    assert last < first - 0.01
    tuned = logits_of(adapted)
    adapted.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(load(checkpoint(form)), tmp_path / "adapter")
    torch.testing.assert_close(logits_of(again), tuned)
    with adapted.disable_adapter():
        assert torch.equal(logits_of(adapted), before)
    if form in UNMERGEABLE:
        with pytest.raises(AdapterError, match=UNMERGEABLE[form]) as refused:
            adapted.merge_and_unload()
        assert refused.value.code == "unmergeable-adapter"
        return
    adapted.merge_adapter()
    torch.testing.assert_close(logits_of(adapted), tuned, rtol=0, atol=1e-4)
    adapted.unmerge_adapter()
    torch.testing.assert_close(logits_of(adapted), tuned, rtol=0, atol=1e-5)
    merged = adapted.merge_and_unload(safe_merge=True)
    torch.testing.assert_close(logits_of(merged), tuned, rtol=0, atol=1e-4)
    merged.save_pretrained(tmp_path / "merged")
    loaded = load(tmp_path / "merged")
    torch.testing.assert_close(logits_of(loaded), logits_of(merged), rtol=0, atol=1e-5)
    loaded.dequantize()
    torch.testing.assert_close(logits_of(loaded), tuned, rtol=0, atol=1e-4)


@pytest.mark.parametrize("form", FORMS)
def test_all_linear_is_one_adapter_for_every_linear_layer(form, checkpoint) -> None:
    adapted = peft.get_peft_model(load(checkpoint(form)), lora("all-linear"))
    expected = {f"model.layers.{layer}.{name}" for layer in range(2) for name in LINEARS}
    names = {n for n, m in adapted.base_model.model.named_modules() if hasattr(m, "lora_A")}
    assert names == expected
    first, last = train(adapted, steps=2)
    assert last < first


def test_gradients_are_those_of_the_dequantized_model(checkpoint) -> None:
    model = load(checkpoint("dense"))
    dense = copy.deepcopy(model)
    dense.dequantize()
    found = []
    for base in (model, dense):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            adapted = peft.get_peft_model(base, lora(["q_proj", "down_proj"]))
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:  # zero when new, and with it all other gradients
                nn.init.constant_(parameter, 0.01)
        adapted(TOKENS, labels=TOKENS).loss.backward()
        found.append([p.grad for p in adapted.parameters() if p.requires_grad])
    for ours, reference in zip(*found, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-6)


def test_an_adapter_with_a_bias_is_merged(checkpoint, tmp_path) -> None:
    with pytest.warns(UserWarning, match="has no bias"):
        adapted = peft.get_peft_model(load(checkpoint("dense")), lora(["v_proj"], lora_bias=True))
    train(adapted)
    tuned = logits_of(adapted)
    adapted.merge_and_unload().save_pretrained(tmp_path)
    torch.testing.assert_close(logits_of(load(tmp_path)), tuned, rtol=0, atol=1e-4)


def test_two_adapters_are_merged_together(checkpoint) -> None:
    adapted = peft.get_peft_model(load(checkpoint("dense")), lora(["v_proj"]))
    train(adapted)
    adapted.add_adapter("other", lora(["v_proj"]))
    adapted.set_adapter("other")
    train(adapted)
    adapted.base_model.set_adapter(["default", "other"])
    tuned = logits_of(adapted)
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(logits_of(merged), tuned, rtol=0, atol=1e-4)
    assert merged.model.layers[0].self_attn.v_proj.config.sizes == {"rank": 4}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights: must be one of .*got 'pissa'"),
    ],
    ids=str,
)
def test_adapters_that_need_the_dense_weight_are_refused(options, words, checkpoint) -> None:
    model = load(checkpoint("dense"))
    with pytest.raises(AdapterError, match=words):
        peft.get_peft_model(model, lora(["q_proj"], **options))
    model = load(checkpoint("dense"))
    model.dequantize()
    peft.get_peft_model(model, lora(["q_proj"], **options))


@pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True`:UserWarning")
@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_a_quantized_embedding_is_refused(target, checkpoint) -> None:
    with pytest.raises(AdapterError, match="must not name the quantized embedding"):
        peft.get_peft_model(load(checkpoint("dense")), lora([target]))


def test_offloaded_layers_are_trained_but_not_merged(checkpoint, tmp_path) -> None:
    places = dict.fromkeys(
        ["model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head"], "cpu"
    )
    places |= {"model.layers.0": "disk", "model.layers.1": "cpu"}
    model = load(checkpoint("low_rank"), device_map=places, offload_folder=tmp_path / "offload")
    adapted = peft.get_peft_model(model, lora(["q_proj"]))
    first, last = train(adapted)
    assert last < first
    with pytest.raises(AdapterError, match="are offloaded"):
        adapted.merge_and_unload()


@pytest.mark.parametrize("form", ["dense", "sparse"])
def test_dense_matrices_are_not_kept_for_the_backward_pass(form, checkpoint) -> None:
    adapted = peft.get_peft_model(load(checkpoint(form)), lora("all-linear"))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        adapted(TOKENS, labels=TOKENS).loss.backward()
    base = adapted.base_model.model.model.layers[1].mlp.down_proj.base_layer
    assert base.in_features * base.out_features not in [tensor.numel() for tensor in kept]
