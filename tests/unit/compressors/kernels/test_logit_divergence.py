"""The kernel for gradients at logits, on a GPU or with ``TRITON_INTERPRET=1``."""

import os

import pytest
import torch

from lrc.compressors.heal.divergence import NO_LABEL, Kind, logit_gradient
from lrc.compressors.kernels.logit_divergence import fused_gradient

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"


@pytest.mark.skipif(
    not (INTERPRETED or torch.cuda.is_available()),
    reason="needs a CUDA device or TRITON_INTERPRET=1",
)
@pytest.mark.parametrize("kind", ["forward", "reverse", "both"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("n_words", [7, 4096, 5000])
def test_the_kernel_agrees_with_the_formula(kind: Kind, dtype: torch.dtype, n_words: int) -> None:
    from lrc.compressors.kernels import divergence_triton

    g = torch.Generator().manual_seed(n_words)
    dense, own = ((5 * torch.randn(3, n_words, generator=g)).to(DEVICE, dtype) for _ in range(2))
    labels = torch.tensor([0, NO_LABEL, n_words - 1], device=DEVICE)
    expected = logit_gradient(dense.double(), own.double(), kind, labels=labels, weight=0.3)
    found = divergence_triton.gradient(
        dense,
        own,
        labels,
        forward=kind != "reverse",
        reverse=kind != "forward",
        weight=0.3,
    )
    assert found.dtype == dtype
    # Exponents and logarithms of float32 are relative to probabilities of at most one.
    assert (found.double() - expected).abs().max() <= 1e-5 + torch.finfo(dtype).eps


def test_on_a_cpu_there_is_no_kernel() -> None:
    logits, labels = torch.zeros(2, 8), torch.zeros(2, dtype=torch.int64)
    options = {"forward": True, "reverse": True, "weight": 0.0}
    assert fused_gradient(logits, logits, labels, **options) is None
