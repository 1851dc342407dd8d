"""llama.cpp computes the logits of transformers from exported files."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader, LlamaFileType
from gguf.quants import dequantize
from tests.llama_library import LlamaCpp, why_missing
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from lrc.compressors.io.gguf_file import read_gguf

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(why_missing() is not None, reason=str(why_missing())),
]

TOKENS = torch.randint(2, 512, (60,), generator=torch.Generator().manual_seed(1)).tolist()
TEXT = "def f(x): return x + 12345  # don't\n\n\n    end\tnaïve café 你好"
WINDOW = {"query_pre_attn_scalar": 16, "sliding_window": 24}  # shorter than the text
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama-biases": {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "llama-frequencies": {"model_type": "llama", "rope_parameters": LLAMA3},
    "mistral": {"sliding_window": None, "head_dim": 32},
    "qwen2": {"vocab_size": 520},
    "qwen3": {"head_dim": 32, "tie_word_embeddings": True},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {
        "head_dim": 32,
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "norm_topk_prob": True,
    },
    "gemma3_text": {**WINDOW, "num_hidden_layers": 7},
    "gemma3-scaled": {
        **WINDOW,
        "model_type": "gemma3_text",
        "num_hidden_layers": 7,
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    },
    "gemma3-period": {
        **WINDOW,
        "model_type": "gemma3_text",
        "layer_types": ["sliding_attention", "full_attention"],
    },
}


@pytest.fixture(scope="session")
def llama() -> LlamaCpp:
    return LlamaCpp()


@torch.no_grad()
def reference(model: Any) -> np.ndarray:
    found: np.ndarray = model(torch.tensor([TOKENS])).logits[0].float().numpy()
    return found


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.corrcoef(a.ravel(), b.ravel())[0, 1])


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_tokens_of_every_family_are_those_of_transformers(
    family: str,
    llama: LlamaCpp,
    save_family: Callable[..., Any],
    lrc: Callable[..., Any],
    tmp_path: Path,
) -> None:
    expected = reference(
        save_family(tmp_path / "source", **{"model_type": family, **FAMILIES[family]})
    )
    out = tmp_path / "out.gguf"
    assert lrc("export", tmp_path / "source", out, "--format", "gguf").code == 0
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "source")
    with llama.open(out) as model:
        found, tokens = model.logits(TOKENS), model.tokenize(TEXT)
    # llama.cpp keeps keys and values in float16.
    assert np.abs(found - expected).max() < 0.05 * expected.std()
    assert (found.argmax(1) == expected.argmax(1)).mean() > 0.95
    assert tokens == tokenizer(TEXT)["input_ids"]


@pytest.mark.parametrize(
    ("name", "architecture"),
    [
        ("plain", "llama"),
        ("asymmetric", "llama"),
        ("mixed", "llama"),
        ("narrow-heads", "llama"),
        ("rotated", "llama"),
        ("uneven", "deci"),
        ("uneven-integers", "deci"),
    ],
)
def test_logits_of_checkpoints_are_those_of_transformers(
    name: str,
    architecture: str,
    llama: LlamaCpp,
    checkpoint: Callable[[str], Path],
    lrc: Callable[..., Any],
    tmp_path: Path,
) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoint(name), dtype=torch.float32)
    expected, out = reference(model.eval()), tmp_path / "out.gguf"
    assert lrc("export", checkpoint(name), out, "--format", "gguf").code == 0
    metadata, tensors = read_gguf(out)
    assert metadata["general.architecture"] == architecture
    assert ("rope_freqs.weight" in tensors) == (name == "narrow-heads")
    with llama.open(out) as opened:
        found = opened.logits(TOKENS)
    # llama.cpp rounds the inputs of quantized weights to int8.
    assert correlation(found, expected) > 0.999
    if architecture == "deci":
        assert len({*metadata["deci.feed_forward_length"]}) == 2


def test_super_blocks_are_planned_by_their_bits_in_gguf(
    llama: LlamaCpp,
    save_family: Callable[..., Any],
    tiny_recipe: Callable[..., Path],
    lrc: Callable[..., Any],
    tmp_path: Path,
) -> None:
    save_family(tmp_path / "source", intermediate_size=256)
    schemes = ["int6-g16-s256", "int4-g32", "int3-g16-s256"]
    options = {"method": "mixed", "measure": "gguf", "components": ["dense"], "schemes": schemes}
    recipe = tiny_recipe(
        tmp_path / "source",
        tmp_path / "run",
        stages=[{"decompose": {**options, "keep": 0.3, "embeddings": "int8-g32"}}],
    )
    assert "sizes above are those in a GGUF file" in lrc("plan", recipe).out
    assert lrc("compress", recipe).code == 0
    checkpoint, out = tmp_path / "run" / "checkpoint", tmp_path / "out.gguf"
    assert lrc("export", checkpoint, out, "--format", "gguf").code == 0
    tensors = [each for each in GGUFReader(out).tensors if len(each.shape) == 2]
    layers = [each for each in tensors if each.name.startswith("blk.")]
    kinds = {each.tensor_type.name for each in layers}
    assert kinds & {"Q3_K", "Q6_K"}
    assert kinds <= {"Q3_K", "Q4_0", "Q6_K", "BF16"}
    # Rows of 64 numbers have no super-blocks, so that their matrices take 4.5 or 16 bits.
    n_bytes, numbers = (
        sum(int(getattr(each, key)) for each in layers) for key in ("n_bytes", "n_elements")
    )
    assert 0.27 * 16 < 8 * n_bytes / numbers <= 0.3 * 16
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    with llama.open(out) as opened:
        found = opened.logits(TOKENS)
    assert correlation(found, reference(model.eval())) > 0.999


@pytest.mark.parametrize("prefix", ["never", "first"])
def test_pieces_are_split_as_in_tokenizers(
    prefix: str,
    llama: LlamaCpp,
    save_family: Callable[..., Any],
    lrc: Callable[..., Any],
    tmp_path: Path,
) -> None:
    bpe = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    space = {"replacement": "\u2581", "prepend_scheme": prefix, "split": False}
    bpe.pre_tokenizer = pre_tokenizers.Metaspace(**space | {"split": True})
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=512, special_tokens=tokens, show_progress=False)
    bpe.train_from_iterator(["the cat and the other cat return their return values"] * 9, trainer)
    bpe.pre_tokenizer = pre_tokenizers.Metaspace(**space)
    if prefix == "never":
        bpe.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
        bpe.normalizer = normalizers.Replace(" ", "\u2581")
    state = bpe.to_str()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(state), bos_token="<s>", unk_token="<unk>"
    )
    save_family(tmp_path / "source")
    fast.save_pretrained(tmp_path / "pieces")
    out = tmp_path / "out.gguf"
    options = ("--format", "gguf", "--tokenizer", tmp_path / "pieces")
    ended = lrc("export", tmp_path / "source", out, *options)
    assert ended.code == 0, ended.err
    text = "the other cat returns 你 values and  their"
    with llama.open(out) as model:
        assert model.tokenize(text) == fast(text)["input_ids"]


def test_the_quantizer_of_llama_cpp_and_its_importance_matrix(
    llama: LlamaCpp, source: Path, lrc: Callable[..., Any], tmp_path: Path
) -> None:
    """Its files are baselines of benchmarks; without the matrix they are those of lrc."""
    for name in ("f32", "q4_0"):
        out = tmp_path / f"{name}.gguf"
        assert lrc("export", source, out, "--format", "gguf", "--type", name).code == 0
    llama.quantize(tmp_path / "f32.gguf", tmp_path / "theirs.gguf", LlamaFileType.MOSTLY_Q4_0)
    name = "blk.0.ffn_up.weight"
    ours, theirs = (data(tmp_path / file, name) for file in ("q4_0.gguf", "theirs.gguf"))
    assert np.array_equal(ours, theirs)
    weights = np.logspace(-4, 4, 64)
    weighted = tmp_path / "weighted.gguf"
    llama.quantize(tmp_path / "f32.gguf", weighted, LlamaFileType.MOSTLY_Q4_0, {name: weights})
    dense = data(tmp_path / "f32.gguf", name)
    errors = [
        ((dequantize(found, GGMLQuantizationType.Q4_0) - dense) ** 2 * weights).sum()
        for found in (data(weighted, name), theirs)
    ]
    assert errors[0] < 0.9 * errors[1]


def data(path: Path, name: str) -> np.ndarray:
    """Return a tensor of a file as it is stored."""
    found: np.ndarray = next(each.data for each in GGUFReader(path).tensors if each.name == name)
    return found
