"""The layers that write to the residual stream are found by execution, not declared."""

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from lrc.compressors.calibrate.residual_writers import find_writers, silenced, writers_of

SIZES = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 64}
MLP = {"intermediate_size": 48, "num_key_value_heads": 2, "pad_token_id": 0}
FAMILIES = {
    "llama": (MLP, {"self_attn.o_proj", "mlp.down_proj"}),
    "phi": (MLP, {"self_attn.dense", "mlp.fc2"}),  # both of one block input
    "gpt_neox": (
        {"intermediate_size": 48, "use_parallel_residual": False},
        {"attention.dense", "mlp.dense_4h_to_h"},
    ),
    "opt": ({"ffn_dim": 48, "word_embed_proj_dim": 32}, {"self_attn.out_proj", "fc2"}),
    # A norm after the block's output, a factor before the sum: what they put out is not added.
    "gemma2": (MLP | {"head_dim": 8}, set()),
    "granite": (MLP | {"residual_multiplier": 0.22}, set()),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_writers_are_the_layers_whose_outputs_are_added_to_the_stream(family: str) -> None:
    options, expected = FAMILIES[family]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**SIZES, **options)).eval()
    for parameter in model.parameters():
        parameter.data.normal_(std=0.3)
    layers = next(m for m in model.modules() if isinstance(m, nn.ModuleList))
    captured: list[torch.Tensor] = []
    hook = layers[0].register_forward_hook(
        lambda _, __, out: captured.append(out[0] if isinstance(out, tuple) else out)
    )
    tokens = torch.randint(2, 64, (2, 9))

    @torch.no_grad()
    def forward() -> torch.Tensor:
        model(tokens, use_cache=False)
        return captured.pop()

    linears = [(n, m) for n, m in layers[0].named_modules() if isinstance(m, nn.Linear)]
    assert set(find_writers(forward, linears)) == expected
    with silenced(module for name, module in linears if name in expected):
        stream = forward()
    hook.remove()
    if expected:  # nothing is left but the layer's own input
        seen: list[torch.Tensor] = []
        layers[0].register_forward_pre_hook(
            lambda _, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"]),
            with_kwargs=True,
        )
        with torch.no_grad():
            model(tokens, use_cache=False)
        torch.testing.assert_close(stream, seen[0])


class Block(nn.Module):
    """Two linears, each added to the stream, which is scaled or rounded on the way."""

    def __init__(self, scale: float = 1.0, *, rounded: bool = False) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.scale, self.rounded = scale, rounded

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.scale * x
        x = x + self.first(x.sin())
        y = x + self.second(x.cos())
        return y.bfloat16().float() if self.rounded else y


@pytest.mark.parametrize(
    ("block", "add_to_input", "last_is_added"),
    [(Block(), True, True), (Block(1.5), False, True), (Block(rounded=True), False, False)],
)
def test_composition_of_the_output(block: Block, add_to_input: bool, last_is_added: bool) -> None:
    """Of a scaled stream, the writers are known, but not that its input is what they add to."""
    x = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = writers_of(lambda: block(x), dict(block.named_children()), x)
    assert found.names == ["first", "second"]
    assert (found.add_to_input, found.last_is_added) == (add_to_input, last_is_added)
    assert found.from_on("first") == ["first", "second"]
    assert found.from_on("second") == ["second"]
    assert found.from_on("third") == []
