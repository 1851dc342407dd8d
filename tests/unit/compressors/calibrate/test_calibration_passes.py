"""Gradients layer by layer are those of the whole model; labels have their documented moments."""

import itertools
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, OPTConfig, OPTForCausalLM

from lrc.compressors.calibrate import statistics
from lrc.compressors.calibrate.batch_size import BATCH_TOKENS
from lrc.compressors.calibrate.calibration_context import CalibrationContext
from lrc.compressors.calibrate.calibration_passes import logit_gradient
from lrc.compressors.calibrate.layer_executor import LayerExecutor
from lrc.compressors.calibrate.sequential_calibration import SequentialCalibration
from lrc.compressors.io.journal import Journal
from lrc.compressors.models.architecture import Architecture, build
from lrc.compressors.models.source import locate
from lrc.compressors.models.weights import WeightReader
from lrc.compressors.solvers import moments
from lrc.compressors.solvers.moments import Statistics, token_weights
from lrc.configs.errors import ModelError
from lrc.configs.recipe import Model

pytestmark = pytest.mark.usefixtures("one_thread")

LAYERS = 3  # of the model in conftest.py
EVERYTHING = frozenset({"inputs", "gradients", "input_mean", "input_magnitude", "row_fisher"})


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(2, 512, (6, 16), generator=torch.Generator().manual_seed(0))


def collect(architecture: Architecture, reader: WeightReader, tokens: Tensor, folder, **changes):
    required = changes.pop("required", {lin.name: EVERYTHING for lin in architecture.linears})
    arguments: dict[str, Any] = {
        "labels": "real",
        "seed": 0,
        "device": "cpu",
        "memory_limit_gib": 1.0,
        "on_step": lambda *_: None,
    }
    journal = Journal(folder)
    journal.work.mkdir(parents=True, exist_ok=True)
    context = CalibrationContext(
        architecture, reader, lambda: tokens, journal, **arguments | changes
    )
    statistics.collect(context, required)
    return journal


def known(journal: Journal, architecture: Architecture) -> dict[str, Statistics]:
    return {lin.name: statistics.load(journal, lin.layer, lin.name) for lin in architecture.linears}


