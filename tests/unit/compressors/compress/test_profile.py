"""Measured rises of the loss: against models changed by hand; rank correlation against scipy."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

from lrc.compressors.calibrate.statistics import inputs_file
from lrc.compressors.compress.finalize import product
from lrc.compressors.compress.layerwise import decompose, factors_file
from lrc.compressors.compress.profile import Profile, profile_plan, spearman
from lrc.compressors.io.journal import Journal
from lrc.compressors.planning.plan import Matrix, Plan
from lrc.compressors.solvers.moments import Moment, Statistics
from lrc.configs.errors import OutputError, Stopped
from lrc.configs.recipe import Recipe

LEAVES = ("self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj")
NAMES = [f"model.layers.{layer}.{leaf}" for layer in (0, 1) for leaf in LEAVES]
RANK = 4
# Rounding of losses near 7 in float32, of which an ulp is 5e-7: forward passes of two layers that
# round in different places, twice in a difference. Measured at most 1.3e-6.
NATS = 2e-5


class Weights:
    """Stands for a `WeightReader` of a model in memory."""

    def __init__(self, model: Any) -> None:
        self.tensors = model.state_dict()

    def read(self, name: str, *, device: str = "cpu") -> Tensor:
        return self.tensors[name].clone()


@pytest.fixture
def model(tiny_llama: Callable[..., Any]) -> Any:
    return tiny_llama()


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(2, 512, (3, 24), generator=torch.Generator().manual_seed(0))


def known(matrix: Matrix) -> Statistics:
    """Return statistics that are as good as any: of random inputs off centre."""
    X = torch.randn(200, matrix.shape[1], generator=torch.Generator().manual_seed(1)).double() + 1
    return Statistics(200, inputs=Moment.of(X.T @ X), input_mean=X.sum(dim=0))


def plan_of(model: Any, method: str, **changes: Any) -> Plan:
    matrices = []
    for name in NAMES:
        shape = tuple(model.get_submodule(name).weight.shape)
        bits = shape[0] * shape[1] * 32
        form = changes.get("form", "low_rank")
        m = Matrix(name, int(name.split(".")[2]), shape, 0, method, form, None, bits, bits)
        if method == "lord":
            m = Matrix(**{**vars(m), "bias": "added"})
        if method == "basis-sharing":
            m = m.shared(name.replace("layers.1", "layers.0"))
        matrices.append(m.at(RANK))
    return Plan(matrices, 0, 0, "s", None, False, "float32", "Llama", budgets=[None])


def recipe_of(method: str) -> Recipe:
    stages = [{"decompose": {"method": method, "keep": 0.9}}]
    return Recipe.model_validate({"model": "m", "stages": stages, "output": "o"})


def journal_of(folder: Path) -> Journal:
    journal = Journal(folder)
    for layer in (0, 1):  # that statistics are there, not what they say, is looked at
        journal.write_json(inputs_file(layer), {})
    return journal


def measured(plan: Plan, model: Any, tokens: Tensor, journal: Journal, **changes: Any) -> Profile:
    arguments = {"dense": lambda: copy.deepcopy(model), "on_step": lambda *_: None, **changes}
    recipe = recipe_of(plan.matrices[0].method)
    about: Any = (plan, recipe, Weights(model), journal, known)
    return profile_plan(*about, tokens, device="cpu", **arguments)


def loss_of(model: Any, tokens: Tensor) -> float:
    with torch.no_grad():
        return float(model(input_ids=tokens, labels=tokens).loss)


@pytest.mark.parametrize(
    ("method", "form"),
    [
        ("svd", "low_rank"),
        ("svd-llm", "pivoted_low_rank"),
        ("lord", "low_rank"),
        ("basis-sharing", "low_rank"),
    ],
)
def test_a_rise_is_that_of_a_model_changed_by_hand(
    method: str, form: str, model: Any, tokens: Tensor, tmp_path: Path
) -> None:
    plan = plan_of(model, method, form=form)
    profile = measured(plan, model, tokens, journal_of(tmp_path / "a"))
    journal = Journal(tmp_path / "b")
    executed = decompose(
        *(plan, recipe_of(method), Weights(model), journal, known),  # type: ignore[arg-type]
        device="cpu",
        on_step=lambda *_: None,
    )
    dense = loss_of(model, tokens)
    assert profile.dense == pytest.approx(dense, abs=NATS)
    assert (profile.windows, profile.tokens) == (3, 3 * 23)
    assert max(map(abs, profile.rises.values())) > 1e-2  # a thousand times what is tolerated
    groups: dict[str, list[Matrix]] = {}
    for m in executed.matrices:
        groups.setdefault(m.group or m.name, []).append(m)
    assert list(profile.rises) == list(groups)
    for name, members in groups.items():
        changed = copy.deepcopy(model)
        for m in members:
            file = factors_file(executed.homes()[m.name])
            linear = changed.get_submodule(m.name)
            W_hat = product(m, lambda key, file=file: journal.read_tensor(file, key))
            linear.weight.data.copy_(W_hat)
            if method == "lord":
                linear.bias = nn.Parameter(journal.read_tensor(file, f"{m.name}.b.bias"))
        rise = loss_of(changed, tokens) - dense
        assert profile.rises[name] == pytest.approx(rise, abs=NATS)
        divergence = divergence_of(changed, model, tokens)
        assert profile.divergences[name] == pytest.approx(divergence, rel=1e-3, abs=1e-6)


def divergence_of(changed: Any, model: Any, tokens: Tensor) -> float:
    with torch.no_grad():
        p, q = (m(input_ids=tokens).logits[:, :-1].double() for m in (model, changed))
    loss = nn.functional.kl_div(
        q.log_softmax(-1), p.log_softmax(-1), log_target=True, reduction="sum"
    )
    return float(loss) / (tokens.shape[0] * (tokens.shape[1] - 1))


def test_a_rise_of_svd_is_that_of_the_truncated_weight(
    model: Any, tokens: Tensor, tmp_path: Path
) -> None:
    profile = measured(plan_of(model, "svd"), model, tokens, Journal(tmp_path))
    for name in NAMES:
        changed = copy.deepcopy(model)
        weight = changed.get_submodule(name).weight.data
        U, S, Vh = torch.linalg.svd(weight.double())
        weight.copy_(U[:, :RANK] * S[:RANK] @ Vh[:RANK])
        rise = loss_of(changed, tokens) - loss_of(model, tokens)
        assert profile.rises[name] == pytest.approx(rise, abs=NATS)


def test_the_model_is_dense_again_after_every_matrix(
    model: Any, tokens: Tensor, tmp_path: Path
) -> None:
    used = copy.deepcopy(model)
    plan = plan_of(model, "lord")
    measured(plan, model, tokens, journal_of(tmp_path), dense=lambda: used)
    assert {k: t.tolist() for k, t in used.state_dict().items()} == {
        k: t.tolist() for k, t in model.state_dict().items()
    }


def test_layers_that_are_measured_are_not_measured_again(
    model: Any, tokens: Tensor, tmp_path: Path
) -> None:
    plan, loaded = plan_of(model, "svd"), []

    def dense() -> Any:
        loaded.append(1)
        return copy.deepcopy(model)

    def stop(stage: str, done: int, total: int) -> None:
        raise Stopped(f"{stage} {done} of {total}")

    undisturbed = measured(plan, model, tokens, Journal(tmp_path / "a"))
    journal = Journal(tmp_path / "b")
    with pytest.raises(Stopped, match="profile 1 of 2"):
        measured(plan, model, tokens, journal, dense=dense, on_step=stop)
    first = journal.path("profile/layer-0000.json")
    stamp = first.stat().st_mtime_ns
    assert measured(plan, model, tokens, journal, dense=dense) == undisturbed
    assert first.stat().st_mtime_ns == stamp
    assert len(loaded) == 2
    assert measured(plan, model, tokens, journal, dense=dense) == undisturbed
    assert len(loaded) == 2
    fewer = measured(plan, model, tokens[:1], journal, dense=dense)  # on others it is another
    assert (len(loaded), fewer.windows) == (3, 1)
    assert fewer.rises != undisturbed.rises


def test_deleted_statistics_are_named(model: Any, tokens: Tensor, tmp_path: Path) -> None:
    journal = journal_of(tmp_path)
    journal.forget(inputs_file(1))
    with pytest.raises(OutputError, match=r"layers.1.self_attn.q_proj .* choose another folder"):
        measured(plan_of(model, "svd-llm"), model, tokens, journal)


def test_what_cannot_be_factored_raises_nothing(
    model: Any, tokens: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(measured.__globals__, "known", lambda matrix: Statistics())
    profile = measured(plan_of(model, "svd-llm"), model, tokens, journal_of(tmp_path))
    assert set(profile.rises.values()) == set(profile.divergences.values()) == {0.0}


def test_a_plan_of_dense_matrices_has_an_empty_profile(
    model: Any, tokens: Tensor, tmp_path: Path
) -> None:
    plan = plan_of(model, "svd")
    plan = plan.with_matrices(m.dense() for m in plan.matrices)
    profile = measured(plan, model, tokens, Journal(tmp_path))
    assert (profile.dense, profile.rises, profile.divergences) == (None, {}, {})
    assert profile.to_json(plan)["spearman"] == {"predicted_nats": None, "loss": None}


def test_tied_ranks_are_shared() -> None:
    x, y = torch.tensor([1.0, 2.0, 2.0, 4.0]), torch.tensor([1.0, 30.0, 2.0, 2.0])
    # Ranks 1, 2.5, 2.5, 4 and 1, 4, 2.5, 2.5: less 2.5 their product is 2.25, their squares 4.5.
    assert spearman(x, y) == pytest.approx(0.5, rel=1e-12)
    assert spearman(x, -x) == pytest.approx(-1, rel=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_the_rank_correlation_is_scipy_s(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(0, 6, (40,), generator=generator).double()
    y = x + 3 * torch.randn(40, generator=generator).round()
    assert spearman(x, y) == pytest.approx(spearmanr(x, y).statistic, rel=1e-10)


def test_the_rank_correlation_of_a_constant_is_not_defined() -> None:
    assert spearman(torch.ones(3), torch.arange(3.0)) is None
    assert spearman(torch.ones(0), torch.ones(0)) is None
