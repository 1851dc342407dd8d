"""One basis per block: exact at full width, otherwise equal to the rotated model."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import init_empty_weights
from paper_size import count_sliced
from rotated_model import fuse_norms_, rotate_blocks_
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from lrc.compressors.calibrate.calibration_context import CalibrationContext
from lrc.compressors.io.journal import Journal
from lrc.compressors.models.architecture import Architecture, build
from lrc.compressors.models.source import locate
from lrc.compressors.models.weights import WeightReader
from lrc.compressors.slicing import slices as stages
from lrc.compressors.slicing.families import find_family
from lrc.compressors.slicing.rotated_weights import StreamParameters
from lrc.compressors.slicing.slice_method import Budget
from lrc.compressors.slicing.slicegpt import Slicegpt, untied_config
from lrc.compressors.slicing.stream_bases import ROTATIONS, project, projected_blocks
from lrc.configs.errors import RecipeError
from lrc.configs.recipe import Model
from lrc.configs.slice import Slicegpt as Options

Exact = Callable[[Any], Any]
WIDTH = 32
OPTIONS = Options(method="slicegpt", keep=0.5, rotations="block")
CLOSE = {"rtol": 1e-9, "atol": 1e-9}


@torch.no_grad()
def logits(model: Any, tokens: Tensor) -> Tensor:
    found: Tensor = model(tokens, use_cache=False).logits
    return found


class Case:
    """A dense model in float64, saved, and its slices, saved and loaded."""

    def __init__(self, model: Any, folder: Path, tokens: Tensor, exact: Exact) -> None:
        self.model, self.folder, self.tokens, self.exact = model, folder, tokens, exact
        model.save_pretrained(folder / "dense")
        spec = Model(path=str(folder / "dense")).model_copy(update={"dtype": "float64"})
        self.source = locate(spec)
        self.architecture = build(self.source)
        self.family = find_family(self.architecture.model)
        self.context = CalibrationContext(
            self.architecture,
            WeightReader(folder / "dense", self.architecture),
            lambda: tokens,
            Journal(folder / "out"),
            "cpu",
            1.0,
            0,
            lambda *_: None,
        )
        self.roles = StreamParameters(self.architecture, self.family)
        self.dense_bytes = sum(
            p.numel() * p.itemsize for p in self.architecture.stored_parameters().values()
        )

    def sliced(self, width: int) -> Path:
        config = untied_config(self.architecture.model.config, self.roles.tables(width))
        out = self.folder / f"sliced-{width}"
        out.mkdir()
        stages.apply_slice(out, self.context, OPTIONS, config, self.source)
        return out

    def load(self, folder: Path) -> Any:
        model, report = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float64, output_loading_info=True
        )
        assert not any(report.values()), report
        return self.exact(model.eval())

    def plan(self, n_bytes: int) -> Any:
        budget = Budget("stages[0].slice.keep", n_bytes, self.dense_bytes)
        return Slicegpt().plan(self.architecture, OPTIONS, budget)


@pytest.fixture
def case(model: Any, tmp_path: Path, tokens: Tensor, exact: Exact) -> Case:
    return Case(model, tmp_path, tokens, exact)


@pytest.fixture
def make_case(
    configs: dict[str, Callable[[], Any]],
    make_model: Callable[..., Any],
    tokens: Tensor,
    tmp_path: Path,
    exact: Exact,
) -> Callable[[str], Case]:
    return lambda name: Case(make_model(configs[name]()), tmp_path, tokens, exact)


def test_at_full_width_no_logit_changes(case: Case) -> None:
    model = case.load(case.sliced(WIDTH))
    torch.testing.assert_close(logits(model, case.tokens), logits(case.model, case.tokens), **CLOSE)


def test_a_slice_is_the_rotated_model_with_fewer_columns(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The oracle has the same bases and a full matrix on every residual branch."""
    bases: list[Tensor] = []
    write = case.context.journal.write_tensors

    def keep(name: str, tensors: dict[str, Tensor]) -> None:
        bases.append(tensors["Q"])
        write(name, tensors)

    monkeypatch.setattr(case.context.journal, "write_tensors", keep)
    for width in (24, 12):  # more than half of all dimensions, and less
        bases.clear()
        model = case.load(case.sliced(width))
        twin = case.load(case.folder / "dense")
        fuse_norms_(twin, case.family)
        rotate_blocks_(twin, case.family, bases)
        expected = logits(twin, case.tokens)
        torch.testing.assert_close(logits(model, case.tokens), expected, **CLOSE)
        shortcuts = [t for n, t in model.state_dict().items() if n.endswith("shortcut")]
        assert {list(each.shape)[1] for each in shortcuts} == {min(width, WIDTH - width)}
        assert max(float(each.abs().max()) for each in shortcuts) > 1e-2


