from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div

from lrc.compressors.heal import divergence as module
from lrc.compressors.heal.divergence import (
    NO_LABEL,
    Predictor,
    add_gradients,
    logit_gradient,
    mean_losses,
)

KINDS = ("forward", "reverse", "both")


def loss_of(p: Tensor, q: Tensor, kind: str) -> Tensor:
    """Return the sum over positions, by torch, for logits [..., vocabulary]."""
    log_p, log_q = p.log_softmax(-1), q.log_softmax(-1)
    forward = kl_div(log_q, log_p, reduction="sum", log_target=True)
    reverse = kl_div(log_p, log_q, reduction="sum", log_target=True)
    return {"forward": forward, "reverse": reverse, "both": (forward + reverse) / 2}[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_at_logits_are_those_of_automatic_differentiation(kind: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    p, q = 3 * torch.randn(2, 5, 11, generator=generator, dtype=torch.float64)
    labels = torch.tensor([4, 0, NO_LABEL, 10, 4])
    q.requires_grad_(True)
    for weight in (0.0, 0.3):
        entropy = cross_entropy(q, labels, ignore_index=NO_LABEL, reduction="sum")
        (expected,) = torch.autograd.grad(loss_of(p, q, kind) + weight * entropy, q)
        found = logit_gradient(p, q.detach(), kind, labels=labels, weight=weight)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("family", ["llama", "gemma"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_in_pieces_are_those_of_the_whole_loss(
    tiny_llama: Callable[..., Any],
    tiny_gemma: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    family: str,
    kind: Any,
) -> None:
    monkeypatch.setitem(module.PIECE, "cpu", 7)  # pieces end within windows
    models = [tiny_llama(seed=s) if family == "llama" else tiny_gemma(seed=s) for s in range(2)]
    tokens = torch.randint(0, 60, (3, 20), generator=torch.Generator().manual_seed(0))
    counted = tokens % 3 > 0
    weights = counted / counted.sum()
    dense, compressed = (Predictor(model, tokens, dtype=torch.float32) for model in models)
    p, q = (model(input_ids=tokens, use_cache=False).logits for model in models)
    divergence = loss_of(p[counted], q[counted], kind) / counted.sum()
    predicted = counted[:, :-1]
    entropy = cross_entropy(q[:, :-1][predicted], tokens[:, 1:][predicted], reduction="sum")
    entropy = entropy / counted.sum()
    names, parameters = zip(*models[1].model.layers.named_parameters(), strict=True)
    expected = torch.autograd.grad(divergence + 0.3 * entropy, parameters)
    for rows in (slice(2), slice(2, 3)):
        batch = tokens[rows], weights[rows]
        add_gradients(dense, compressed, *batch, kind=kind, cross_entropy=0.3)
    for name, parameter, gradient in zip(names, parameters, expected, strict=True):
        torch.testing.assert_close(
            parameter.grad, gradient, rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )
    if kind == "forward":
        measured = mean_losses(dense, compressed, tokens, together=2, counted=counted)
        assert measured == pytest.approx((divergence.item(), entropy.item()), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gradients_do_not_underflow_on_a_gpu(
    tiny_llama: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    """They would in float16: a difference of probabilities, divided by very many positions."""
    tokens = torch.arange(60).view(3, 20)
    dense, compressed = (Predictor(tiny_llama(seed=s), tokens, dtype=dtype) for s in range(2))
    parameter = compressed._model.model.layers[0].mlp.up_proj.weight
    weights = torch.full(tokens.shape, 1 / 60)
    add_gradients(dense, compressed, tokens, weights, kind="forward")  # on a CPU: in float32
    expected, parameter.grad = parameter.grad, None
    # Computes on a CPU what a GPU would.
    autocast, windows = torch.autocast, SimpleNamespace(to=lambda _: tokens)
    monkeypatch.setattr(torch, "autocast", lambda _, dtype: autocast("cpu", dtype))
    for predictor in (dense, compressed):
        predictor._device = SimpleNamespace(type="cuda")  # type: ignore[assignment]
    weights = torch.full(tokens.shape, 1e-7)
    add_gradients(dense, compressed, windows, weights, kind="forward")  # type: ignore[arg-type]
    found = parameter.grad * 10**7 / 60
    assert float((found - expected).norm() / expected.norm()) < 0.1
