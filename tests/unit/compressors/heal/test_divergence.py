from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy, kl_div

from lrc.compressors.heal import divergence as module
from lrc.compressors.heal.divergence import Predictor, add_gradients, divergence, mean_divergence

KINDS = ("forward", "reverse", "both")


def test_the_divergences_are_those_of_torch() -> None:
    generator = torch.Generator().manual_seed(0)
    dense, compressed = torch.randn(2, 5, 11, generator=generator)
    log_p, log_q = dense.log_softmax(-1), compressed.log_softmax(-1)
    forward = kl_div(log_q, log_p, reduction="sum", log_target=True)
    reverse = kl_div(log_p, log_q, reduction="sum", log_target=True)
    for kind, expected in zip(KINDS, (forward, reverse, (forward + reverse) / 2), strict=True):
        torch.testing.assert_close(divergence(dense, compressed, kind), expected)
        assert float(divergence(dense, dense, kind)) == 0


@pytest.mark.parametrize("family", ["llama", "gemma"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_in_pieces_are_those_of_the_whole_loss(
    tiny_llama: Callable[..., Any],
    tiny_gemma: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    family: str,
    kind: Any,
) -> None:
    monkeypatch.setitem(module.PIECE, "cpu", 7)
    models = [tiny_llama(seed=s) if family == "llama" else tiny_gemma(seed=s) for s in range(2)]
    tokens = torch.arange(60).view(3, 20)
    dense, compressed = (Predictor(model, tokens, dtype=torch.float32) for model in models)
    loss = divergence(
        *(model(input_ids=tokens, use_cache=False).logits.flatten(0, 1) for model in models), kind
    )
    names, parameters = zip(*models[1].model.layers.named_parameters(), strict=True)
    expected = torch.autograd.grad(loss / 60, parameters)
    add_gradients(dense, compressed, tokens[:2], kind=kind, positions=60)
    add_gradients(dense, compressed, tokens[2:], kind=kind, positions=60)
    for name, parameter, gradient in zip(names, parameters, expected, strict=True):
        torch.testing.assert_close(
            parameter.grad, gradient, rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )
    if kind == "forward":
        measured = mean_divergence(dense, compressed, tokens, together=2)
        assert measured == pytest.approx(loss.item() / 60, rel=1e-5)


def test_cross_entropy_is_added_for_all_positions_but_the_last_of_a_window(
    tiny_llama: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(module.PIECE, "cpu", 7)  # pieces end within windows
    models = [tiny_llama(seed=s) for s in range(2)]
    tokens = torch.randint(0, 60, (3, 20), generator=torch.Generator().manual_seed(0))
    dense, compressed = (Predictor(model, tokens, dtype=torch.float32) for model in models)
    p, q = (model(input_ids=tokens, use_cache=False).logits for model in models)
    entropy = cross_entropy(q[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum")
    loss = divergence(p.flatten(0, 1), q.flatten(0, 1), "forward") + 0.3 * entropy
    parameters = [*models[1].model.layers.parameters()]
    expected = torch.autograd.grad(loss / 60, parameters)
    add_gradients(dense, compressed, tokens, kind="forward", positions=60, labels=0.3)
    for parameter, gradient in zip(parameters, expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gradients_do_not_underflow_on_a_gpu(
    tiny_llama: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    """They would in float16: a difference of probabilities, divided by very many positions."""
    tokens = torch.arange(60).view(3, 20)
    dense, compressed = (Predictor(tiny_llama(seed=s), tokens, dtype=dtype) for s in range(2))
    parameter = compressed._model.model.layers[0].mlp.up_proj.weight
    add_gradients(dense, compressed, tokens, kind="forward", positions=60)  # on a CPU: in float32
    expected, parameter.grad = parameter.grad, None
    # Computes on a CPU what a GPU would.
    autocast, windows = torch.autocast, SimpleNamespace(to=lambda _: tokens)
    monkeypatch.setattr(torch, "autocast", lambda _, dtype: autocast("cpu", dtype))
    for predictor in (dense, compressed):
        predictor._device = SimpleNamespace(type="cuda")  # type: ignore[assignment]
    add_gradients(dense, compressed, windows, kind="forward", positions=10**7)  # type: ignore[arg-type]
    found = parameter.grad * 10**7 / 60
    assert float((found - expected).norm() / expected.norm()) < 0.1
