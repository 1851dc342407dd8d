"""What `lrc delta` refuses: other bases, models that do not fit, adapters, bad options."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.tiny_deltas import MATRIX, load, weights
from torch import Tensor
from transformers import LlamaForCausalLM

import lrc as package
from lrc.configs.errors import DeltaError

# PEFT asks for an attribute that the newest transformers has renamed.
pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)


def test_other_bases_are_refused(
    make: Callable[..., dict[str, Any]], lrc: Callable[..., Any], models: Path, tmp_path: Path
) -> None:
    for tuned in ("tuned", "adapter"):
        delta = tmp_path / tuned
        make(tuned, delta, "ternary")
        done = lrc("delta", "apply", models / "other", delta, tmp_path / "out")
        done.refuses(1, "must be", "give the original base model", code="other-base")
        assert not (tmp_path / "out").exists()
        with pytest.raises(DeltaError, match="is not the model that"):
            package.load_delta(load(models / "other"), delta)
        cast = load(models / "base").to(torch.bfloat16)
        with pytest.raises(DeltaError, match=r"SHA-256|loaded in"):
            package.load_delta(cast, delta)
    adapted = peft.PeftModel.from_pretrained(load(models / "base"), models / "adapter")
    with pytest.raises(DeltaError, match="without adapters, got PeftModel"):
        package.load_delta(adapted, tmp_path / "tuned")
    with pytest.raises(DeltaError, match="has no dense tensors"):
        package.load_delta(adapted.get_base_model(), tmp_path / "tuned")


@pytest.mark.parametrize(
    ("change", "words", "code"),
    [
        (lambda w: w.pop(MATRIX), "q_proj.weight is missing", "tensor-mismatch"),
        (lambda w: w.update(extra=torch.ones(2)), "extra is not in the base", "tensor-mismatch"),
        (lambda w: w.update({MATRIX: torch.ones(32, 8)}), "[32, 8], not", "tensor-mismatch"),
        (lambda w: w[MATRIX].fill_(torch.nan), "holds NaN or Inf", "invalid-model"),
    ],
    ids=["missing", "extra", "shape", "nan"],
)
def test_tuned_models_that_do_not_fit_are_refused(
    change: Callable[[dict[str, Tensor]], Any],
    words: str,
    code: str,
    lrc: Callable[..., Any],
    models: Path,
    tmp_path: Path,
) -> None:
    shutil.copytree(models / "tuned", tmp_path / "tuned")
    stored = weights(tmp_path / "tuned")
    change(stored)
    save_file(stored, tmp_path / "tuned/model.safetensors", metadata={"format": "pt"})
    done = lrc("delta", "make", models / "base", tmp_path / "tuned", tmp_path / "out", "-q")
    done.refuses(1, words, code=code)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tuned"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"peft_type": "LOHA"}, "peft_type is 'LOHA'"),
        ({"use_dora": True}, "use_dora is True"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save is ['lm_head']"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),
    ],
    ids=str,
)
def test_unsupported_adapters_are_refused(
    changes: dict[str, Any], words: str, lrc: Callable[..., Any], models: Path, tmp_path: Path
) -> None:
    shutil.copytree(models / "adapter", tmp_path / "adapter")
    path = tmp_path / "adapter/adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    done = lrc("delta", "make", models / "base", tmp_path / "adapter", tmp_path / "out", "-q")
    done.refuses(1, words, "merge_and_unload", code="unsupported-adapter")


def test_other_bad_input_is_refused(
    make: Callable[..., dict[str, Any]],
    lrc: Callable[..., Any],
    models: Path,
    write_gguf: Callable[..., Path],
    tiny_llama: Callable[..., LlamaForCausalLM],
    tmp_path: Path,
) -> None:
    base, tuned, out = models / "base", models / "tuned", tmp_path / "out"

    def refused(*arguments: object, exit_code: int, code: str, words: str) -> None:
        lrc("delta", *arguments).refuses(exit_code, words, code=code)
        assert not out.exists()

    refused("make", base, base, out, exit_code=1, code="no-difference", words="same weights")
    refused("make", base, tuned, out, "rank=3", exit_code=2, code="misplaced-key", words="rank")
    for method, words in (("svd", "did you mean low-rank?"), ("zzz", "choose one of them")):
        arguments = ("make", base, tuned, out, "--method", method)
        refused(*arguments, exit_code=2, code="usage", words=words)
    for options, words in (
        (["rank=17"], "must be in [1, 16] for model.layers.0.self_attn.k_proj.weight"),
        (["size=1kB"], "size: must be at least"),
    ):
        arguments = ("make", base, tuned, out, *options, "--method", "low-rank", "-q")
        refused(*arguments, exit_code=2, code="usage", words=words)
    for option, code, words in (
        ("gradients=false", "conflicting-keys", "is an option of 'calibration'"),
        ("calibration.source=no.jsonl", "", "no.jsonl"),
        ("calibration.length=100000", "", "calibration.length"),
    ):
        arguments = ("make", base, tuned, out, option, "--method", "low-rank", "-q")
        refused(*arguments, exit_code=2, code=code, words=words)
    for name in ("base", "tuned"):
        plain = shutil.ignore_patterns("tokenizer*")
        shutil.copytree(models / name, tmp_path / f"plain-{name}", ignore=plain)
    arguments = ("make", tmp_path / "plain-base", tmp_path / "plain-tuned", out, "-q")
    options = ("--method", "low-rank", "calibration.source=python-docs")
    words = "leave the calibration out"
    refused(*arguments, *options, exit_code=2, code="usage", words=words)
    coded = json.loads((base / "config.json").read_text())
    coded |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Own"}}
    (tmp_path / "plain-base/config.json").write_text(json.dumps(coded))
    refused(*arguments, exit_code=1, code="invalid-model", words="this command cannot run it")
    arguments = ("make", base, models / "adapter", out, "rank=5", "--method", "low-rank")
    refused(*arguments, exit_code=2, code="usage", words="must be in [1, 4]")
    refused("make", base, tmp_path / "no", out, exit_code=2, code="", words="no such folder")
    refused("apply", base, tuned, out, exit_code=1, code="invalid-delta", words="delta.json")

    quantized = tmp_path / "quantized"
    shutil.copytree(base, quantized)
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (quantized / "config.json").write_text(json.dumps(config))
    arguments = ("make", quantized, tuned, out)
    refused(*arguments, exit_code=1, code="invalid-model", words="already compressed")

    gguf = write_gguf(tmp_path / "model.gguf", tiny_llama())
    refused("make", gguf, tuned, out, exit_code=1, code="invalid-model", words="is a GGUF file")

    shutil.copytree(models / "adapter", tmp_path / "zero")
    path = tmp_path / "zero/adapter_model.safetensors"
    stored = {n: t * ("lora_A" in n) for n, t in load_file(path).items()}
    save_file(stored, path)
    refused(
        *("make", base, tmp_path / "zero", out),
        **{"exit_code": 1, "code": "no-difference", "words": "is zero"},
    )

    make("tuned", tmp_path / "delta", "ternary")
    path = tmp_path / "delta/delta.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    refused(
        *("apply", base, tmp_path / "delta", out),
        **{"exit_code": 1, "code": "changed-file", "words": "has changed"},
    )
    path = tmp_path / "delta/delta.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format_version": 2}))
    refused(
        *("apply", base, tmp_path / "delta", out),
        **{"exit_code": 1, "code": "other-version", "words": "must be 1, got 2"},
    )
