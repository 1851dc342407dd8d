from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import kl_div

from lrc.compressors.heal.divergence import Predictor, add_gradients
from lrc.compressors.heal.hidden_states import hidden_distance, recorded


def test_the_distance_is_relative_to_every_state() -> None:
    dense = [
        torch.tensor([[[1.0, -3.0], [200.0, 200.0]]]),
        torch.tensor([[[0.0, 2.0], [1.0, 1.0]]]),
    ]
    compressed = [each.clone() for each in dense]
    assert hidden_distance(dense, compressed).tolist() == [0, 0]
    compressed[0][0, 0, 0] += 2  # half of the size of the state
    compressed[0][0, 1, 1] -= 100  # a quarter
    compressed[1][0, 0] *= -1  # twice
    assert hidden_distance(dense, compressed).tolist() == [(0.5 + 2) / 2, 0.25 / 2]
    scaled = [[1e3 * each for each in states] for states in (dense, compressed)]
    assert hidden_distance(*scaled).tolist() == pytest.approx([2.5 / 2, 0.25 / 2])


def states_of(model: Any, tokens: Tensor) -> list[Tensor]:
    """Return the outputs of all layers, of which transformers returns the last after the norm."""
    last: list[Tensor] = []
    with model.model.norm.register_forward_pre_hook(lambda _, args: last.append(args[0])):
        found = model.model(input_ids=tokens, use_cache=False, output_hidden_states=True)
    return [*found.hidden_states[1:-1], *last]


def test_outputs_of_layers_are_recorded_inside_the_context(tiny_llama: Callable[..., Any]) -> None:
    model, tokens = tiny_llama(), torch.arange(20)[None]
    with torch.no_grad():
        with recorded(model.model.layers) as found:
            model(input_ids=tokens)
        model(input_ids=tokens)
        expected = states_of(model, tokens)
    assert len(found) == 2
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)


def test_gradients_are_those_of_the_sum_of_both_losses(tiny_llama: Callable[..., Any]) -> None:
    models, tokens = [tiny_llama(seed=seed) for seed in range(2)], torch.arange(60).view(3, 20)
    dense, compressed = (
        Predictor(model, tokens, dtype=torch.float32, layers=model.model.layers) for model in models
    )
    with torch.no_grad():
        expected_states = states_of(models[0], tokens)
    logits = [model(input_ids=tokens, use_cache=False).logits.flatten(0, 1) for model in models]
    relative = [
        ((found - expected).abs().mean(-1) / expected.abs().mean(-1)).mean()
        for found, expected in zip(states_of(models[1], tokens), expected_states, strict=True)
    ]
    log_p, log_q = (each.log_softmax(-1) for each in logits)
    divergence = kl_div(log_q, log_p.detach(), reduction="sum", log_target=True)
    loss = divergence / 60 + 0.7 * sum(relative) / 2
    parameters = [*models[1].model.layers.parameters()]
    expected = torch.autograd.grad(loss, parameters)
    for windows in (tokens[:2], tokens[2:]):
        weights = torch.full(windows.shape, 1 / 60)
        add_gradients(dense, compressed, windows, weights, kind="forward", hidden=0.7)
    for parameter, gradient in zip(parameters, expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-3, atol=1e-5)
