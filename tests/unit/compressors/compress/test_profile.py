"""Measured increases of the loss, compared with models that are changed by hand."""

import copy
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from lrc.compressors.calibrate.calibration_context import CalibrationContext
from lrc.compressors.calibrate.statistics import statistics_files
from lrc.compressors.compress.group import stored_weight
from lrc.compressors.compress.layerwise import compress_layers, layer_file
from lrc.compressors.compress.profile import Profile, profile_plan, rank_correlation
from lrc.compressors.io.journal import Journal
from lrc.compressors.io.machine import no_progress
from lrc.compressors.layers import ComponentConfig, WeightConfig
from lrc.compressors.methods.table import METHODS
from lrc.compressors.models.architecture import describe
from lrc.compressors.models.weights import SkeletonFiller
from lrc.compressors.planning.plan import ModelInfo, Plan
from lrc.compressors.planning.tasks import LayerTask, Weight
from lrc.compressors.solvers.moments import Moment, Statistics
from lrc.configs.errors import OutputError, Stopped

LEAVES = ("self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj")
NAMES = [f"model.layers.{layer}.{leaf}" for layer in (0, 1) for leaf in LEAVES]
LAYERS = ["model.layers.0", "model.layers.1"]
RANK = 4
# Rounding of losses near 7 in float32, of which an ulp is 5e-7: forward passes of two layers that
# round in different places, twice in a difference. Measured at most 1.3e-6.
NATS = 2e-5


class Weights(SkeletonFiller):
    """Replaces a `WeightReader` for a model in memory."""

    def __init__(self, model: Any) -> None:
        skeleton = LlamaForCausalLM(model.config).to("meta")
        skeleton.model.rotary_emb = copy.deepcopy(model.model.rotary_emb)
        super().__init__(describe(skeleton))
        self.architecture = self._architecture
        self.tensors = model.state_dict()

    def read(self, name: str, *, device: str | torch.device = "cpu") -> Tensor:
        return self.tensors[name].clone()


@pytest.fixture
def model(tiny_llama: Callable[..., Any]) -> Any:
    return tiny_llama()


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(2, 512, (3, 24), generator=torch.Generator().manual_seed(0))


def known(weight: Weight) -> Statistics:
    """Return statistics of random inputs with a mean."""
    d_in = 48 if weight.name.endswith("down_proj") else 32
    X = torch.randn(200, d_in, generator=torch.Generator().manual_seed(1)).double() + 1
    return Statistics(200, inputs=Moment.of(X.T @ X), input_mean=X.sum(dim=0))


def plan_of(model: Any, method: str, types: str = "low_rank") -> Plan:
    shared = method == "basis-sharing"
    tasks = []
    for name in NAMES[: len(LEAVES)] if shared else NAMES:
        both = name, name.replace("layers.0", "layers.1")
        names = both if shared else (name,)
        shape = tuple(model.get_submodule(name).weight.shape)
        components = (ComponentConfig(types, {"rank": RANK}),)
        task = LayerTask(
            weights=tuple(Weight(each, int(each.split(".")[2])) for each in names),
            config=WeightConfig(shape, components, bias=METHODS[method].has_bias),
            number_bits=32,
            stage=0,
            method=method,
            types=types,
            options=dict.fromkeys(METHODS[method].options, 1e-6),
            statistics=tuple(METHODS[method].statistics),
        )
        tasks.append(task)
    return Plan(ModelInfo("s", "float32", "Llama", 0, 0, None, False), 0, {}, tasks)


def journal_of(folder: Path) -> Journal:
    journal = Journal(folder)
    for layer in (0, 1):  # only the existence of the statistics is checked
        journal.write_json(statistics_files(layer)[0], {})
    return journal


def measured(
    plan: Plan,
    model: Any,
    tokens: Tensor,
    journal: Journal,
    *,
    reader: Any = None,
    limit: float = 1.0,
    on_step: Any = no_progress,
) -> Profile:
    reader = reader or Weights(model)
    journal.work.mkdir(parents=True, exist_ok=True)
    context = CalibrationContext(
        reader.architecture, reader, lambda: tokens, journal, "cpu", limit, seed=0, on_step=on_step
    )
    return profile_plan(plan, reader, known, context)


