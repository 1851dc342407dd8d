"""Models with fast paths: generation, compilation, training, copies and saving."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from lrc.compressors.checkpoint import quantizer
from lrc.compressors.io.freed_memory import ReplacedTensors
from lrc.compressors.io.machine import Machine
from lrc.compressors.kernels import optimize, slow_layers
from lrc.compressors.layers import CompressedLinear
from lrc.compressors.layers.packed_weight import PackedWeight
from lrc.compressors.pipeline import compress
from lrc.configs.load import load_recipe

pytestmark = pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"),
    reason="the kernels for CPUs are those of x86",
)
QUANTIZE = {"method": "rtn", "bits": 4, "group_size": 32, "embeddings": "int8"}
STAGES: dict[str, list[dict[str, Any]]] = {
    "integers": [{"quantize": QUANTIZE}],
    "factors": [
        {"decompose": {"method": "svd-llm", "keep": 0.8}},
        {"quantize": {"method": "rtn", "bits": 8}},
    ],
}


@pytest.fixture(scope="module")
def runs(
    tiny_llama: Callable[..., LlamaForCausalLM],
    make_tokenizer: Callable[..., Any],
    tiny_recipe: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[str], Path]:
    """Run a recipe once, and return its checkpoint."""
    base = tmp_path_factory.mktemp("fast")
    dense = tiny_llama(tie_word_embeddings=True, hidden_size=64, intermediate_size=96)
    dense.save_pretrained(base / "model")
    make_tokenizer().save_pretrained(base / "model")

    def run(name: str) -> Path:
        if not (base / name).exists():
            path = tiny_recipe(base / "model", base / name, stages=STAGES[name])
            compress(load_recipe(path), Machine("cpu"))
        return base / name / "checkpoint"

    return run


def load(folder: Path, dtype: torch.dtype) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def packed(model: Any) -> list[PackedWeight]:
    return [m for m in model.modules() if isinstance(m, PackedWeight) and m.packed_args]


@torch.no_grad()
def logits_of(model: Any, tokens: Tensor) -> Tensor:
    logits: Tensor = model(tokens).logits
    return logits.float()


TOKENS = torch.arange(2, 42).view(2, 20)
both = pytest.mark.parametrize("name", STAGES)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


@both
@dtypes
def test_loading_selects_fast_paths_and_saving_writes_the_stored_tensors(
    runs, name: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    model = load(runs(name), dtype)
    assert packed(model)
    assert all(module.entry is not None for module in packed(model))
    assert slow_layers(model) == {}
    model.save_pretrained(tmp_path)
    before, after = (load_file(f / "model.safetensors") for f in (runs(name), tmp_path))
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        if not tensor.is_floating_point():
            assert torch.equal(tensor, after[key])


def test_loading_gives_back_what_was_replaced(runs, monkeypatch: pytest.MonkeyPatch) -> None:
    replaced: list[Tensor] = []

    class Recorder(ReplacedTensors):
        def __call__(self, tensors: Any) -> None:
            replaced.extend(tensors)

    monkeypatch.setattr(quantizer, "ReplacedTensors", Recorder)
    model = load(runs("integers"), torch.float32)
    converted = [each for each in packed(model) if each._copy is not None]
    assert len(replaced) == len(converted) > 0
    assert {tensor.dtype for tensor in replaced} == {torch.int32}


@both
@dtypes
def test_logits_differ_by_rounding(runs, name: str, dtype: torch.dtype) -> None:
    model = load(runs(name), dtype)
    fast = logits_of(model, TOKENS)
    for module in packed(model):
        module.restore()
    plain = logits_of(model, TOKENS)
    exact = logits_of(copy.deepcopy(model).double(), TOKENS)
    allowed = 2 * max((plain - exact).abs().max(), torch.finfo(dtype).eps * exact.abs().max())
    assert (fast - exact).abs().max() <= allowed
    assert optimize(model) == {}
    assert torch.equal(logits_of(model, TOKENS), fast)


@both
@dtypes
def test_generation_with_a_static_cache_gives_the_same_tokens(runs, name, dtype) -> None:
    model = load(runs(name), dtype)
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = model.generate(TOKENS, **options)
    static = model.generate(TOKENS, cache_implementation="static", disable_compile=True, **options)
    assert torch.equal(static, expected)


# Products of every kind and dtype are compiled in the tests of the kernels.
@pytest.mark.parametrize(
    ("name", "dtype"),
    [("integers", torch.float32), ("factors", torch.bfloat16)],
    ids=str,
)
def test_the_compiled_model_is_one_graph(runs, name: str, dtype: torch.dtype) -> None:
    torch.compiler.reset()
    model = load(runs(name), dtype)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for tokens in (TOKENS, TOKENS[:1, :1]):
        found, expected = logits_of(compiled, tokens), logits_of(model, tokens)
        tolerance = torch.finfo(dtype).eps * float(expected.abs().max())
        torch.testing.assert_close(found, expected, rtol=0, atol=8 * tolerance)
    torch.compiler.reset()


@both
def test_training_reaches_the_scales_and_inference_uses_them(runs, name: str) -> None:
    model = load(runs(name), torch.float32)
    before = logits_of(model, TOKENS)
    model(TOKENS, labels=TOKENS).loss.backward()
    scales = [module.get_parameter("weight_scale") for module in packed(model)]
    assert all(scale.grad is not None and scale.grad.any() for scale in scales)
    torch.optim.SGD(scales, lr=0.1).step()
    after = logits_of(model, TOKENS)
    assert (after - before).abs().max() > 1e-3
    for module in packed(model):
        module.restore()
    torch.testing.assert_close(logits_of(model, TOKENS), after, rtol=1e-3, atol=1e-3)


@both
@dtypes
def test_copies_and_dequantized_models_compute_the_same(runs, name: str, dtype) -> None:
    model = load(runs(name), dtype)
    expected = logits_of(model, TOKENS)
    copied = copy.deepcopy(model)
    assert all(module.entry is not None for module in packed(copied))
    assert torch.equal(logits_of(copied, TOKENS), expected)
    copied.dequantize()
    assert not any(isinstance(module, CompressedLinear) for module in copied.modules())
    tolerance = torch.finfo(dtype).eps * float(expected.abs().max())
    dense = logits_of(copied, TOKENS)
    torch.testing.assert_close(dense, expected, rtol=0, atol=64 * tolerance)
