"""Baselines: the compressed weights, and the bytes of a file that would hold them."""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from lrc.compressors.evaluate import baselines
from lrc.compressors.evaluate.baselines import (
    Baseline,
    Targets,
    measure,
    plan_baseline,
    record,
)
from lrc.compressors.layers import QuantizationArgs
from lrc.compressors.layers.compressed_linear import sentinel
from lrc.compressors.layers.sparse import Sparse
from lrc.compressors.solvers.quantization_grid import ScaleOverflow
from lrc.compressors.solvers.quantized_matrix import round_to_nearest
from lrc.configs.errors import DataError, Stopped
from lrc.configs.recipe import Evaluate, Perplexity

WRITTEN = ["int8", "int4-g16", "int4-g32-asymmetric", "int3", "int5-g16-asymmetric", "sparse"]


@pytest.fixture
def model(tiny_llama: Callable[..., Any]) -> Any:
    return tiny_llama(tie_word_embeddings=True).to(torch.bfloat16)


@pytest.fixture
def targets(model: Any) -> Targets:
    """All linears of the layers but the key projections, compressed to 0.6."""
    shapes = {
        name: tuple(module.weight.shape)
        for name, module in model.model.layers.named_modules(prefix="model.layers")
        if isinstance(module, torch.nn.Linear) and not name.endswith("k_proj")
    }
    dense = sum(2 * parameter.numel() for parameter in model.parameters())
    source = sum(2 * m * n for m, n in shapes.values())
    return Targets(shapes, torch.bfloat16, dense, dense - int(0.4 * source))


def make(baseline: Baseline, model: Any) -> dict[str, Tensor]:
    """Return the weights that a baseline changes a model to."""
    baseline.apply_(model, lambda done, total: None)
    return dict(model.state_dict())