def loss_of(model: Any, tokens: Tensor) -> float:
    with torch.no_grad():
        return float(model(input_ids=tokens, labels=tokens).loss)


@pytest.mark.parametrize(
    ("method", "types"),
    [
        ("svd", "low_rank"),
        ("svd-llm", "pivoted_low_rank"),
        ("lord", "low_rank"),
        ("basis-sharing", "low_rank"),
    ],
)
def test_an_increase_is_that_of_a_model_changed_by_hand(
    method: str, types: str, model: Any, tokens: Tensor, tmp_path: Path
) -> None:
    plan = plan_of(model, method, types)
    profile = measured(plan, model, tokens, journal_of(tmp_path / "a"))
    journal = Journal(tmp_path / "b")
    executed = compress_layers(
        *(plan, Weights(model), journal, known),  # type: ignore[arg-type]
        device="cpu",
        on_step=lambda *_: None,
    )
    dense = loss_of(model, tokens)
    assert profile.dense == pytest.approx(dense, abs=NATS)
    assert (profile.windows, profile.tokens) == (3, 3 * 23)
    assert max(map(abs, profile.increases.values())) > 1e-2  # a thousand times the tolerance
    assert list(profile.increases) == [task.name for task in executed.tasks]
    assert all(len(t.weights) == (2 if method == "basis-sharing" else 1) for t in executed.tasks)
    for task in executed.tasks:
        changed = copy.deepcopy(model)

        def read(key: str, file: str = layer_file(task.layer)) -> Tensor:
            return journal.read_tensor(file, key)

        for weight in task.weights:
            linear = changed.get_submodule(weight.name)
            result = executed.results[task.name]
            assert result.config.compressed
            linear.weight.data.copy_(stored_weight(task, result, weight.name, read))
            if method == "lord":
                linear.bias = nn.Parameter(read(f"{weight.name}.bias"))
        increase = loss_of(changed, tokens) - dense
        assert profile.increases[task.name] == pytest.approx(increase, abs=NATS)
        divergence = divergence_of(changed, model, tokens)
        assert profile.divergences[task.name] == pytest.approx(divergence, rel=1e-3, abs=1e-6)


def divergence_of(changed: Any, model: Any, tokens: Tensor) -> float:
    with torch.no_grad():
        p, q = (m(input_ids=tokens).logits[:, :-1].double() for m in (model, changed))
    loss = nn.functional.kl_div(
        q.log_softmax(-1), p.log_softmax(-1), log_target=True, reduction="sum"
    )
    return float(loss) / (tokens.shape[0] * (tokens.shape[1] - 1))


def test_an_increase_of_svd_is_that_of_the_truncated_weight(
    model: Any, tokens: Tensor, tmp_path: Path
) -> None:
    profile = measured(plan_of(model, "svd"), model, tokens, Journal(tmp_path))
    for name in NAMES:
        changed = copy.deepcopy(model)
        weight = changed.get_submodule(name).weight.data
        U, S, Vh = torch.linalg.svd(weight.double())
        weight.copy_(U[:, :RANK] * S[:RANK] @ Vh[:RANK])
        increase = loss_of(changed, tokens) - loss_of(model, tokens)
        assert profile.increases[name] == pytest.approx(increase, abs=NATS)


def test_the_model_is_dense_again_after_every_weight(
    model: Any, tokens: Tensor, tmp_path: Path
) -> None:
    used = Weights(model)
    before = copy.deepcopy(model.state_dict())
    measured(plan_of(model, "lord"), model, tokens, journal_of(tmp_path), reader=used)
    assert all(torch.equal(used.tensors[name], tensor) for name, tensor in before.items())
    assert all(parameter.is_meta for parameter in used.architecture.model.parameters())
    assert not [name for name, _ in used.architecture.model.named_parameters() if "bias" in name]


