"""Integers of plain checkpoints with inputs in 8 bits, in transformers without lrc."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

pytestmark = pytest.mark.usefixtures("one_thread")
TOKENS = torch.randint(2, 512, (1, 40), generator=torch.Generator().manual_seed(2))


def rounded(x: Tensor) -> Tensor:
    """Round every token to integers, with the scale of its largest magnitude.

    compressed-tensors divides by half of the 255 steps, and clamps.
    """
    scale = x.abs().amax(dim=-1, keepdim=True) / 127.5
    return (x / scale).round().clamp(-128, 127) * scale


@torch.no_grad()
def test_stock_transformers_round_inputs_and_multiply_by_the_same_integers(
    checkpoint: Callable[[str], Path], lrc: Callable[..., Any], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    ended = lrc("export", checkpoint("int8"), out, "--format", "int-quantized", "--json")
    assert ended.code == 0, ended.err
    assert "lrc eval" in json.loads(ended.out)["notes"][0]
    tensors = load_file(out / "model.safetensors")
    by_dtype = {name for name, tensor in tensors.items() if tensor.dtype == torch.int8}
    assert len(by_dtype) == 13
    assert "model.layers.1.mlp.up_proj.weight" not in by_dtype
    block = json.loads((out / "config.json").read_text())["quantization_config"]
    assert block["format"] == "int-quantized"
    assert (out / "tokenizer.json").is_file()

    dense = AutoModelForCausalLM.from_pretrained(checkpoint("int8"), dtype=torch.float32)
    dense(TOKENS)  # expanded by the first forward call
    for name, module in dense.named_modules():
        weight = tensors.get(f"{name}.weight")
        if isinstance(module, nn.Linear) and weight is not None and weight.dtype == torch.int8:
            expanded = weight.float() * tensors[f"{name}.weight_scale"].float()
            torch.testing.assert_close(module.weight, expanded, rtol=1e-6, atol=0)
            module.register_forward_pre_hook(lambda _, args: (rounded(args[0]), *args[1:]))
    found = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)(TOKENS).logits
    torch.testing.assert_close(found, dense(TOKENS).logits, rtol=1e-3, atol=1e-3)


# PEFT asks for an attribute that the newest transformers has renamed.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:You passed `quantization_config`:UserWarning")
def test_expanded_while_loading_it_takes_adapters_and_rounds_no_inputs(
    checkpoint: Callable[[str], Path], lrc: Callable[..., Any], tmp_path: Path
) -> None:
    ended = lrc("export", checkpoint("int8"), tmp_path / "out", "--format", "int-quantized")
    assert ended.code == 0, ended.err
    options = {"quantization_config": CompressedTensorsConfig(dequantize=True)}
    expanded, plain = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)
        for folder in (tmp_path / "out", checkpoint("int8"))
    )
    torch.testing.assert_close(expanded(TOKENS).logits, plain(TOKENS).logits)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(expanded, config)
    trained = [p for p in adapted.parameters() if p.requires_grad]
    for parameter in trained:
        torch.nn.init.normal_(parameter, std=0.1)
    adapted(TOKENS, labels=TOKENS).loss.backward()
    assert all(parameter.grad is not None for parameter in trained)
    tuned = adapted(TOKENS).logits
    assert not torch.allclose(tuned, plain(TOKENS).logits, atol=0.01)
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(merged(TOKENS).logits, tuned, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("plain", "one scale per row, got int4-g32 of model.layers.0"),
        ("factors", "got the format of lrc; quantize all targeted matrices with bits: 8"),
    ],
)
def test_other_forms_are_refused(
    name: str,
    words: str,
    checkpoint: Callable[[str], Path],
    lrc: Callable[..., Any],
    tmp_path: Path,
) -> None:
    ended = lrc("export", checkpoint(name), tmp_path / "out", "--format", "int-quantized")
    ended.refuses(1, words, code="cannot-export")
    assert not list(tmp_path.iterdir())
