"""A source model that cannot be compressed: one clear error each, and no checkpoint."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from lrc.compressors.models import tokenizer_files


@pytest.fixture
def model(tiny_model_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model_folder, tmp_path / "model"))


def set_config(**changes: Any) -> Callable[[Path], None]:
    def change(model: Path) -> None:
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps(config | changes))

    return change


def write_config(content: str) -> Callable[[Path], object]:
    return lambda model: (model / "config.json").write_text(content)


def change_weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def rewrite(model: Path) -> None:
        tensors = load_file(model / "model.safetensors")
        change(tensors)
        save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})

    return rewrite


def remove(pattern: str) -> Callable[[Path], object]:
    return lambda model: [file.unlink() for file in model.glob(pattern)]


def cut(length: int) -> Callable[[Path], object]:
    return lambda model: os.truncate(model / "model.safetensors", length)


def pickle_weights(model: Path) -> None:
    torch.save(load_file(model / "model.safetensors"), model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()


def lose_a_shard(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    (model / "model.safetensors").rename(model / "model-00001-of-00002.safetensors")
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    weight_map = {name: names[index % 2] for index, name in enumerate(tensors)}
    index = model / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def break_the_index(model: Path) -> None:
    lose_a_shard(model)
    (model / "model.safetensors.index.json").write_text('{"weight_map"')


SUPPORTED = "supported are decoder-only models whose layers hold torch.nn.Linear (tested: Llama"
REFUSED: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "no config": (remove("config.json"), ("has no config.json", "save_pretrained")),
    "config not JSON": (write_config("{"), ("config.json could not be read as JSON", "again")),
    "config empty": (write_config(""), ("config.json could not be read as JSON",)),
    "config a list": (write_config("[1]"), ("config.json must hold a JSON object, got list",)),
    "config damaged": (set_config(hidden_size="wide"), ("config.json could not be read",)),
    "no weights": (remove("*.safetensors"), ("holds no weights (*.safetensors)",)),
    "pickled": (
        pickle_weights,
        ("pytorch_model.bin is not safetensors", "save_pretrained(FOLDER)"),
    ),
    "no tokenizer": (remove("token*"), ("no tokenizer could be loaded", "model.tokenizer")),
    "truncated": (cut(50_000), ("model.safetensors: not a whole safetensors file", "again")),
    "cut in its header": (cut(1_000), ("model.safetensors: not a whole safetensors file",)),
    "empty": (cut(0), ("model.safetensors: not a whole safetensors file",)),
    "a shard missing": (lose_a_shard, ("model-00002-of-00002.safetensors: missing",)),
    "index damaged": (break_the_index, ("index.json: not an index of shards", "again")),
    "a tensor missing": (
        change_weights(lambda tensors: tensors.pop("model.norm.weight")),
        ("do not fit config.json: model.norm.weight is missing",),
    ),
    "another size": (
        set_config(intermediate_size=40),
        ("model.layers.0.mlp.gate_proj.weight is [48, 32], not [40, 32]", "(and 1 more)"),
    ),
    "quantized": (
        set_config(quantization_config={"quant_method": "gptq", "bits": 4}),
        ("is already compressed (quant_method 'gptq')", "give the original model"),
    ),
    "remote code": (
        set_config(model_type="mine", auto_map={"AutoConfig": "mine.Config"}),
        ("comes with Python code", "set model.trust_remote_code: true"),
    ),
    "unknown type": (
        set_config(model_type="zebra"),
        ("names the model_type 'zebra', which transformers", SUPPORTED),
    ),
    "Conv1D": (
        set_config(model_type="gpt2", architectures=["GPT2LMHeadModel"], n_layer=1),
        ("GPT2LMHeadModel (model_type 'gpt2')", "attn.c_attn is a Conv1D", SUPPORTED),
    ),
    "fused experts": (
        set_config(
            model_type="jetmoe",
            architectures=["JetMoeForCausalLM"],
            kv_channels=8,
            num_local_experts=4,
        ),
        ("JetMoeForCausalLM", "input_linear.weight holds fused experts", SUPPORTED),
    ),
    "other experts": (
        set_config(model_type="qwen3_moe", architectures=["Qwen3MoeForCausalLM"], num_experts=4),
        ("mlp.experts.0.gate_up_proj.weight is missing", "load and save it once"),
    ),
    "encoder and decoder": (
        set_config(model_type="t5", is_encoder_decoder=True, architectures=["T5Model"]),
        ("T5Model", "it is an encoder-decoder model", SUPPORTED),
    ),
    "masked": (
        set_config(model_type="bert", architectures=["BertForMaskedLM"]),
        ("BertForMaskedLM", "predicts masked tokens", SUPPORTED),
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_unusable_models_are_refused_before_anything_is_written(
    lrc, model: Path, output: Path, tiny_recipe: Callable[..., Path], case: str
) -> None:
    spoil, words = REFUSED[case]
    spoil(model)
    lrc("compress", tiny_recipe(model, output)).refuses(1, *words, code="invalid-model")
    assert not output.exists()
    lrc("plan", tiny_recipe(model, output)).refuses(1, *words, code="invalid-model")


def test_a_tokenizer_of_packages_that_are_not_installed_names_them(
    lrc, model: Path, output: Path, tiny_recipe: Callable[..., Path], monkeypatch
) -> None:
    (model / "tokenizer.json").unlink()
    (model / "tokenizer.model").write_bytes(b"a sentencepiece model")
    (model / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    monkeypatch.setattr(tokenizer_files, "is_sentencepiece_available", lambda: False)
    monkeypatch.setattr(tokenizer_files, "is_protobuf_available", lambda: False)
    words = ("no tokenizer", "pip install sentencepiece protobuf")
    lrc("plan", tiny_recipe(model, output)).refuses(1, *words, code="invalid-model")
    lrc("eval", model, "--perplexity", "python-docs").refuses(1, *words)


def test_a_checkpoint_of_lrc_is_not_compressed_again(
    lrc, model: Path, output: Path, tiny_recipe: Callable[..., Path]
) -> None:
    assert lrc("compress", tiny_recipe(model, output), "-q").code == 0
    again = tiny_recipe(output / "checkpoint", output.with_name("again"))
    lrc("compress", again).refuses(
        1, "is already compressed (quant_method 'lrc')", code="invalid-model"
    )


NOT_FINITE: dict[str, tuple[str, float, tuple[str, ...]]] = {
    "nan": ("model.layers.1.mlp.up_proj", float("nan"), ("holds NaN or Inf", "model.dtype")),
    "inf": ("model.layers.0.self_attn.o_proj", float("inf"), ("holds NaN or Inf",)),
    "inf outside the layers": ("lm_head", float("inf"), ("holds NaN or Inf",)),
    # The weights are finite, the activations are not.
    "overflow": ("model.layers.0.mlp.up_proj", 3e38, ("not finite on the calibration text",)),
}


@pytest.mark.parametrize("case", NOT_FINITE)
def test_numbers_that_are_not_finite_name_the_layer(
    lrc, model: Path, output: Path, tiny_recipe: Callable[..., Path], case: str
) -> None:
    name, value, words = NOT_FINITE[case]
    change_weights(lambda tensors: tensors[f"{name}.weight"].fill_(value))(model)
    lrc("compress", tiny_recipe(model, output), "-q").refuses(
        1, name.rpartition(".")[0], *words, code="invalid-model"
    )
    assert not (output / "checkpoint").exists()
    assert not list(output.rglob("*.partial"))


def test_gradients_that_are_not_finite_name_the_layer(
    lrc, model: Path, output: Path, tiny_recipe: Callable[..., Path]
) -> None:
    """Every weight and every hidden state is finite, the loss is not."""
    change_weights(lambda tensors: tensors["lm_head.weight"].fill_(3e38))(model)
    stages = [{"decompose": {"method": "kfac", "keep": 0.6}}]
    words = ("not finite", "the gradients in model.layers.1", "such as svd-llm")
    lrc("compress", tiny_recipe(model, output, stages=stages), "-q").refuses(
        1, *words, code="invalid-model"
    )
    assert not (output / "checkpoint").exists()
    assert not list(output.rglob("*.partial"))


UP, DOWN = "model.layers.1.mlp.up_proj", "model.layers.0.mlp.down_proj"


def repeat_rows(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{UP}.weight"][2:] = tensors[f"{UP}.weight"][:2].repeat(23, 1)  # rank 2


def kill_a_matrix(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{DOWN}.weight"].zero_()


def kill_channels(tensors: dict[str, torch.Tensor]) -> None:
    """Zero some outputs and inputs of matrices, and one channel of all hidden states."""
    tensors[f"{UP}.weight"][:5] = 0
    tensors["model.layers.0.self_attn.q_proj.weight"][:, 3:6] = 0
    tensors["model.embed_tokens.weight"][:, 4] = 0
    for name, tensor in tensors.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            tensor[4] = 0


DEGENERATE: dict[str, tuple[Callable[[dict[str, torch.Tensor]], object], set[str]]] = {
    "a lower rank than requested": (repeat_rows, {UP}),
    "a matrix of zeros": (kill_a_matrix, {DOWN}),
    "dead channels": (kill_channels, set()),
}
METHODS = {
    "kfac": {"compensate": {}},
    "svd-llm": {"storage": "pivoted_low_rank"},
    "lord": {},
    "svd": {"allocation": "heavy-tail"},
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("case", DEGENERATE)
def test_degenerate_weights_are_compressed_nevertheless(
    lrc, model: Path, output: Path, tiny_recipe: Callable[..., Path], tiny_text: Path, case, method
) -> None:
    spoil, lowered = DEGENERATE[case]
    change_weights(spoil)(model)
    stages = [{"decompose": {"method": method, "keep": 0.6, **METHODS[method]}}]
    perplexity = [{"source": str(tiny_text), "name": "it", "window": 32}]
    evaluate = {"perplexity": perplexity, "baselines": []}
    recipe = tiny_recipe(model, output, stages=stages, evaluate=evaluate)
    ended = lrc("compress", recipe, "-q", "--json", "evaluate.perplexity.0.windows=2")
    assert ended.code == 0, ended.err
    report = json.loads(ended.out)
    assert report["size"]["targeted"]["kept"] <= 0.6
    assert np.isfinite(report["evaluation"]["perplexity"]["it"]["compressed"])
    records = {layer["name"]: layer for layer in report["layers"]}
    for name in lowered:
        if method in ("svd-llm", "lord"):  # the others choose possible ranks, or dense
            assert "the numerical rank of the weight" in records[name]["fallback"]
    nats = [layer["predicted_nats"] for layer in report["layers"]]
    assert all(n is None or np.isfinite(n) for n in nats)


def test_a_single_file_must_be_gguf(
    lrc, model: Path, output: Path, tiny_recipe: Callable[..., Path]
) -> None:
    weights = model / "model.safetensors"
    lrc("compress", tiny_recipe(weights, output)).refuses(
        1, "only .gguf files", "config.json", code="invalid-model"
    )
    pickle_weights(model)
    pickled = model / "pytorch_model.bin"
    lrc("compress", tiny_recipe(pickled, output)).refuses(
        1, "is not safetensors", "never read", code="invalid-model"
    )
    missing = tiny_recipe("nowhere.gguf", output)
    lrc("compress", missing).refuses(2, "no file or folder 'nowhere.gguf'", code="invalid-recipe")
    typed = tiny_recipe(model.parent / "modle", output)
    lrc("compress", typed).refuses(2, f"did you mean {model}?", code="invalid-recipe")
    lrc("eval", model.parent / "modle", "--perplexity", "python-docs").refuses(
        2, f"did you mean {model}?", code="usage"
    )
    assert not output.exists()


def write_gguf(path: Path) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in {"block_count": 1, "context_length": 64, "embedding_length": 32}.items():
        writer.add_uint32(f"llama.{key}", value)
    writer.add_tensor("token_embd.weight", np.zeros((512, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("length", [0, 20, 150, 30_000])
def test_a_truncated_gguf(lrc, output: Path, tiny_recipe: Callable[..., Path], length: int) -> None:
    path = output.with_name("model.gguf")
    write_gguf(path)
    assert path.stat().st_size > 60_000
    os.truncate(path, length)
    lrc("compress", tiny_recipe(path, output)).refuses(
        1, str(path), "could not be read", "truncated", code="invalid-model"
    )
    path.write_bytes(b"no GGUF at all" * 100)
    lrc("compress", tiny_recipe(path, output)).refuses(
        1, "could not be read", "GGUF", code="invalid-model"
    )
    assert not output.exists()