def of_whole_model(
    source, tokens: Tensor, counted: Tensor | None = None
) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """Return inputs, output gradients and squared weight gradients of rows, by plain autograd."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and "layers" in n}
    for name, module in linears.items():

        def watch(_: nn.Module, args: Any, y: Tensor, name: str = name) -> None:
            y.register_hook(lambda g: seen.__setitem__(name, (args[0].detach(), g)))

        module.register_forward_hook(watch)
    logits = model(tokens).logits
    labels = tokens[:, 1:].flatten()
    if counted is not None:
        labels = labels.where(counted[:, 1:].flatten(), -100)
    loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels, reduction="sum")
    loss.backward()
    result = {}
    for name, (x, g) in seen.items():
        per_window = torch.einsum("bto,bti->boi", g, x).square().sum(dim=(0, 2))
        result[name] = x.flatten(0, 1), g.flatten(0, 1), per_window
    return result


def test_statistics_are_those_of_autograd_over_the_whole_model(
    source, architecture, reader, tokens, tmp_path
):
    found = known(collect(architecture, reader, tokens, tmp_path / "out"), architecture)
    expected = of_whole_model(source, tokens)
    assert set(found) == set(expected)
    forms = set()
    for name, s in found.items():
        x, g, fisher = expected[name]
        W = reader.read(f"{name}.weight")
        for moment, v, seen_through in ((s.inputs, x, W), (s.gradients, g, W.T)):
            close(moment.diagonal, v.square().sum(dim=0))
            if moment.full is not None:
                close(moment.full, v.T @ v)
            if moment.image is not None:
                seen = v @ seen_through.T
                close(moment.image, seen.T @ seen)
            forms.add((v is x, moment.full is None))
        close(s.input_mean, x.sum(dim=0))
        close(s.input_magnitude, x.abs().sum(dim=0))
        close(s.row_fisher, fisher)
        assert s.n_tokens == tokens.numel()
    assert len(forms) == 4  # whole and image, on both sides


@pytest.mark.parametrize("batch", [6, 4])
def test_capped_inputs_are_those_of_weighted_tokens(
    source, architecture, reader, tokens, tmp_path, monkeypatch, batch
):
    """Unless a linear of the same input needs every token in full."""
    monkeypatch.setitem(BATCH_TOKENS, "cpu", batch * tokens.shape[1])
    monkeypatch.setattr(moments, "TOKEN_CAP", 1.0)  # about half of all tokens
    capped = {"inputs", "whole_inputs", "capped_inputs"}
    required = {lin.name: capped for lin in architecture.linears}
    required |= {n: capped - {"capped_inputs"} for n in required if n.endswith("v_proj")}
    found = known(
        collect(architecture, reader, tokens, tmp_path / "out", required=required), architecture
    )
    expected = of_whole_model(source, tokens)
    for name, s in found.items():
        x = expected[name][0]
        weights = token_weights(x, tokens.shape[1])
        assert 0.2 < float((weights < 1).float().mean()) < 0.8
        if not name.endswith(("q_proj", "k_proj", "v_proj")):
            x = weights.sqrt() * x
        assert s.inputs is not None
        close(s.inputs.whole(), (x.T @ x).double())
        close(s.inputs.diagonal, x.square().sum(dim=0))


def test_windows_are_separated_where_a_model_flattens_their_tokens(tokens, tmp_path):
    """OPT gives its MLP all tokens in one dimension; the row Fisher is a sum over windows."""
    config = OPTConfig(
        vocab_size=512,
        hidden_size=32,
        word_embed_proj_dim=32,
        ffn_dim=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        max_position_embeddings=64,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        OPTForCausalLM(config).save_pretrained(tmp_path / "source")
    architecture = build(locate(Model(path=str(tmp_path / "source"), dtype="float32")))
    reader = WeightReader(tmp_path / "source", architecture)
    required = {linear.name: {"row_fisher"} for linear in architecture.linears}
    journal = collect(architecture, reader, tokens, tmp_path / "out", required=required)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "source").eval()
    expected = dict.fromkeys(required, 0.0)
    for window in tokens:
        model.zero_grad()
        logits = model(window[None]).logits[0, :-1]
        nn.functional.cross_entropy(logits, window[1:], reduction="sum").backward()
        for name in expected:
            expected[name] += model.get_submodule(name).weight.grad.square().sum(dim=1)
    for name, s in known(journal, architecture).items():
        close(s.row_fisher, expected[name])


def close(found: Tensor, expected: Tensor) -> None:
    scale = float(expected.abs().max())
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-5 * scale)


def test_only_required_statistics_are_collected(architecture, reader, tokens, tmp_path):
    name = "model.layers.1.mlp.up_proj"
    journal = collect(architecture, reader, tokens, tmp_path / "o", required={name: {"gradients"}})
    assert statistics.load(journal, 0, "model.layers.0.mlp.up_proj") == Statistics()
    s = statistics.load(journal, 1, name)
    assert s.missing(EVERYTHING) == ["input_magnitude", "input_mean", "inputs", "row_fisher"]
    assert not journal.has(statistics.statistics_files(0)[1])  # nothing below the lowest target


def test_second_moments_of_inputs_can_be_left_out(architecture, reader, tokens, tmp_path):
    name = "model.layers.1.mlp.up_proj"
    journal = collect(architecture, reader, tokens, tmp_path, required={name: EVERYTHING})
    whole = statistics.load(journal, 1, name)
    found = statistics.load(journal, 1, name, with_inputs=False)
    assert found.missing(EVERYTHING) == ["inputs"]
    assert found.n_tokens == whole.n_tokens
    assert torch.equal(found.gradients.diagonal, whole.gradients.diagonal)
    assert torch.equal(found.input_mean, whole.input_mean)


@pytest.mark.parametrize("labels", ["model", "sampled", "real"])
def test_the_same_seed_gives_the_same_bytes_whatever_the_memory(
    architecture, reader, tokens, tmp_path, labels
):
    runs = [
        collect(architecture, reader, tokens, tmp_path / str(n), labels=labels, **limit)
        for n, limit in enumerate([{}, {"memory_limit_gib": 1e-9}])
    ]
    assert contents(runs[0]) == contents(runs[1])


def contents(journal: Journal) -> dict[str, Any]:
    """Return every tensor's bytes, and the facts: safetensors writes them in any order."""
    result: dict[str, Any] = {}
    for path in sorted(journal.path("statistics").iterdir()):
        name = f"statistics/{path.name}"
        tensors = {k: t.numpy().tobytes() for k, t in load_file(path).items()}
        result[name] = tensors, journal.read_facts(name)
    assert len(result) == 2 * LAYERS
    return result


