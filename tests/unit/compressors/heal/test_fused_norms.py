"""Norms are computed by torch's kernel where that gives the same."""

import torch
from torch import nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from lrc.compressors.heal.fused_norms import fuse_norms_


def test_norms_that_agree_are_fused_and_give_the_same_results_and_gradients() -> None:
    g = torch.Generator().manual_seed(0)
    plain, fused = LlamaRMSNorm(32, 1e-5).bfloat16(), LlamaRMSNorm(32, 1e-5).bfloat16()
    for norm in (plain, fused):
        nn.init.uniform_(norm.weight, 0.5, 2.0, generator=torch.Generator().manual_seed(1))
    assert fuse_norms_(nn.Sequential(fused)) == 1
    x, weights = torch.randn(2, 6, 32, generator=g).bfloat16()
    found = []
    for norm in (plain, fused):
        inputs = x.clone().requires_grad_(True)
        y = norm(inputs)
        found.append([y, *torch.autograd.grad((y * weights).sum(), [inputs, norm.weight])])
    for one, other in zip(*found, strict=True):
        # A few roundings, of which gradients of weights add up six.
        torch.testing.assert_close(one, other, rtol=0.03, atol=0.06)


def test_other_norms_are_left_alone() -> None:
    norm = GemmaRMSNorm(32)  # multiplies by one plus the weight
    assert fuse_norms_(nn.Sequential(norm, nn.LayerNorm(32)).bfloat16()) == 0
    assert fuse_norms_(nn.Sequential(nn.Linear(2, 2).bfloat16(), LlamaRMSNorm(32))) == 0
    assert fuse_norms_(LlamaRMSNorm(32)) == 0  # its precision would not change
    assert "forward" not in vars(norm)