def tensors_of(baseline: Baseline, dense: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a file that contains the baseline."""
    tensors = {name: weight for name, weight in dense.items() if name != "lm_head.weight"}
    for name, storage in baseline.stored.items():
        weight = tensors.pop(f"{name}.weight")
        if isinstance(storage, QuantizationArgs):
            stored = round_to_nearest(weight, storage, dtype=torch.bfloat16).encode("weight")
        else:
            largest = weight.float().abs().sort(dim=1, descending=True).values
            least = largest[:, storage - 1 : storage]
            stored = Sparse.encode(weight, weight.float().abs() >= least) | {"weight": sentinel()}
        tensors |= {f"{name}.{leaf}": tensor for leaf, tensor in stored.items()}
    return tensors


@pytest.mark.parametrize("written", WRITTEN)
def test_the_bytes_are_those_of_a_file(
    model: Any, targets: Targets, tmp_path: Path, written: str
) -> None:
    torch.manual_seed(0)
    for name in targets.shapes:  # no two entries of a row are as large in magnitude
        weight = model.get_submodule(name).weight
        steps = torch.stack([torch.randperm(weight.shape[1]) for _ in weight])
        weight.data.copy_((steps + 1) / 64)
    baseline = plan_baseline(written, targets)
    save_file(tensors_of(baseline, model.state_dict()), tmp_path / "model.safetensors")
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        stored = {name: file.get_tensor(name) for name in file.keys()}
    assert baseline.bytes == sum(t.numel() * t.element_size() for t in stored.values())
    own = sum(
        t.numel() * t.element_size()
        for n, t in stored.items()
        if n.rpartition(".")[0] in targets.shapes
    )
    assert baseline.bits == 8 * own
    assert baseline.kept == baseline.bits / targets.dense_bits


@pytest.mark.parametrize("written", WRITTEN)
def test_only_the_targets_change_and_to_the_weights_of_the_file(
    model: Any, targets: Targets, written: str
) -> None:
    model = model.float()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    baseline = plan_baseline(written, targets)
    after = make(baseline, model)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"{name}.weight" for name in targets.shapes}
    for name, storage in baseline.stored.items():
        W, W_hat = before[f"{name}.weight"], after[f"{name}.weight"]
        if isinstance(storage, QuantizationArgs):
            assert torch.equal(
                W_hat, round_to_nearest(W, storage, dtype=torch.bfloat16).weight().float()
            )
            continue
        kept = W_hat != 0
        assert torch.equal(W_hat[kept], W[kept])
        assert (kept.sum(dim=1) == storage).all()
        assert (W.abs().where(kept, torch.inf).amin(1) >= W_hat.sub(W).abs().amax(1)).all()


def test_rows_that_groups_do_not_divide_have_one_scale(targets: Targets) -> None:
    baseline = plan_baseline("int4-g32-asymmetric", targets)
    for name, (_, d_in) in targets.shapes.items():
        group = None if d_in % 32 else 32
        assert baseline.stored[name] == QuantizationArgs(4, group, symmetric=False)
    assert "one scale a row in 2 of 12 matrices, whose rows of 48 numbers" in baseline.how
    assert "one scale a row" not in plan_baseline("int4-g16", targets).how


def test_sparse_takes_the_bytes_of_the_result_and_no_more(targets: Targets) -> None:
    baseline = plan_baseline("sparse", targets)
    one_more = sum(16 * m for m, _ in targets.shapes.values())
    assert targets.budget_bits - one_more < baseline.bits <= targets.budget_bits
    shares = [entries / targets.shapes[name][1] for name, entries in baseline.stored.items()]
    assert max(shares) - min(shares) < 1 / 32
    assert f"the largest {100 * shares[0]:.0f}" in baseline.how.replace(".", " ")


def test_sparse_keeps_an_entry_where_the_mask_alone_is_too_large(targets: Targets) -> None:
    tiny = replace(targets, compressed_bytes=targets.dense_bytes - targets.dense_bits // 8)
    baseline = plan_baseline("sparse", tiny)
    assert {*baseline.stored.values()} == {1}
    assert baseline.bytes > tiny.compressed_bytes


def test_applying_can_be_stopped_between_matrices(model: Any, targets: Targets) -> None:
    heard = []

    def stop(done: int, total: int) -> None:
        heard.append((done, total))
        if done == 2:
            raise Stopped("requested")

    with pytest.raises(Stopped):
        plan_baseline("int8", targets).apply_(model, stop)
    assert heard == [(1, 12), (2, 12)]


@pytest.fixture
def evaluate(tiny_text: Path) -> Evaluate:
    return Evaluate(perplexity=[Perplexity(source=str(tiny_text), name="it", window=32, windows=2)])


def test_a_record_requires_the_texts_of_the_result(
    model: Any, targets: Targets, tiny_tokenizer: Any, evaluate: Evaluate
) -> None:
    baseline = plan_baseline("int8", targets)
    scores = measure(baseline, model, tiny_tokenizer, evaluate, lambda *_: None)
    entry = scores["it"]
    assert entry is not None
    written = record(baseline, scores, {"it": entry})
    assert written["perplexity"] == {"it": entry["perplexity"]}
    assert (written["name"], written["bytes"]) == ("int8", baseline.bytes)
    with pytest.raises(DataError, match="int8 and compressed were scored on different data"):
        record(baseline, scores, {"it": entry | {"text_sha256": "other"}})


def test_a_baseline_that_overflows_does_not_fail_the_run(
    model: Any,
    targets: Targets,
    tiny_tokenizer: Any,
    evaluate: Evaluate,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    baseline = plan_baseline("int8", targets)
    model.model.norm.weight.data.fill_(torch.inf)
    broken = measure(baseline, model, tiny_tokenizer, evaluate, lambda *_: None)
    assert broken == {"it": None}
    assert record(baseline, broken, {"it": {}})["perplexity"] == {"it": None}

    def overflow(*_: object, **__: object) -> None:
        raise ScaleOverflow("scales up to 1e5 overflow float16")

    monkeypatch.setattr(baselines, "round_to_nearest", overflow)
    assert measure(baseline, model, tiny_tokenizer, evaluate, lambda *_: None) == {"it": None}

    def fail(*_: object, **__: object) -> None:
        raise ValueError("a mistake of ours")

    monkeypatch.setattr(baselines, "round_to_nearest", fail)
    with pytest.raises(ValueError, match="of ours"):  # and not "no finite perplexity"
        measure(baseline, model, tiny_tokenizer, evaluate, lambda *_: None)


@pytest.mark.parametrize("written", WRITTEN)
def test_large_matrices_are_compressed_some_rows_at_a_time(
    model: Any, targets: Targets, monkeypatch: pytest.MonkeyPatch, written: str
) -> None:
    baseline, other = plan_baseline(written, targets), deepcopy(model)
    at_once = make(baseline, model)
    most, compressed = [0], baselines._compressed

    def watched(name: str, rows: Tensor, *arguments: Any) -> Tensor:
        most.append(rows.numel())
        return compressed(name, rows, *arguments)

    monkeypatch.setattr(baselines, "_compressed", watched)
    monkeypatch.setattr(baselines, "NUMBERS", 100)  # a few rows
    for name, weight in make(baseline, other).items():
        assert torch.equal(weight, at_once[name]), name
    assert max(most) <= 100
