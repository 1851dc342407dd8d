"""Statistics of experts against those of the fused model of transformers, token by token."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny_experts import tiny_experts
from torch import Tensor
from transformers import LlamaForCausalLM

from lrc.compressors.calibrate import statistics
from lrc.compressors.calibrate.calibration_context import CalibrationContext
from lrc.compressors.calibrate.layer_check import check_layers
from lrc.compressors.io.journal import Journal
from lrc.compressors.models.architecture import build
from lrc.compressors.models.source import locate
from lrc.compressors.models.weights import WeightReader
from lrc.compressors.solvers.moments import needed_tokens
from lrc.configs.recipe import Model

PREFIX = "model.layers.1.mlp.experts"
N_TOKENS = 6 * 40


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    return torch.randint(2, 512, (6, 40), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_experts("qwen3_moe")


@pytest.fixture(scope="module")
def context(model: Any, tokens: Tensor, tmp_path_factory: Any) -> CalibrationContext:
    folder: Path = tmp_path_factory.mktemp("experts")
    model.save_pretrained(folder)
    architecture = check_layers(build(locate(Model(path=str(folder), dtype="float32"))))
    return CalibrationContext(
        architecture,
        WeightReader(folder, architecture),
        lambda: tokens,
        Journal(tmp_path_factory.mktemp("unused")),
        "cpu",
        memory_limit_gib=1.0,
        seed=0,
        on_step=lambda *_: None,
        labels="real",
    )


@pytest.fixture(scope="module")
def collected(context: CalibrationContext, tmp_path_factory: Any) -> Callable[..., Journal]:
    """Collect statistics of all experts of the layer into a new journal."""

    def collect(*names: str, length: int = 40) -> Journal:
        journal, tokens = Journal(tmp_path_factory.mktemp("journal")), context.windows()
        tokens = tokens if length == 40 else tokens[:1, :length]
        linears = [x.name for x in context.architecture.linears if x.name.startswith(PREFIX)]
        changed = replace(context, journal=journal, windows=lambda: tokens)
        statistics.collect(changed, dict.fromkeys(linears, names))
        return journal

    return collect


class Seen:
    """What the experts of the fused model receive, and the gradients at their weighted outputs."""

    def __init__(self, model: Any, tokens: Tensor) -> None:
        experts = model.get_submodule(PREFIX)
        hooks = [experts.register_forward_pre_hook(self._before)]
        hooks.append(experts.register_forward_hook(self._after))
        for row in tokens:  # the sum of the losses of all tokens
            logits = model(row[None], use_cache=False).logits[0, :-1]
            torch.nn.functional.cross_entropy(logits, row[1:], reduction="sum").backward()
        for hook in hooks:
            hook.remove()

    def _before(self, _: Any, args: tuple[Tensor, ...]) -> None:
        for name, value in zip(("x", "index", "gates"), args, strict=True):
            vars(self).setdefault(name, []).append(value.detach().double())

    def _after(self, _: Any, __: Any, y: Tensor) -> None:
        y.register_hook(lambda g: vars(self).setdefault("g", []).append(g.double()))

    def of(self, number: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return inputs, gates and gradients of the tokens of an expert."""
        x, index, gates, g = (torch.cat(vars(self)[key]) for key in ("x", "index", "gates", "g"))
        token, place = torch.where(index == number)
        return x[token], gates[token, place, None], g[token]


@pytest.fixture(scope="module")
def seen(model: LlamaForCausalLM, tokens: Tensor) -> Seen:
    return Seen(model, tokens)


def close(found: Tensor, expected: Tensor) -> None:
    scale = expected.diagonal().mean()
    torch.testing.assert_close(found.double() / scale, expected / scale, rtol=1e-4, atol=1e-4)


def hidden(model: Any, x: Tensor, number: int) -> Tensor:
    W = model.get_submodule(PREFIX).gate_up_proj[number].detach().double()
    gate, up = (x @ W.T).chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


def test_inputs_are_weighted_by_the_router(model, seen, collected):
    journal = collected("inputs", "whole_inputs")
    for number in (0, 1, 2, 3):
        x, gates, _ = seen.of(number)
        assert len(x) >= needed_tokens(32)
        for leaf, v in (("gate_up_proj", x), ("down_proj", hidden(model, x, number))):
            found = statistics.load(journal, 1, f"{PREFIX}.{number}.{leaf}")
            assert found.n_tokens == len(x)
            assert found.inputs is not None
            assert found.inputs.full is not None
            close(found.inputs.full, (gates * v).T @ (gates * v))


def test_moments_of_inputs_are_kept_where_the_number_of_tokens_depends_on_them(collected):
    journal, name = collected("inputs", "whole_inputs", "gradients"), f"{PREFIX}.0.gate_up_proj"
    whole = statistics.load(journal, 1, name)
    assert statistics.load(journal, 1, name, with_inputs=False).n_tokens == whole.n_tokens


def test_an_image_is_that_of_the_weighted_inputs(model, seen, collected):
    found = statistics.load(collected("inputs"), 1, f"{PREFIX}.0.gate_up_proj").inputs
    x, gates, _ = seen.of(0)
    W = model.get_submodule(PREFIX).gate_up_proj[0].detach().double()
    close(found.through(W), W @ (gates * x).T @ (gates * x) @ W.T)


def test_means_are_not_weighted(seen, collected):
    found = statistics.load(collected("inputs", "input_mean"), 1, f"{PREFIX}.0.gate_up_proj")
    x, _, _ = seen.of(0)
    torch.testing.assert_close(found.input_mean.double(), x.sum(0), rtol=1e-4, atol=1e-4)
    close(found.inputs.whole(), x.T @ x)


def test_kronecker_factors_predict_the_mean_over_all_tokens(model, seen, collected):
    """Independence among the tokens of an expert: ``tr(G E H E^T) / (2 n_expert n_tokens)``."""
    journal = collected("inputs", "gradients", "whole_inputs", "whole_gradients")
    for number in (0, 2):
        x, gates, g = seen.of(number)
        x, g = hidden(model, x, number), gates * g  # of the down projection
        found = statistics.load(journal, 1, f"{PREFIX}.{number}.down_proj")
        assert found.n_tokens == N_TOKENS
        close(found.gradients.whole(), g.T @ g)
        E = torch.randn(32, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        expected = torch.trace((g.T @ g) @ E @ (x.T @ x) @ E.T) / (2 * len(x) * N_TOKENS)
        squared = torch.trace(found.gradients.whole() @ E @ found.inputs.whole() @ E.T)
        predicted = squared / (2 * found.n_tokens**2)
        torch.testing.assert_close(predicted, expected, rtol=1e-3, atol=0)


def test_starved_experts_have_only_the_number_of_their_tokens(model, tokens, collected):
    journal, seen = collected("inputs", length=20), Seen(model, tokens[:1, :20])
    counts = {number: len(seen.of(number)[0]) for number in range(6)}
    assert sum(counts.values()) == 2 * 20
    starved = [n for n, count in counts.items() if count < needed_tokens(32)]
    assert 0 < len(starved) < 6
    for number, count in counts.items():
        name = f"{PREFIX}.{number}.gate_up_proj"
        assert statistics.routed_tokens(journal, 1)[name] == (count, needed_tokens(32))
        found = statistics.load(journal, 1, name)
        assert (found.inputs is None) == (number in starved)
        assert found.n_tokens == count