@pytest.mark.parametrize("labels", ["model", "real"])
def test_a_smaller_last_batch_changes_statistics_by_rounding_only(
    architecture, reader, tokens, tmp_path, monkeypatch, labels
):
    whole = known(
        collect(architecture, reader, tokens, tmp_path / "1", labels=labels), architecture
    )
    monkeypatch.setitem(BATCH_TOKENS, "cpu", 4 * tokens.shape[1])  # batches of 4 and 2 windows
    split = known(
        collect(architecture, reader, tokens, tmp_path / "2", labels=labels), architecture
    )
    for name, one in whole.items():
        two = split[name]
        for a, b in ((one.inputs, two.inputs), (one.gradients, two.gradients)):
            for part in ("diagonal", "full", "image"):
                if getattr(a, part) is not None:
                    close(getattr(b, part), getattr(a, part))
        for part in ("input_mean", "input_magnitude", "row_fisher"):
            close(getattr(two, part), getattr(one, part))


class Kill(Exception):
    pass


@pytest.mark.parametrize("moment", range(2 * LAYERS))
@pytest.mark.parametrize("snapshots", [False, True])
def test_a_collection_stopped_at_any_step_continues_to_the_same_bytes(
    architecture, reader, tokens, tmp_path, monkeypatch, moment, snapshots
):
    if snapshots:
        monkeypatch.setattr("lrc.compressors.calibrate.activation_cache.SNAPSHOT_SECONDS", 0.0)
    whole = collect(architecture, reader, tokens, tmp_path / "whole")
    steps = itertools.count()

    def on_step(*_: Any) -> None:
        if next(steps) == moment:
            raise Kill

    with pytest.raises(Kill):
        collect(architecture, reader, tokens, tmp_path / "cut", on_step=on_step)
    cut = collect(architecture, reader, tokens, tmp_path / "cut")
    assert contents(cut) == contents(whole)


def test_gradients_that_are_not_finite_name_their_layer(
    architecture, reader, tokens, tmp_path, monkeypatch
):
    def infinite(logits: Tensor, *_: Any) -> Tensor:
        return torch.full_like(logits, torch.inf)

    monkeypatch.setattr("lrc.compressors.calibrate.calibration_passes.logit_gradient", infinite)
    with pytest.raises(ModelError, match=r"not finite .*: the gradients in model\.layers\.2"):
        collect(architecture, reader, tokens, tmp_path / "out")


@pytest.mark.parametrize("labels", ["model", "sampled"])
def test_the_second_moment_at_the_logits_is_the_fisher_matrix(labels):
    """Mean of 200,000 draws against ``diag(p) - p p^T``; measured difference 1.4e-3 and 1.0e-3."""
    logits = torch.tensor([1.0, -0.5, 0.3, 2.0, -3.0]).expand(1000, 200, 5)
    tokens = torch.zeros(1000, 200, dtype=torch.int64)
    g = logit_gradient(logits, tokens, labels, torch.Generator().manual_seed(0)).flatten(0, 1)
    p = logits[0, 0].softmax(dim=0)
    torch.testing.assert_close(
        g.T @ g / len(g), torch.diag(p) - torch.outer(p, p), rtol=0, atol=4e-3
    )
    torch.testing.assert_close(g.sum(dim=1), torch.zeros(len(g)), rtol=0, atol=1e-5)


def test_real_labels_give_the_gradient_of_the_cross_entropy(tokens):
    logits = torch.randn(6, 16, 512, generator=torch.Generator().manual_seed(1)).requires_grad_()
    loss = nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum"
    )
    (expected,) = torch.autograd.grad(loss, logits)
    found = logit_gradient(logits.detach(), tokens, "real", torch.Generator())
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_labels_that_do_not_count_have_no_gradient(source, architecture, reader, tokens, tmp_path):
    counted = torch.rand(tokens.shape, generator=torch.Generator().manual_seed(1)) < 0.5
    journal = collect(architecture, reader, tokens, tmp_path / "out", counted=lambda: counted)
    expected = of_whole_model(source, tokens, counted)
    for name, found in known(journal, architecture).items():
        x, g, fisher = expected[name]
        close(found.gradients.diagonal, g.square().sum(dim=0))
        close(found.row_fisher, fisher)
        close(found.inputs.diagonal, x.square().sum(dim=0))


