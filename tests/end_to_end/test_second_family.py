"""The benchmark that makes a Qwen2 from a Llama: at the full width both compute the same."""

from collections.abc import Callable

import torch
from tests.benchmarks.second_family import converted, statistics
from transformers import LlamaForCausalLM


@torch.no_grad()
def test_at_full_width_the_converted_model_computes_the_same(
    tiny_llama: Callable[..., LlamaForCausalLM],
) -> None:
    model = tiny_llama()
    random = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "norm" in name:  # ones would hide that they are not fused
            parameter.normal_(1, 0.2, generator=random)
    ids = torch.randint(0, 512, (2, 24), generator=random)
    moment, energies = statistics(model, ids)
    expected = model(ids).logits
    found = converted(model, moment, energies, width=32, heads=4)(ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.std()))
    smaller = converted(model, moment, energies, width=24, heads=3)(ids).logits
    assert torch.corrcoef(torch.stack([smaller.flatten(), expected.flatten()]))[0, 1] > 0.3
