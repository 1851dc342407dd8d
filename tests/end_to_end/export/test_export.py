"""`lrc export`: dense folders and GGUF files of tiny models, read back by other programs."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import load_file
from tests.shared_runs import Run
from torch import Tensor
from transformers import AutoModelForCausalLM

from lrc.compressors.checkpoint.gguf_conversion import convert_gguf
from lrc.compressors.export.gguf_families import FAMILIES as FAMILIES_OF_GGUF
from lrc.compressors.export.stored_weights import StoredWeights
from lrc.compressors.io.files import partial_path
from lrc.compressors.io.gguf_file import read_gguf
from lrc.compressors.io.machine import Machine
from lrc.compressors.models.source import locate
from lrc.compressors.models.source_check import check_contents
from lrc.compressors.pipeline import compress
from lrc.configs.load import load_recipe
from lrc.configs.recipe import Model

pytestmark = pytest.mark.usefixtures("one_thread")

INT4 = {"quantize": {"method": "rtn", "bits": 4, "group_size": 32}}
INT8_OF_48 = {"quantize": {"method": "rtn", "targets": ["*.down_proj"]}}
"""Whose rows in the tiny model have 48 numbers."""
TOKENS = torch.arange(2, 60)[None]


@torch.no_grad()
def logits(folder: Path, *, dense: bool = False) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model = model.dequantize() if dense else model
    found: Tensor = model(TOKENS).logits
    return found


def reread(path: Path, scratch: Path) -> Path:
    """Convert a GGUF file as lrc converts sources, after the checks of sources."""
    source = locate(Model(path=str(path), dtype="float32"))
    from lrc.compressors.models.architecture import build

    check_contents(source, build(source))
    convert_gguf(source, scratch)
    return scratch


@pytest.mark.parametrize(
    "name",
    ["plain", "embedded", "factors", "shared", "sparse", "narrow-heads", "uneven", "rotated"],
)
def test_dense_folders_load_without_lrc_and_compute_the_same(
    name: str, checkpoint: Callable[[str], Path], lrc: Callable[..., Any], tmp_path: Path
) -> None:
    ended = lrc("export", checkpoint(name), tmp_path / "out", "--format", "dense", "--json")
    assert ended.code == 0, ended.err
    facts = json.loads(ended.out)
    assert facts["notes"] == []
    files = list((tmp_path / "out").iterdir())
    assert facts["bytes"] == sum(file.stat().st_size for file in files)
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert "quantization_config" not in config
    assert config["architectures"] == ["LlamaForCausalLM"]
    tensors = load_file(tmp_path / "out/model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert (tmp_path / "out/tokenizer.json").is_file()
    assert (tmp_path / "out/chat_template.jinja").is_file()
    expected = AutoModelForCausalLM.from_pretrained(checkpoint(name), dtype=torch.bfloat16)
    if hasattr(expected, "ct_decompress_hook"):
        expected(TOKENS)
    elif getattr(expected, "hf_quantizer", None) is not None:
        expected = expected.dequantize()
    for key, parameter in expected.state_dict().items():
        if key in tensors:
            assert torch.equal(tensors[key], parameter), key
    assert torch.isfinite(logits(tmp_path / "out")).all()


def test_dense_folders_say_when_they_need_lrc(
    checkpoint: Callable[[str], Path], lrc: Callable[..., Any], tmp_path: Path
) -> None:
    ended = lrc("export", checkpoint("biases"), tmp_path / "out", "--format", "dense")
    assert "note: its layers have biases that the architecture lacks" in ended.out
    torch.testing.assert_close(
        logits(tmp_path / "out"), logits(checkpoint("biases")), rtol=0.02, atol=0.1
    )


@pytest.mark.parametrize("name", ["plain", "embedded", "asymmetric", "mixed", "uneven-integers"])
def test_blocks_of_gguf_are_the_stored_integers(
    name: str, checkpoint: Callable[[str], Path], lrc: Callable[..., Any], tmp_path: Path
) -> None:
    folder, out = checkpoint(name), tmp_path / "out.gguf"
    ended = lrc("export", folder, out, "--format", "gguf", "--json")
    assert ended.code == 0, ended.err
    facts = json.loads(ended.out)
    weights = StoredWeights(folder)
    assert facts["roles"]["integers"] == len(weights.modules) > 0
    config = weights.architecture.model.config
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(out).tensors}
    for module in weights.modules:
        codes, scale, zero = weights.integers(module)
        steps = codes.float().view(len(codes), scale.shape[1], -1)
        steps = steps if zero is None else steps - zero.float()[:, :, None]
        expected = (steps * scale.float()[:, :, None]).view(codes.shape)
        stored = tensors[f"{names.get_name(module)}.weight"]
        found = torch.from_numpy(gguf.quants.dequantize(stored.data, stored.tensor_type))
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        if count := heads.get(module.rpartition(".")[2]):
            found = found.unflatten(0, (count, -1, 2)).transpose(1, 2).flatten(0, 2)
        difference = (found - expected).abs().max().item()
        if zero is None:
            assert difference == 0.0, module
        else:  # the minimum of a block is a float16
            assert 0.0 < difference <= 16 * scale.max().item() * 2.0**-11
    if name == "mixed":
        assert {"Q4_0", "Q8_0", "F32"} <= facts["types"].keys()


# Sizes that transformers does not read from GGUF, such as the head_dim of Qwen3, are those that it
# assumes. llama.cpp reads them: see test_llama_cpp.py.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama-tied": {"model_type": "llama", "tie_word_embeddings": True},
    "mistral": {"sliding_window": None},
    "qwen2": {"vocab_size": 520},  # rows without a token
    "qwen3": {"head_dim": 128},
    "gemma3_text": {"head_dim": 256, "sliding_window": 24, "num_hidden_layers": 6},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_gguf_of_every_family_is_read_back_as_the_same_model(
    family: str, tmp_path: Path, save_family: Callable[..., Any], lrc: Callable[..., Any]
) -> None:
    model = save_family(tmp_path / "source", **{"model_type": family, **FAMILIES[family]})
    out = tmp_path / "out.gguf"
    ended = lrc("export", tmp_path / "source", out, "--format", "gguf")
    assert ended.code == 0, ended.err
    _, headers = read_gguf(out)
    parameters = {name for name, _ in model.named_parameters()}  # of tied ones, only the first
    assert len(headers) == len(parameters)
    assert {header.dtype for header in headers.values()} == {"F32"}
    again = reread(out, tmp_path / "again")
    torch.testing.assert_close(logits(again), logits(tmp_path / "source"), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["f32", "f16", "bf16", "q8_0", "q4_0"])
def test_products_are_stored_in_the_requested_type_at_a_stated_cost(
    kind: str, checkpoint: Callable[[str], Path], lrc: Callable[..., Any], tmp_path: Path
) -> None:
    out = tmp_path / "out.gguf"
    ended = lrc("export", checkpoint("factors"), out, "--format", "gguf", "--type", kind, "--json")
    assert ended.code == 0, ended.err
    facts = json.loads(ended.out)
    assert facts["roles"]["products"] == 14
    sizes = r"14, [1-9][\d.]* KiB, against [1-9][\d.]* KiB in the checkpoint"
    assert re.search(sizes, facts["notes"][0])
    assert facts["types"][kind.upper()]["tensors"] >= 15
    again, expected = logits(reread(out, tmp_path / "again")), logits(checkpoint("factors"))
    close = {"f32": 1e-4, "f16": 0.01, "bf16": 0.1, "q8_0": 0.3, "q4_0": 4.0}
    assert (again - expected).abs().max() < close[kind] * expected.std()


def test_the_tokenizer_is_copied_from_the_gguf_source(
    source: Path, tiny_recipe: Callable[..., Path], lrc: Callable[..., Any], tmp_path: Path
) -> None:
    given = tmp_path / "given.gguf"
    assert lrc("export", source, given, "--format", "gguf").code == 0
    output = tmp_path / "run"
    compress(load_recipe(tiny_recipe(given, output, stages=[INT4])), Machine("cpu"))
    out = tmp_path / "out.gguf"
    ended = lrc("export", output / "checkpoint", out, "--format", "gguf")
    assert ended.code == 0, ended.err
    config = json.loads((output / "checkpoint/config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]  # which GGUF files do not state
    before, after = read_gguf(given)[0], read_gguf(out)[0]
    copied = {key for key in before if key.startswith("tokenizer.")}
    assert {"tokenizer.ggml.merges", "tokenizer.chat_template"} < copied
    assert {key: after[key] for key in copied} == {key: before[key] for key in copied}
    assert after["general.name"] == before["general.name"] == "tiny"
    arguments = ("export", given, tmp_path / "dense", "--format")
    assert lrc(*arguments, "dense").code == 0
    tensors = load_file(tmp_path / "dense/model.safetensors")
    expected = load_file(source / "model.safetensors")
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[key], expected[key].bfloat16()) for key in tensors)
    assert (tmp_path / "dense/tokenizer.json").is_file()
    lrc(*arguments, "remote-code").refuses(2, "only be exported with --format dense", code="usage")
    given.unlink()
    arguments = ("export", output / "checkpoint", tmp_path / "2.gguf", "--format", "gguf")
    lrc(*arguments).refuses(1, "was made from", "--tokenizer", code="cannot-export")
    assert lrc(*arguments, "--tokenizer", source).code == 0


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("factors", [], ["--type f16", "GGUF has no type for"]),
        ("small-groups", [], ["groups of int4-g16 are not a multiple of 32", "--type f16"]),
        ("factors", ["--type", "q6_k"], ["--type: must be f32", "q6_k"]),
        ("factors", ["--tokenizer", "nowhere"], ["--tokenizer: no file or folder nowhere"]),
    ],
)
def test_what_gguf_cannot_express_is_refused_with_an_alternative(
    name: str,
    options: list[str],
    words: list[str],
    checkpoint: Callable[[str], Path],
    lrc: Callable[..., Any],
    tmp_path: Path,
) -> None:
    out = tmp_path / "out.gguf"
    ended = lrc("export", checkpoint(name), out, "--format", "gguf", *options)
    ended.refuses(2 if options else 1, *words)
    assert not list(tmp_path.iterdir())


def test_no_type_of_blocks_is_advised_for_rows_that_are_not_whole_blocks(
    run_stages: Run, lrc: Callable[..., Any], tmp_path: Path
) -> None:
    _, run = run_stages(INT8_OF_48)
    ended = lrc("export", run / "checkpoint", tmp_path / "out.gguf", "--format", "gguf")
    ended.refuses(1, "rows of 48", "; --type f16 or bf16 stores", code="cannot-export")


@pytest.mark.parametrize(
    ("name", "missing", "message"),
    [
        ("uneven", "layer_widths", "must have the same shapes in all layers"),
        ("narrow-heads", "frequency_table", "slice with `heads: false`"),
    ],
)
def test_slices_are_refused_for_families_that_cannot_express_them(
    name: str,
    missing: str,
    message: str,
    checkpoint: Callable[[str], Path],
    lrc: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: Any,
) -> None:
    limited = replace(FAMILIES_OF_GGUF["llama"], **{missing: None})
    monkeypatch.setitem(FAMILIES_OF_GGUF, "llama", limited)
    out = tmp_path / "out.gguf"
    lrc("export", checkpoint(name), out, "--format", "gguf").refuses(1, message)
    if name == "uneven":  # the alternative in the message
        assert lrc("export", checkpoint(name), tmp_path / "dense", "--format", "dense").code == 0
        assert lrc("export", tmp_path / "dense", out, "--format", "gguf").code == 0
        again, expected = logits(reread(out, tmp_path / "again")), logits(checkpoint(name))
        torch.testing.assert_close(again, expected, rtol=1e-4, atol=1e-4)


def test_bases_of_single_blocks_are_refused(
    checkpoint: Callable[[str], Path], lrc: Callable[..., Any], tmp_path: Path
) -> None:
    for form in ("dense", "gguf"):
        ended = lrc("export", checkpoint("rotated-blocks"), tmp_path / "out.gguf", "--format", form)
        ended.refuses(1, "rotations: global", code="cannot-export")


CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "family": ({"model_type": "opt"}, "model_type 'opt' has no mapping to GGUF"),
    "activation": ({"hidden_act": "gelu"}, "its activation must be silu, got gelu"),
    "rope": (
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}},
        "llama models in GGUF must have default, linear, llama3",
    ),
    "layers": (
        {
            "model_type": "gemma3_text",
            "query_pre_attn_scalar": 16,
            "layer_types": ["full_attention", "sliding_attention"],
        },
        "every n-th one",
    ),
    "width": (
        {"model_type": "qwen2", "head_dim": 32},
        "num_attention_heads times head_dim must be hidden_size, 64, got 4 times 32",
    ),
    "scale": ({"model_type": "gemma3_text"}, "query_pre_attn_scalar must be 16, got 256"),
    "biases": ({"model_type": "qwen3", "attention_bias": True}, "no such tensor"),
    "gates": ({"model_type": "qwen3_moe", "norm_topk_prob": False}, "norm_topk_prob must be True"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_models_that_llama_cpp_would_compute_differently_are_refused(
    name: str, save_family: Callable[..., Any], lrc: Callable[..., Any], tmp_path: Path
) -> None:
    changes, message = CONFIGS[name]
    save_family(tmp_path / "source", **changes)
    ended = lrc("export", tmp_path / "source", tmp_path / "out.gguf", "--format", "gguf")
    ended.refuses(1, message, code="cannot-export")


def test_paths_are_checked_and_nothing_is_overwritten(
    source: Path, lrc: Callable[..., Any], tmp_path: Path
) -> None:
    taken = tmp_path / "taken.gguf"
    taken.write_text("mine")
    for arguments, message in (
        ([source, taken, "--format", "gguf"], "exists already"),
        ([source, tmp_path, "--format", "dense"], "exists already"),
        ([source, tmp_path / "out", "--format", "gguf"], "must end in .gguf"),
        ([source, tmp_path / "out", "--format", "gguff"], "did you mean gguf?"),
        (
            [source, tmp_path / "out"],
            "--format: missing; give dense, gguf, int-quantized, remote-code or drafter",
        ),
        ([source, source / "out", "--format", "dense"], "must not be inside"),
        ([tmp_path / "none", tmp_path / "out", "--format", "dense"], "no such folder"),
        ([source, tmp_path / "out", "--format", "dense", "--type", "f16"], "--format gguf"),
    ):
        lrc("export", *arguments).refuses(2, message, code="usage")
    assert taken.read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["taken.gguf"]


@pytest.mark.parametrize("form", ["dense", "gguf"])
def test_an_interrupted_export_leaves_nothing(
    form: str, source: Path, lrc: Callable[..., Any], tmp_path: Path, monkeypatch: Any
) -> None:
    out, read = tmp_path / "out.gguf", StoredWeights.read

    def stop(weights: StoredWeights, name: str) -> Tensor:
        if "layers.1" in name:
            assert partial_path(out).exists()
            raise KeyboardInterrupt
        return read(weights, name)

    monkeypatch.setattr(StoredWeights, "read", stop)
    ended = lrc("export", source, out, "--format", form)
    assert ended.code == 75
    last = "stopped: at once; the same command starts from the beginning"
    assert ended.err.splitlines()[-1] == last
    assert not list(tmp_path.iterdir())


def test_attention_windows_limit_the_context(
    save_family: Callable[..., Any], lrc: Callable[..., Any], tmp_path: Path
) -> None:
    save_family(tmp_path / "source", model_type="mistral", sliding_window=24)
    ended = lrc("export", tmp_path / "source", tmp_path / "out.gguf", "--format", "gguf")
    assert "note: the context is limited to 24 tokens" in ended.out
    assert read_gguf(tmp_path / "out.gguf")[0]["llama.context_length"] == 24


def test_integers_that_lrc_cannot_identify_are_refused(
    checkpoint: Callable[[str], Path], lrc: Callable[..., Any], tmp_path: Path
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(checkpoint("plain"), folder, ignore=shutil.ignore_patterns("lrc"))
    ended = lrc("export", folder, tmp_path / "out", "--format", "dense")
    ended.refuses(1, "'compressed-tensors' without lrc/manifest.json", code="cannot-export")


def test_folders_without_a_tokenizer_are_refused(
    source: Path, lrc: Callable[..., Any], tmp_path: Path
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("token*"))
    ended = lrc("export", folder, tmp_path / "out.gguf", "--format", "gguf")
    ended.refuses(1, "no tokenizer could be loaded", "--tokenizer", code="cannot-export")


def test_a_changed_recipe_is_refused_where_the_source_is_read_from_it(
    checkpoint: Callable[[str], Path], lrc: Callable[..., Any], tmp_path: Path
) -> None:
    folder = tmp_path / "changed"
    shutil.copytree(checkpoint("mixed"), folder)
    (folder / "lrc/recipe.yaml").write_text("model: [", encoding="utf-8")
    ended = lrc("export", folder, tmp_path / "out.gguf", "--format", "gguf")
    ended.refuses(1, "lrc/recipe.yaml", code="changed-file")


def test_a_dtype_that_models_cannot_have_is_refused(
    source: Path, lrc: Callable[..., Any], tmp_path: Path
) -> None:
    folder = tmp_path / "double"
    AutoModelForCausalLM.from_pretrained(source, dtype=torch.float64).save_pretrained(folder)
    ended = lrc("export", folder, tmp_path / "out", "--format", "dense")
    ended.refuses(1, "bfloat16, float16, float32, got float64", code="cannot-export")


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("num_hidden_layers", 1, "which has none there"),
        ("intermediate_size", 128, "which has [64, 128] there, got [64, 96]"),
    ],
)
def test_weights_that_do_not_fit_the_config_are_refused(
    checkpoint: Callable[[str], Path],
    lrc: Callable[..., Any],
    tmp_path: Path,
    key: str,
    value: int,
    words: str,
) -> None:
    folder = tmp_path / "edited"
    shutil.copytree(checkpoint("factors"), folder, ignore=shutil.ignore_patterns("lrc"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, key: value}))
    ended = lrc("export", folder, tmp_path / "out", "--format", "dense")
    ended.refuses(1, words, code="invalid-config")


def test_damaged_checkpoints_are_refused(
    checkpoint: Callable[[str], Path], lrc: Callable[..., Any], tmp_path: Path
) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(checkpoint("mixed"), folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    ended = lrc("export", folder, tmp_path / "out.gguf", "--format", "gguf")
    ended.refuses(1, "model.safetensors", code="changed-file")