def sequential(architecture, reader, tokens, folder) -> SequentialCalibration:
    return SequentialCalibration(
        CalibrationContext(
            architecture,
            reader,
            lambda: tokens,
            Journal(folder),
            device="cpu",
            memory_limit_gib=1.0,
            seed=0,
            on_step=lambda *_: None,
        )
    )


@pytest.mark.parametrize("batch", [6, 4])
def test_sequential_calibration_sees_the_inputs_of_the_replaced_model(
    source, architecture, reader, tokens, tmp_path, monkeypatch, batch
):
    """Two layers replaced on the way; every input against hooks on two whole models."""
    monkeypatch.setitem(BATCH_TOKENS, "cpu", batch * tokens.shape[1])
    sequence = sequential(architecture, reader, tokens, tmp_path)
    models = [AutoModelForCausalLM.from_pretrained(source).eval() for _ in range(2)]
    g = torch.Generator().manual_seed(2)

    def input_of(model: nn.Module, name: str) -> Tensor:
        seen: list[Tensor] = []
        hook = model.get_submodule(name).register_forward_pre_hook(
            lambda _, args: seen.append(args[0].flatten(0, 1))
        )
        with torch.no_grad():
            model(tokens)
        hook.remove()
        return seen[0]

    for layer in range(LAYERS):
        for names in sequence.groups(layer):
            found = sequence.measure(layer, names, deficit=True)
            x, x_hat = (input_of(model, names[0]) for model in models)
            close(found.H, x_hat.T @ x_hat)
            close(found.cross, x.T @ x_hat)
            # A layer's input, and what its second norm is given: what attention and MLP add to.
            block, _, linear = names[0].rpartition(".")
            added_to = {
                "o_proj": f"model.layers.{layer}.input_layernorm",
                "down_proj": f"model.layers.{layer}.post_attention_layernorm",
            }
            if linear in added_to:
                stream, stream_hat = (input_of(model, added_to[linear]) for model in models)
                close(found.deficit[names[0]], (stream - stream_hat).T @ x_hat)
            assert set(found.deficit) <= {f"{block}.o_proj", f"{block}.down_proj"}
            assert bool(found.deficit) == (linear in added_to)
            assert not sequence.measure(layer, names, deficit=False).deficit
            with monkeypatch.context() as patch:
                patch.setattr(moments, "TOKEN_CAP", 1.0)
                lighter = sequence.measure(layer, names, deficit=True, capped=True)
                weights = token_weights(x_hat, tokens.shape[1])
            assert bool((weights < 1).any())
            close(lighter.H, x_hat.T @ (weights * x_hat))
            close(lighter.cross, x.T @ (weights * x_hat))
            if linear in added_to:
                missing = stream - stream_hat
                close(lighter.deficit[names[0]], missing.T @ (weights * x_hat))
            for name in names:
                module = models[1].get_submodule(name)
                noise = torch.randn(module.weight.shape, generator=g)
                module.weight.data += 0.05 * noise
                sequence.insert(name, module.weight.data)
        sequence.advance(layer)
    assert all(p.is_meta for p in architecture.model.parameters())


def test_dense_states_advance_with_the_last_measurement(
    architecture, reader, tokens, tmp_path, monkeypatch
):
    """Without another pass through the layer, and with the same numbers."""
    passes = []
    advance = LayerExecutor.advance_
    monkeypatch.setattr(
        LayerExecutor, "advance_", lambda *args: passes.append(args[1]) or advance(*args)
    )
    found = {}
    for fused in (False, True):
        sequence = sequential(architecture, reader, tokens, tmp_path / str(fused))
        g, found[fused] = torch.Generator().manual_seed(3), []
        passes.clear()
        for layer in range(LAYERS):
            groups = sequence.groups(layer)
            for names in groups:
                last = fused and names == groups[-1]
                moments = sequence.measure(layer, names, deficit=True, last=last)
                found[fused] += [moments.H, moments.cross, *moments.deficit.values()]
                for name in names:
                    W = reader.read(f"{name}.weight")
                    sequence.insert(name, W + 0.05 * torch.randn(W.shape, generator=g))
            sequence.advance(layer)
        assert len(passes) == (LAYERS if fused else 2 * LAYERS)
    for plain, fused in zip(found[False], found[True], strict=True):
        assert torch.equal(plain, fused)