def test_measured_layers_are_not_measured_again(model: Any, tokens: Tensor, tmp_path: Path) -> None:
    plan, reader, reads = plan_of(model, "svd"), Weights(model), Counter[str]()
    fill = reader.fill_

    def counted(name: str, **options: Any) -> None:
        reads[name] += 1
        fill(name, **options)

    reader.fill_ = counted  # type: ignore[method-assign]
    options: dict[str, Any] = {"reader": reader, "limit": 1e-9}  # one layer after the other

    def stop(stage: str, done: int, total: int) -> None:
        raise Stopped(f"{stage} {done} of {total}")

    undisturbed = measured(plan, model, tokens, Journal(tmp_path / "a"))
    journal = Journal(tmp_path / "b")
    with pytest.raises(Stopped, match="profile 1 of 2"):
        measured(plan, model, tokens, journal, on_step=stop, **options)
    first = journal.path("profile/layer-0000.json")
    stamp = first.stat().st_mtime_ns
    found = measured(plan, model, tokens, journal, **options)
    assert found.divergences == pytest.approx(undisturbed.divergences, rel=1e-5)
    assert first.stat().st_mtime_ns == stamp
    reads.clear()
    assert measured(plan, model, tokens, journal, **options) == found
    assert not reads
    assert not list(journal.work.glob("*.live"))
    # Other windows need another measurement.
    fewer = measured(plan, model, tokens[:1], journal, **options)
    assert fewer.windows == 1
    assert fewer.increases != undisturbed.increases


def test_each_layer_is_read_once_for_all_tasks(model: Any, tokens: Tensor, tmp_path: Path) -> None:
    reader, reads = Weights(model), Counter[str]()
    fill = reader.fill_

    def counted(name: str, **options: Any) -> None:
        reads[name] += 1
        fill(name, **options)

    reader.fill_ = counted  # type: ignore[method-assign]
    measured(plan_of(model, "svd"), model, tokens, Journal(tmp_path), reader=reader)
    # The trace, and the pass.
    assert {name: n for name, n in reads.items() if name} == dict.fromkeys(LAYERS, 2)


def test_deleted_statistics_are_named(model: Any, tokens: Tensor, tmp_path: Path) -> None:
    journal = journal_of(tmp_path)
    journal.forget(statistics_files(1)[0])
    with pytest.raises(OutputError, match=r"layers.1.self_attn.q_proj .*") as caught:
        measured(plan_of(model, "svd-llm"), model, tokens, journal)
    assert caught.value.code == "statistics-deleted"


def test_weights_that_cannot_be_compressed_change_nothing(
    model: Any, tokens: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(measured.__globals__, "known", lambda weight: Statistics())
    profile = measured(plan_of(model, "svd-llm"), model, tokens, journal_of(tmp_path))
    assert set(profile.increases.values()) == set(profile.divergences.values()) == {0.0}


def test_a_plan_of_dense_weights_has_an_empty_profile(
    model: Any, tokens: Tensor, tmp_path: Path
) -> None:
    plan = plan_of(model, "svd")
    plan = plan.with_tasks(task.kept_dense() for task in plan.tasks)
    profile = measured(plan, model, tokens, Journal(tmp_path))
    assert (profile.dense, profile.increases, profile.divergences) == (None, {}, {})
    assert profile.to_json(plan)["spearman"] == {"predicted_nats": None, "relative_error": None}


def test_tied_ranks_are_averaged() -> None:
    x, y = [1.0, 2.0, 2.0, 4.0], [1.0, 30.0, 2.0, 2.0]
    # Ranks 1, 2.5, 2.5, 4 and 1, 4, 2.5, 2.5: centred, their product is 2.25, their squares 4.5.
    assert rank_correlation(x, y) == pytest.approx(0.5, rel=1e-12)
    assert rank_correlation(x, [-each for each in x]) == pytest.approx(-1, rel=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_the_rank_correlation_is_that_of_scipy(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(0, 6, (40,), generator=generator).double()
    y = x + 3 * torch.randn(40, generator=generator).round()
    found = rank_correlation(x.tolist(), y.tolist())
    assert found == pytest.approx(spearmanr(x, y).statistic, rel=1e-10)


def test_the_rank_correlation_of_a_constant_is_undefined() -> None:
    assert rank_correlation([1.0, 1.0, 1.0], [0.0, 1.0, 2.0]) is None
    assert rank_correlation([0.0, 1.0, 2.0], [1.0, 1.0, 1.0]) is None
    assert rank_correlation([], []) is None
