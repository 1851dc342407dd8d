"""A plain model with a smaller hidden_size: exact at full width, and as small as planned."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rotated_model import fuse_norms_, rotate_
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from lrc.compressors.calibrate.calibration_context import CalibrationContext
from lrc.compressors.io.journal import Journal
from lrc.compressors.models.architecture import build
from lrc.compressors.models.source import locate
from lrc.compressors.models.weights import WeightReader
from lrc.compressors.slicing.families import find_family
from lrc.compressors.slicing.slice_method import Budget, SlicedModel
from lrc.compressors.slicing.slicegpt import Slicegpt
from lrc.compressors.slicing.stream_bases import principal_axes, stream_moment
from lrc.configs.errors import ModelError, RecipeError, Stopped
from lrc.configs.recipe import Model
from lrc.configs.size import least_text
from lrc.configs.slice import Slicegpt as Options

WIDTH = 32
OPTIONS = Options(method="slicegpt", keep=0.5)
WHERE = "stages[0].slice.keep"
PLAIN = ["llama", "llama-biased", "llama-tied", "mistral", "qwen2", "qwen3-tied"]


class Case:
    """A dense model in a folder, and the context to slice it."""

    def __init__(self, model: Any, folder: Path, tokens: Tensor, dtype: str = "float32") -> None:
        self.folder, self.tokens = folder, tokens
        model.to(getattr(torch, dtype)).save_pretrained(folder / "dense")
        source = locate(Model(path=str(folder / "dense"), dtype=dtype))
        self.architecture = build(source)
        self.stored = self.architecture.stored_parameters()
        self.steps: list[tuple[str, int, int]] = []
        self.context = CalibrationContext(
            self.architecture,
            WeightReader(folder / "dense", self.architecture),
            lambda: tokens,
            Journal(folder / "out"),
            "cpu",
            1.0,
            0,
            lambda *step: self.steps.append(step),
        )

    @property
    def dense_bytes(self) -> int:
        return sum(p.numel() * p.dtype.itemsize for p in self.stored.values())

    def plan(self, n_bytes: int, options: Options = OPTIONS) -> Any:
        return Slicegpt().plan(self.architecture, options, Budget(WHERE, n_bytes, self.dense_bytes))

    def narrowed(self, width: int) -> Any:
        """Plan a width whatever its bytes."""
        config = self.plan(self.dense_bytes)
        config.hidden_size = width
        return config

    def apply(self, config: Any) -> SlicedModel:
        return Slicegpt().apply(self.context, OPTIONS, config)

    def load(self, sliced: SlicedModel) -> Any:
        folder = self.folder / f"sliced-{sliced.config.hidden_size}"
        sliced.config.save_pretrained(folder)
        save_file(dict(sliced.tensors), folder / "model.safetensors", metadata={"format": "pt"})
        model, report = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True
        )
        assert not any(report[key] for key in ("missing_keys", "unexpected_keys"))
        return model.eval()

    def dense(self) -> Any:
        return AutoModelForCausalLM.from_pretrained(self.folder / "dense", dtype=torch.float32)


@pytest.fixture
def make_case(
    configs: dict[str, Callable[[], Any]],
    make_model: Callable[..., Any],
    tokens: Tensor,
    tmp_path: Path,
) -> Callable[..., Case]:
    def make(name: str = "llama", change: Callable[[Any], None] | None = None, **kw: Any) -> Case:
        model = make_model(configs[name]())
        if change:
            with torch.no_grad():
                change(model)
        return Case(model, tmp_path, tokens, **kw)

    return make


@torch.no_grad()
def logits(model: Any, tokens: Tensor) -> Tensor:
    result: Tensor = model(tokens, use_cache=False).logits
    return result


def mixed(M: Tensor) -> Callable[[Any], None]:
    """Multiply everything that is written to the residual stream by M."""

    def change(model: Any) -> None:
        family = find_family(model)
        for name in family.embeddings:
            weight = model.get_submodule(name).weight
            weight.copy_(weight @ M)
        for block in family.stream(model):
            for name in block.writers:
                weight = model.get_submodule(name).weight
                weight.copy_(M.T @ weight)

    return change


@pytest.mark.parametrize("name", PLAIN)
def test_at_full_width_the_logits_are_those_of_the_dense_model(make_case, name):
    case = make_case(name)
    dense = logits(case.dense(), case.tokens)
    model = case.load(case.apply(case.narrowed(WIDTH)))
    assert dense.std() > 1
    torch.testing.assert_close(logits(model, case.tokens), dense, rtol=0, atol=2e-4)
    assert torch.equal(logits(model, case.tokens).argmax(-1), dense.argmax(-1))


@pytest.mark.parametrize("name", PLAIN)
def test_a_sliced_model_is_the_fused_one_with_fewer_columns(make_case, make_model, configs, name):
    """Norms over k numbers equal norms over D, including eps and norms of heads (Qwen-3)."""
    large_eps = {"rms_norm_eps": 0.3}

    def enlarge(model: Any) -> None:
        model.config.update(large_eps)

    case = make_case(name, enlarge)
    model = case.load(case.apply(case.narrowed(16)))
    twin = case.dense().double()
    family = find_family(twin)
    fuse_norms_(twin, family)
    Q, _ = principal_axes(stream_moment(case.context, family))
    rotate_(twin, family, Q[:, :16])
    assert twin.model.norm.eps == 0.3
    expected = logits(twin, case.tokens)
    torch.testing.assert_close(logits(model, case.tokens).double(), expected, rtol=0, atol=2e-4)


@pytest.mark.parametrize("name", PLAIN)
def test_a_plan_is_the_widest_within_its_bytes_and_is_kept_to_the_byte(make_case, name):
    case = make_case(name)
    budget = int(0.8 * case.dense_bytes)
    sliced = case.apply(case.plan(budget))
    k = sliced.config.hidden_size
    assert k % 8 == 0
    assert k < WIDTH
    tensors = dict(sliced.tensors)
    n_bytes = sum(t.numel() * t.dtype.itemsize for t in tensors.values())
    assert n_bytes <= budget
    model = case.load(SlicedModel(sliced.config, iter(tensors.items())))
    assert sum(p.numel() * 4 for p in model.parameters()) == n_bytes
    wider = case.apply(case.narrowed(k + 8))
    assert sum(t.numel() * t.dtype.itemsize for _, t in wider.tensors) > budget


@pytest.mark.parametrize("name", PLAIN)
def test_tensors_come_in_the_order_and_precision_of_the_smaller_model(make_case, name):
    case = make_case(name, dtype="bfloat16")
    sliced = case.apply(case.narrowed(16))
    tensors = list(sliced.tensors)
    small = case.folder / "small"
    sliced.config.save_pretrained(small)
    save_file(dict(tensors), small / "model.safetensors")
    stored = build(locate(Model(path=str(small)))).stored_parameters()
    assert [n for n, _ in tensors] == list(stored)
    for name_, tensor in tensors:
        assert (tensor.shape, tensor.dtype) == (stored[name_].shape, torch.bfloat16)


def test_a_planted_stream_of_sixteen_dimensions_survives_in_sixteen(make_case, random_rotation):
    basis = random_rotation(5)[:, :16]
    case = make_case("llama", mixed(basis @ basis.T))
    dense = logits(case.dense(), case.tokens)
    sliced = case.apply(case.narrowed(16))
    assert sliced.facts == {
        "width": 16,
        "dense_width": 32,
        "stream_energy_kept": pytest.approx(1, abs=1e-6),
        "head_untied": False,
    }
    found = logits(case.load(sliced), case.tokens)
    torch.testing.assert_close(found, dense, rtol=0, atol=2e-4)


def test_the_error_falls_as_the_width_grows(make_case, random_rotation):
    decay = 0.75 ** torch.arange(WIDTH, dtype=torch.float64)
    basis = random_rotation(5)
    case = make_case("qwen2", mixed(basis @ torch.diag(decay) @ basis.T))
    dense = logits(case.dense(), case.tokens)
    errors, kept = [], []
    for k in (8, 16, 24, 32):
        sliced = case.apply(case.narrowed(k))
        kept.append(sliced.facts["stream_energy_kept"])
        errors.append(float((logits(case.load(sliced), case.tokens) - dense).norm()))
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 10 * errors[2] > 10 * errors[3]
    assert kept == sorted(kept)


def test_every_token_counts_alike_at_every_norm(make_case):
    case = make_case("llama-tied")
    moment = stream_moment(case.context, find_family(case.architecture.model))
    model = case.dense().double()
    seen = []
    for norm in find_family(model).norms(model):
        model.get_submodule(norm.name).register_forward_pre_hook(
            lambda _, args: seen.append(args[0])
        )
    logits(model, case.tokens)
    assert len(seen) == 5
    x = torch.cat([x.reshape(-1, WIDTH) for x in seen])
    x = x / x.norm(dim=-1, keepdim=True) * WIDTH**0.5
    torch.testing.assert_close(moment, x.T @ x, rtol=1e-4, atol=1e-3)
    assert float(moment.trace()) == pytest.approx(5 * case.tokens.numel() * WIDTH, rel=1e-5)
    assert case.steps == [("slice", 1, 2), ("slice", 2, 2)]


def test_only_one_layer_is_resident_while_text_is_read(make_case):
    case = make_case("llama")
    residents: list[int] = []
    for layer in case.architecture.layers:
        layer.register_forward_pre_hook(
            lambda *_: residents.append(
                sum(not p.is_meta for one in case.architecture.layers for p in one.parameters())
            )
        )
    case.apply(case.narrowed(16))
    per_layer = len(list(case.architecture.layers[0].parameters()))
    assert max(residents) == per_layer
    assert all(p.is_meta for p in case.architecture.model.parameters())


def test_applying_a_slice_can_be_stopped_and_removes_its_states(make_case):
    case = make_case("llama")

    def stop(*_: object) -> None:
        raise Stopped("asked to")

    config, context = case.narrowed(16), case.context
    expected = dict(case.apply(config).tensors)
    context.journal.work.mkdir(parents=True)
    case.context = replace(context, on_step=stop, memory_limit_gib=1e-9)  # on disk
    with pytest.raises(Stopped):
        case.apply(config)
    assert [path.name for path in context.journal.work.iterdir()] == ["states.live"]
    case.context = replace(case.context, on_step=context.on_step)
    again = dict(case.apply(config).tensors)
    assert all(torch.equal(again[name], tensor) for name, tensor in expected.items())
    assert not list(context.journal.work.iterdir())


def test_slicing_is_deterministic(make_case):
    case = make_case("qwen2")
    first, second = (dict(case.apply(case.narrowed(16)).tensors) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_stream_that_is_not_finite_is_refused(make_case):
    def overflow(model: Any) -> None:
        model.model.layers[1].mlp.down_proj.weight.fill_(3e38)

    case = make_case("llama", overflow)
    with pytest.raises(ModelError, match=r"not finite .* in model\.layers\.1"):
        case.apply(case.narrowed(16))


def test_the_config_states_what_was_derived_from_the_width(make_case):
    case = make_case("qwen2")  # whose own config knows no head_dim
    config = case.plan(int(0.8 * case.dense_bytes))
    assert (config.head_dim, config.tie_word_embeddings) == (8, False)
    assert config.rms_norm_eps == case.architecture.model.config.rms_norm_eps
    assert case.architecture.model.config.hidden_size == WIDTH
    assert not hasattr(case.architecture.model.config, "head_dim")


def test_widths_of_llama_are_multiples_of_its_heads_too(make_case, tmp_path, tokens, make_model):
    from transformers import LlamaConfig

    config = LlamaConfig(
        vocab_size=64,
        hidden_size=72,
        intermediate_size=40,
        num_hidden_layers=1,
        num_attention_heads=6,
        pad_token_id=None,
    )
    case = Case(make_model(config), tmp_path, tokens)
    assert case.plan(int(0.9 * case.dense_bytes)).hidden_size == 48
    narrow = case.plan(
        int(0.9 * case.dense_bytes), OPTIONS.model_copy(update={"width_multiple": 1})
    )
    assert narrow.hidden_size % 6 == 0
    assert narrow.hidden_size > 48
    case.load(case.apply(narrow))


def test_all_of_an_untied_model_may_be_kept_whatever_its_width(make_case):
    case = make_case("qwen2")
    options = OPTIONS.model_copy(update={"width_multiple": 24})
    assert case.plan(case.dense_bytes, options).hidden_size == WIDTH
    assert case.plan(case.dense_bytes - 1, options).hidden_size == 24


def test_a_budget_below_the_smallest_width_is_refused(make_case):
    case = make_case("llama")
    with pytest.raises(RecipeError) as refused:
        case.plan(1000)
    (problem,) = map(str, refused.value.problems)
    assert problem.startswith(f"{WHERE}: must be at least ")
    assert "smallest width of 8 (a multiple of 8), got 0.976 KiB" in problem
    assert f"the dense model has {least_text(case.dense_bytes, 'KiB')}" in problem


def test_a_tied_model_that_would_only_grow_is_refused(make_case):
    case = make_case("llama-tied")
    head = 64 * WIDTH * 4
    with pytest.raises(RecipeError) as refused:
        case.plan(2 * case.dense_bytes)
    (problem,) = map(str, refused.value.problems)
    assert problem.startswith(f"{WHERE}: the model would only grow")
    assert f"the dense model has {least_text(case.dense_bytes, 'KiB')}" in problem
    untied = least_text(case.dense_bytes + head, "KiB")
    assert f"{untied} at 32 of 32" in problem
    with pytest.raises(RecipeError, match=f"with an untied head {untied} at the full width of 32"):
        case.plan(1000)
    assert case.plan(case.dense_bytes).hidden_size < WIDTH


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("opt", "LayerNorm would subtract the mean"),
        ("phi", "LayerNorm would subtract the mean"),
        ("gemma", "compute with the width"),
    ],
)
def test_families_without_a_plain_smaller_model_are_refused(make_case, name, reason):
    case = make_case(name)
    with pytest.raises(RecipeError, match=reason) as refused:
        case.plan(case.dense_bytes)
    assert str(refused.value.problems[0]).startswith(
        "stages[0].slice.method: 'slicegpt' produces plain"
    )
