"""The model in the files is the one that is measured and compressed, or a word says what is not."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM

RTN = [{"quantize": {"method": "rtn", "bits": 8}}]
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


@pytest.fixture
def model(tiny_llama: Callable[..., LlamaForCausalLM], tiny_model_folder: Path, tmp_path: Path):
    """Return the folder of a tied model with its tokenizer."""
    folder = Path(shutil.copytree(tiny_model_folder, tmp_path / "model"))
    tiny_llama(tie_word_embeddings=True).save_pretrained(folder)
    return folder


@pytest.fixture
def options(tiny_text: Path) -> tuple[object, ...]:
    return ("--perplexity", tiny_text, "--window", 32, "--windows", 2)


def add(folder: Path, **tensors: torch.Tensor) -> None:
    stored = load_file(folder / "model.safetensors") | tensors
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})


def test_what_is_left_out_is_said_in_plan_compress_eval_and_report(
    lrc, model: Path, output: Path, tiny_recipe: Callable[..., Path], options
) -> None:
    add(model, **{"mtp.layers.0.eh_proj.weight": torch.ones(8)})
    words = ("(1, 32 bytes)", "mtp.layers.0.eh_proj.weight")
    recipe = tiny_recipe(model, output, stages=RTN)
    planned = lrc("plan", recipe)
    shown = " ".join(planned.out.split())
    assert planned.code == 0
    assert all(word in shown for word in ("warning", *words))
    (warning,) = json.loads(lrc("plan", recipe, "--json").out)["warnings"]

    done = lrc("compress", recipe, "--json")
    assert done.code == 0
    assert done.err.startswith(f"warning: {warning}\n")  # before any work
    assert json.loads(done.out)["warnings"] == [warning]
    assert all(word in warning for word in words)

    measured = lrc("eval", model, output / "checkpoint", *options, "--json")
    blocks = json.loads(measured.out)["checkpoints"]
    assert warning in f"model.path: {blocks[str(model)]['warnings'][0]}"
    assert blocks[str(output / "checkpoint")]["warnings"] == []
    assert measured.err.startswith(f"warning: {model}: ")


def test_an_own_head_beside_a_tied_config_is_in_the_dense_model_and_in_the_result(
    lrc, model: Path, output: Path, tiny_recipe: Callable[..., Path], tiny_text: Path
) -> None:
    own = torch.randn(512, 32, generator=torch.Generator().manual_seed(3)) / 4
    add(model, **{HEAD: own})
    perplexity = [{"source": str(tiny_text), "name": "it", "window": 32, "windows": 2}]
    evaluate = {"perplexity": perplexity, "baselines": []}
    recipe = tiny_recipe(model, output, stages=RTN, evaluate=evaluate)
    done = lrc("compress", recipe, "-q", "--json")
    assert done.code == 0, done.err
    report = json.loads(done.out)
    assert any(f"{HEAD} and {EMBEDDING} differ" in warning for warning in report["warnings"])
    assert report["evaluation"]["perplexity"]["it"]["ratio"] == pytest.approx(1, abs=0.02)

    result = AutoModelForCausalLM.from_pretrained(output / "checkpoint", dtype=torch.float32)
    assert not result.config.tie_word_embeddings
    assert torch.equal(result.lm_head.weight, own.bfloat16().float())
    tokens = torch.arange(40)[None]
    dense = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)  # unties by itself
    with torch.no_grad():
        difference = (result(tokens).logits - dense(tokens).logits).std()
        assert difference < 0.05 * dense(tokens).logits.std()


def make_adapter(model: Path) -> None:
    (model / "adapter_config.json").write_text('{"peft_type": "LORA"}')


def make_classifier(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    config["architectures"] = ["LlamaForSequenceClassification"]
    (model / "config.json").write_text(json.dumps(config))


def lose_a_tensor(model: Path) -> None:
    stored = load_file(model / "model.safetensors")
    del stored["model.norm.weight"]
    save_file(stored, model / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("spoil", "word"),
    [
        (make_adapter, "merge it first"),
        (make_classifier, "LlamaForSequenceClassification"),
        (lose_a_tensor, "model.norm.weight is missing"),
    ],
)
def test_every_command_refuses_what_is_another_model(
    lrc, model: Path, output: Path, tiny_recipe: Callable[..., Path], options, spoil, word: str
) -> None:
    spoil(model)
    recipe = tiny_recipe(model, output, stages=RTN)
    for command in (
        ("plan", recipe),
        ("compress", recipe),
        ("eval", model, *options),
        ("generate", model, "--prompt", "a"),
    ):
        lrc(*command).refuses(1, word, code="invalid-model")
    assert not output.exists()


STAGES: dict[str, list[dict[str, Any]]] = {
    "plain": RTN,
    "factors": [{"decompose": {"method": "svd", "keep": 0.6}}],
    "sliced": [{"slice": {"method": "drop", "keep": 0.9}}],
}


@pytest.mark.parametrize("stages", STAGES)
def test_results_of_a_gguf_file_name_their_class(
    stages, lrc, write_gguf, tiny_llama, tiny_model_folder, output, tiny_recipe
) -> None:
    """Serving engines and converters choose their code by it, and GGUF files do not state it."""
    source = write_gguf(output.with_name("tiny.gguf"), tiny_llama(num_hidden_layers=3))
    model = {"path": str(source), "tokenizer": str(tiny_model_folder)}
    recipe = tiny_recipe(source, output, model=model, stages=STAGES[stages])
    assert lrc("compress", recipe).code == 0
    config = json.loads((output / "checkpoint/config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]


def test_every_command_refuses_a_gguf_that_transformers_would_read_as_another_model(
    lrc, write_gguf, tiny_llama, output: Path, tiny_recipe: Callable[..., Path], options
) -> None:
    model, folder = tiny_llama(), output.parent
    scaled = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    part = {"split.count": 2, "split.no": 0}
    for path, word in (
        (write_gguf(folder / "scaled.gguf", model, metadata=scaled), "llama.rope.scaling.factor"),
        (
            write_gguf(folder / "a.gguf", model, metadata=part, leave_out=["blk.1.ffn_up.weight"]),
            "holds 20 of 21 tensors: it is part 1 of 2",
        ),
    ):
        recipe = tiny_recipe(path, output, stages=RTN)
        for command in (("plan", recipe), ("compress", recipe), ("eval", path, *options)):
            lrc(*command).refuses(1, word, code="invalid-model")
    assert not output.exists()