def test_a_slice_is_the_dense_model_with_a_projected_stream(case: Case) -> None:
    """The bases are computed on that model."""
    found: list[Tensor] = []
    write = case.context.journal.write_tensors

    def keep(name: str, tensors: dict[str, Tensor]) -> None:
        found.append(tensors["Q"])
        write(name, tensors)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(case.context.journal, "write_tensors", keep)
        sliced = case.load(case.sliced(24))
    dense = case.load(case.folder / "dense")
    pairs = [*zip(case.family.stream(dense), found, strict=False)]
    dense.get_submodule(case.family.final_norm).register_forward_pre_hook(
        lambda _, args: (project(args[0], found[-1], case.family),)
    )
    with projected_blocks(dense, pairs, case.family):
        expected = logits(dense, case.tokens)
    # The bases come from moments in float32: they hold the mean to that, which LayerNorm takes off.
    close = {"rtol": 0, "atol": 1e-4} if case.family.layer_norm else CLOSE
    torch.testing.assert_close(logits(sliced, case.tokens), expected, **close)


def test_what_is_stored_is_what_was_counted(case: Case) -> None:
    for width in (WIDTH, 24, 12):
        stored = load_file(case.sliced(width) / "model.safetensors")
        counted = case.roles.bytes(width, per_block=True)
        assert sum(t.numel() * t.itemsize for t in stored.values()) == counted


def test_a_slice_generates_with_a_cache_and_is_saved_and_loaded(case: Case, tmp_path: Path) -> None:
    model = case.load(case.sliced(24))
    cached, plain = (
        model.generate(case.tokens[:1], max_new_tokens=6, do_sample=False, use_cache=use)
        for use in (True, False)
    )
    assert torch.equal(cached, plain)
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(
        logits(case.load(tmp_path / "again"), case.tokens), logits(model, case.tokens)
    )


def test_shortcuts_of_low_rank_are_a_fourth_of_the_papers() -> None:
    """Llama-2-7B at 3,272 of 4,096 dimensions: 82 % of the parameters for the paper's 91 %."""
    config = LlamaConfig(vocab_size=32000, hidden_size=4096, intermediate_size=11008)
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    architecture = Architecture(model, [], [], {})
    paper, roles = count_sliced(config, 0.2), StreamParameters(architecture, find_family(model))
    found = roles.bytes(paper.width, per_block=True) // 2
    assert paper.sliced / paper.dense == pytest.approx(0.906, abs=5e-4)
    assert found / paper.dense == pytest.approx(0.824, abs=5e-4)


def test_the_widest_slice_within_the_budget_is_planned(make_case: Callable[..., Case]) -> None:
    case = make_case("llama")
    for share in (0.5, 0.7, 0.9):
        config = case.plan(int(share * case.dense_bytes))
        k = config.quantization_config["shapes"]["lm_head"][1]
        sizes = {w: case.roles.bytes(w, per_block=True) for w in (*range(8, WIDTH, 8), WIDTH)}
        assert k == max(w for w, size in sizes.items() if size <= share * case.dense_bytes)


def test_a_model_that_would_grow_is_refused(make_case: Callable[..., Case]) -> None:
    case = make_case("llama-tied")
    with pytest.raises(RecipeError, match="with an untied head"):
        case.plan(case.dense_bytes // 5)


def test_nothing_is_left_in_the_journal(make_case: Callable[..., Case]) -> None:
    case = make_case("llama")
    case.sliced(16)
    assert not case.context.journal.has(ROTATIONS)
