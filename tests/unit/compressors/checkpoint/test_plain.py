"""Which model classes transformers loads from packed integers without lrc."""

import pytest
import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from lrc.compressors.checkpoint.plain import loads_packed

SIZES = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


# Falcon and nanochat read weights in `_init_weights`, nanochat by the name of a submodule.
@pytest.mark.parametrize(
    ("family", "expected"), [("llama", True), ("opt", True), ("falcon", False), ("nanochat", False)]
)
def test_a_class_that_initializes_weights_by_name_needs_them(family: str, expected: bool) -> None:
    with init_empty_weights(include_buffers=False):
        config = AutoConfig.for_model(family, **SIZES)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    state = dict(model.state_dict(keep_vars=True))
    linears = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not model.get_output_embeddings()
    ]
    assert linears
    assert loads_packed(model, linears) is expected
    assert loads_packed(model, [])
    assert {name: id(t) for name, t in model.state_dict(keep_vars=True).items()} == {
        name: id(t) for name, t in state.items()
    }
