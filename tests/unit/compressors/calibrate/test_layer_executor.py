"""Layer by layer execution gives the result of the whole model."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from lrc.compressors.calibrate import batch_size, statistics
from lrc.compressors.calibrate.batch_size import BATCH_TOKENS
from lrc.compressors.calibrate.calibration_context import CalibrationContext
from lrc.compressors.calibrate.layer_calls import watch
from lrc.compressors.calibrate.layer_check import check_layers
from lrc.compressors.calibrate.layer_executor import LayerExecutor, batches
from lrc.compressors.distributed.processes import Processes
from lrc.compressors.io.journal import Journal
from lrc.compressors.models import weights
from lrc.compressors.models.architecture import Architecture
from lrc.configs.errors import ModelError

LAYERS = 3  # of the model in conftest.py


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(2, 512, (4, 16), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def make_executor(architecture, reader, tmp_path) -> Callable[[Tensor], LayerExecutor]:
    def make(tokens: Tensor) -> LayerExecutor:
        return LayerExecutor(
            CalibrationContext(
                architecture,
                reader,
                lambda: tokens,
                Journal(tmp_path / "out"),
                device="cpu",
                memory_limit_gib=1.0,
                seed=0,
                on_step=lambda *_: None,
            )
        )

    return make


@pytest.fixture
def executor(make_executor, tokens) -> LayerExecutor:
    return make_executor(tokens)


@pytest.fixture
def batches_of_two(monkeypatch, tokens) -> None:
    monkeypatch.setitem(BATCH_TOKENS, "cpu", 2 * tokens.shape[1])
    monkeypatch.setattr(batch_size, "MIN_BATCHES", 1)


def resident(architecture: Architecture) -> set[int]:
    """Return the decoder layers that are not completely on the meta device."""
    return {
        index
        for index, layer in enumerate(architecture.layers)
        if not all(p.is_meta for p in layer.parameters())
    }


@contextmanager
def residents_seen(architecture: Architecture) -> Iterator[list[tuple[int, set[int]]]]:
    """Record, whenever a linear is applied, its layer and which layers are resident."""
    seen: list[tuple[int, set[int]]] = []
    hooks = [
        architecture.model.get_submodule(linear.name).register_forward_hook(
            lambda *_, layer=linear.layer: seen.append((layer, resident(architecture)))
        )
        for linear in architecture.linears
    ]
    yield seen
    for hook in hooks:
        hook.remove()


def test_only_the_executed_layer_has_weights(architecture, executor):
    with residents_seen(architecture) as seen:
        required = {linear.name: {"inputs"} for linear in architecture.linears}
        statistics.collect(executor.context, required)
    assert all(layers == {layer} for layer, layers in seen)
    assert {layer for layer, _ in seen} == set(range(LAYERS))
    times = 1 + executor.n_batches  # traced once, and applied to every batch
    assert len(seen) == times * len(architecture.linears)
    assert all(p.is_meta for p in architecture.model.parameters())


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 1, 0]])
def test_the_next_layer_is_read_while_one_computes(
    architecture, executor, reader, monkeypatch, order
):
    executor.calls  # the trace goes up  # noqa: B018
    expected = [reader.read(linear.name + ".weight") for linear in architecture.linears]
    monkeypatch.setattr(weights, "DEVICE_TYPES", {"cpu"})
    threads: dict[int, set[bool]] = {index: set() for index in range(LAYERS)}
    read = reader.read

    def seen(name, **options):
        ahead = threading.current_thread() is not threading.main_thread()
        threads[int(name.split(".")[2])].add(ahead)
        return read(name, **options)

    reader.read = seen
    found = {}
    for index in order:
        with executor.layer(index):
            assert resident(architecture) == {index}
            for linear in executor.linears(index).values():
                module = architecture.model.get_submodule(linear.name)
                found[linear.name] = module.weight.clone()
    assert all(map(torch.equal, (found[each.name] for each in architecture.linears), expected))
    # The direction of a pass is known from its second layer on.
    assert threads[order[0]] == {False}
    assert threads[order[2]] == {True}
    executor._read_ahead("")
    assert reader._ahead is None


def test_an_error_while_reading_ahead_is_raised_when_the_layer_is_needed(
    executor, reader, monkeypatch
):
    executor.calls  # noqa: B018
    monkeypatch.setattr(weights, "DEVICE_TYPES", {"cpu"})
    read = reader.read

    def damaged(name, **options):
        if name.startswith("model.layers.1."):
            raise ModelError("damaged")
        return read(name, **options)

    reader.read = damaged
    with executor.layer(0):
        pass
    with pytest.raises(ModelError, match="damaged"), executor.layer(1):
        pass


def test_the_head_is_never_read(architecture, executor):
    with executor.around_layers():
        assert resident(architecture) == set()
        assert not architecture.model.model.embed_tokens.weight.is_meta
        assert architecture.model.lm_head.weight.is_meta
    assert architecture.model.model.embed_tokens.weight.is_meta


@pytest.mark.usefixtures("batches_of_two")
def test_layers_applied_in_turn_give_the_states_of_the_whole_model(source, executor, tokens):
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = model(tokens, output_hidden_states=True).hidden_states
    hidden = executor.embedded()
    for index in range(LAYERS):
        torch.testing.assert_close(hidden, expected[index], rtol=1e-5, atol=1e-5)
        with executor.layer(index):
            executor.advance_(index, hidden)
    final = model.model.norm(hidden)
    torch.testing.assert_close(final, expected[-1], rtol=1e-5, atol=1e-5)


def test_the_trace_finds_linears_with_a_common_input(executor):
    for index, call in enumerate(executor.calls):
        prefix = f"model.layers.{index}"
        assert call.groups == [
            [f"{prefix}.self_attn.{leaf}" for leaf in ("q_proj", "k_proj", "v_proj")],
            [f"{prefix}.self_attn.o_proj"],
            [f"{prefix}.mlp.{leaf}" for leaf in ("gate_proj", "up_proj")],
            [f"{prefix}.mlp.down_proj"],
        ]


def test_another_view_of_the_same_memory_is_another_input(architecture, executor):
    """Same address, other columns: the second moments differ."""

    class Halves(nn.Module):
        def __init__(self, inner: Any) -> None:
            super().__init__()
            self.gate_proj, self.up_proj = inner.gate_proj, inner.up_proj
            self.down_proj = inner.down_proj

        def forward(self, x: Tensor) -> Tensor:
            self.gate_proj(x)
            self.up_proj(x.flatten(0, 1)[:4].view(1, 4, -1))
            return x

    for layer in architecture.layers:
        layer.mlp = Halves(layer.mlp)
    assert ["model.layers.0.mlp.gate_proj"] in executor.calls[0].groups
    assert ["model.layers.0.mlp.up_proj"] in executor.calls[0].groups


@pytest.mark.parametrize("calls", [0, 1])
def test_a_model_that_skips_layers_is_rejected(architecture, executor, monkeypatch, calls):
    def forward(**_: Any) -> None:
        for layer in architecture.layers[:calls]:
            layer.forward = lambda x: x
            layer(torch.zeros(1, 1, 32))

    monkeypatch.setattr(architecture.model.model, "forward", forward)
    with pytest.raises(ModelError, match="does not call every decoder layer"):
        executor.embedded()


def test_an_error_in_a_layer_leaves_no_hook_and_no_weight(architecture, executor):
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("in the second layer")

    architecture.layers[1].mlp.forward = fail
    with pytest.raises(RuntimeError, match="second layer"):
        executor.trace()
    hooks = [
        hook
        for module in architecture.model.modules()
        for hook in (*module._forward_pre_hooks, *module._forward_hooks)
    ]
    assert hooks == []
    assert all(p.is_meta for p in architecture.model.parameters())


def test_watching_ends_with_its_context(architecture, executor):
    seen = []
    name = "model.layers.0.mlp.up_proj"
    x = torch.ones(2, 32)
    with executor.layer(0) as layer:
        with watch(architecture.model, [name], lambda *args: seen.append(args)):
            layer.mlp.up_proj(x)
        layer.mlp.up_proj(x)
    assert len(seen) == 1
    assert seen[0][0] == name
    assert seen[0][1] is x


@pytest.mark.parametrize(
    ("n_windows", "length", "expected"),
    [(128, 1024, 2), (6, 48, 6), (7, 1024, 2), (10, 512, 4), (1, 8192, 1), (9, 700, 2)],
)
def test_a_batch_is_as_large_as_the_token_budget_allows(n_windows, length, expected):
    rows = batches(torch.zeros(n_windows, length), BATCH_TOKENS["cpu"])
    assert [i for each in rows for i in range(n_windows)[each]] == list(range(n_windows))
    assert all(len(range(n_windows)[each]) == expected for each in rows[:-1])
    assert len(rows) == -(-n_windows // expected)


@pytest.mark.parametrize("in_turn", [False, True])
def test_processes_have_the_batches_of_a_single_one(make_executor, tokens, in_turn):
    context = make_executor(tokens).context
    windows = tokens.repeat(5, 1)[:17]
    alone = LayerExecutor(replace(context, windows=lambda: windows), in_turn=in_turn)
    expected = [alone.numbers[rows] for rows in alone.batches]
    assert len(expected) >= batch_size.MIN_BATCHES
    found = []
    for rank in range(3):
        one = replace(context, windows=lambda: windows, processes=Processes(rank, 3))
        executor = LayerExecutor(one, in_turn=in_turn)
        found += [executor.numbers[rows] for rows in executor.batches]
        assert torch.equal(executor.tokens, windows[executor.numbers])
        assert executor.n_tokens == windows.numel()
    assert sorted(found) == expected


@pytest.mark.usefixtures("batches_of_two")
def test_a_smaller_last_batch_is_called_with_its_own_arguments(make_executor, tokens):
    """These are found without loading a layer."""
    calls, expected = make_executor(tokens[:3]).calls, make_executor(tokens[2:3]).calls
    assert [set(call.arguments) for call in calls] == [{2, 1}] * LAYERS
    for call, alone in zip(calls, expected, strict=True):
        (args, kwargs), (args_alone, kwargs_alone) = call.arguments[1], alone.arguments[1]
        torch.testing.assert_close(args, args_alone, rtol=0, atol=0)
        assert kwargs.keys() == kwargs_alone.keys()
        for key, value in kwargs.items():
            if isinstance(value, Tensor | tuple):
                torch.testing.assert_close(value, kwargs_alone[key], rtol=0, atol=0)


def test_a_forward_of_the_layer_instance_is_restored(architecture, executor, tokens):
    def own(hidden: Tensor, *_: Any, **__: Any) -> Tensor:
        return hidden

    architecture.layers[1].forward = own
    hidden = executor.embedded()
    with executor.around_layers(head=True):
        executor.logits(hidden, tokens)
    assert vars(architecture.layers[1])["forward"] is own
    assert "forward" not in vars(architecture.layers[0])


def test_known_calls_are_those_of_a_trace_and_read_no_layer(
    make_executor, architecture, reader, tokens, batches_of_two, monkeypatch
):
    traced, checked = make_executor(tokens[:3]), check_layers(architecture)
    assert checked.plain_layers
    known = LayerExecutor(replace(traced.context, architecture=checked))
    read: list[str] = []
    real = reader.read
    monkeypatch.setattr(reader, "read", lambda name, **how: read.append(name) or real(name, **how))
    for before, after in zip(traced.trace(), known.calls, strict=True):
        assert (after.groups, after.others) == (before.groups, None)
        assert (after.d_model, after.by_keyword) == (before.d_model, before.by_keyword)
        torch.testing.assert_close(after.arguments, before.arguments, rtol=0, atol=0)
    assert len(read) > LAYERS  # by the trace
    read.clear()
    known.trace()
    assert not [name for name in read if "layers" in name or "embed" in name]
