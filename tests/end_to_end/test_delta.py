"""`lrc delta` on tiny models and adapters: make, apply, load, switch, and what is refused."""

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import lrc as package
from lrc.configs.errors import DeltaError

# PEFT asks for an attribute that the newest transformers has renamed.
pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)
TOKENS = torch.arange(2, 34)[None]
MATRIX = "model.layers.0.self_attn.q_proj.weight"
METHODS: dict[str, list[str]] = {
    "ternary": ["density=0.2"],
    "low-rank": ["rank=4"],
    "int": ["bits=3", "group_size=16"],
    "sparse": ["density=0.1"],
}


def load(folder: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto", **options).eval()


@torch.no_grad()
def logits_of(model: Any) -> Tensor:
    found: Tensor = model(TOKENS).logits
    return found


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.fixture(scope="module")
def models(
    tiny_llama: Callable[..., LlamaForCausalLM],
    make_tokenizer: Callable[..., Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """Folders `base`, `tuned` (everything but the embedding), `other` and `adapter`."""
    folder = tmp_path_factory.mktemp("deltas")
    base = tiny_llama()
    base.save_pretrained(folder / "base")
    make_tokenizer().save_pretrained(folder / "base")
    tiny_llama(seed=1).save_pretrained(folder / "other")
    g = torch.Generator().manual_seed(0)
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "embed" not in name:
                parameter += 0.02 * torch.randn(parameter.shape, generator=g)
    tuned.generation_config.max_new_tokens = 7
    tuned.save_pretrained(folder / "tuned")
    make_tokenizer().save_pretrained(folder / "tuned")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = peft.LoraConfig(
            r=8,
            lora_alpha=12,
            target_modules=["q_proj", "down_proj"],
            rank_pattern={"layers.1.self_attn.q_proj": 4},
            alpha_pattern={"layers.0.mlp.down_proj": 5},
            use_rslora=True,
            init_lora_weights=False,
        )
        peft.get_peft_model(base, config).save_pretrained(folder / "adapter")
    return folder


@pytest.fixture
def make(lrc: Callable[..., Any], models: Path) -> Callable[..., dict[str, Any]]:
    """Make a delta of models by name; return what is printed as JSON."""

    def run(tuned: str | Path, out: Path, method: str, *options: str) -> dict[str, Any]:
        ended = lrc(
            *("delta", "make", models / "base", models / tuned, out, *options),
            *("--method", method, "--json", "-q"),
        )
        assert ended.code == 0, ended.err
        found: dict[str, Any] = json.loads(ended.out)
        return found

    return run


@pytest.mark.parametrize("method", METHODS)
def test_the_applied_model_has_the_reported_sizes_and_errors(
    method: str,
    make: Callable[..., dict[str, Any]],
    lrc: Callable[..., Any],
    models: Path,
    tmp_path: Path,
) -> None:
    facts = make("tuned", tmp_path / "delta", method, *METHODS[method])
    stored = load_file(tmp_path / "delta/delta.safetensors")
    table = stored.pop("table")
    assert 8 * sum(t.nbytes for t in stored.values()) == facts["sizes"]["bits"]
    assert table.numel() < 4000
    files = [file for file in (tmp_path / "delta").rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) == facts["file_bytes"]

    assert lrc("delta", "apply", models / "base", tmp_path / "delta", tmp_path / "out").code == 0
    base, tuned, found = map(weights, (models / "base", models / "tuned", tmp_path / "out"))
    assert torch.equal(found["model.embed_tokens.weight"], base["model.embed_tokens.weight"])
    assert "model.embed_tokens.weight" not in [each["name"] for each in facts["tensors"]]
    for each in facts["tensors"]:
        name = each["name"]
        error = (found[name] - tuned[name]).norm() / (tuned[name] - base[name]).norm()
        assert each["relative_error"] == pytest.approx(float(error), rel=1e-3, abs=1e-6)
    numbers = sum(tuned[each["name"]].numel() for each in facts["tensors"])
    assert facts["sizes"]["numbers"] == numbers
    assert facts["sizes"]["ratio"] == pytest.approx(16 * numbers / facts["sizes"]["bits"])
    assert 0 < facts["sizes"]["relative_error"] < 1
    assert load(tmp_path / "out").generation_config.max_new_tokens == 7
    for name in ("config.json", "tokenizer.json"):
        assert (tmp_path / "out" / name).read_text() == (models / "tuned" / name).read_text()

    model = load(models / "base")
    package.load_delta(model, tmp_path / "delta")
    assert torch.equal(logits_of(model), logits_of(load(tmp_path / "out")))


def test_a_sparse_delta_of_everything_is_exact_and_is_made_again(
    make: Callable[..., dict[str, Any]], lrc: Callable[..., Any], models: Path, tmp_path: Path
) -> None:
    facts = make("tuned", tmp_path / "all", "sparse", "density=1.0")
    assert facts["sizes"]["relative_error"] == 0
    lrc("delta", "apply", models / "base", tmp_path / "all", tmp_path / "out")
    found, tuned = weights(tmp_path / "out"), weights(models / "tuned")
    assert all(torch.equal(found[name], tuned[name]) for name in tuned)

    make("tuned", tmp_path / "some", "sparse", "density=0.1")
    lrc("delta", "apply", models / "base", tmp_path / "some", tmp_path / "part")
    again = make(tmp_path / "part", tmp_path / "again", "sparse", "density=0.1")
    assert again["sizes"]["relative_error"] == 0
    files = [tmp_path / name / "delta.safetensors" for name in ("some", "again")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_delta_of_full_rank_is_exact_within_rounding(
    make: Callable[..., dict[str, Any]], models: Path, tmp_path: Path
) -> None:
    facts = make("tuned", tmp_path / "delta", "low-rank", "rank=16")
    found = {each["name"].split(".")[-2]: each for each in facts["tensors"]}
    assert found["k_proj"]["codec"] == found["q_proj"]["codec"] == "low_rank"
    assert found["k_proj"]["relative_error"] < 0.01 < 0.1 < found["q_proj"]["relative_error"]


def test_ranks_fit_a_size_and_are_chosen_by_error(
    make: Callable[..., dict[str, Any]], models: Path, tmp_path: Path
) -> None:
    for tuned in ("tuned", "adapter"):
        uniform = make(tuned, tmp_path / f"{tuned}-rank", "low-rank", "rank=3")["sizes"]
        size = f"{uniform['bits'] // 8}B"
        chosen = make(tuned, tmp_path / f"{tuned}-size", "low-rank", f"size={size}")["sizes"]
        assert 0.95 * uniform["bits"] < chosen["bits"] <= uniform["bits"]
        assert chosen["relative_error"] < uniform["relative_error"]


@pytest.mark.parametrize("tuned", ["tuned", "adapter"])
def test_calibrated_ranks_lose_less_of_what_the_text_uses(
    tuned: str, make: Callable[..., dict[str, Any]], models: Path, tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("some words that the model has to read, and then some more of them. " * 40)
    calibration = [f"calibration.source={text}", "calibration.samples=4", "calibration.length=32"]
    plain = make(tuned, tmp_path / "plain", "low-rank", "rank=2")
    size = f"size={plain['sizes']['bits'] // 8}B"
    uniform, chosen = (
        make(tuned, tmp_path / rank, "low-rank", rank, *calibration) for rank in ("rank=2", size)
    )
    assert uniform["sizes"]["bits"] == plain["sizes"]["bits"] >= chosen["sizes"]["bits"]
    assert uniform["sizes"]["relative_error"] > plain["sizes"]["relative_error"]
    assert chosen["sizes"]["weighted_error"] < uniform["sizes"]["weighted_error"] < 1
    weighted = [each["name"] for each in uniform["tensors"] if "weighted_error" in each]
    assert any("down_proj" in name for name in weighted)
    assert not any("norm" in name or "lm_head" in name for name in weighted)
    assert not list(tmp_path.rglob("calibration-*"))
    assert uniform["method"]["calibration"]["length"] == 32


def test_what_is_not_smaller_as_factors_is_stored_as_it_is(
    make: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    facts = make("tuned", tmp_path / "delta", "low-rank", "keep=1", "dtype=float32")
    (matrix,) = (each for each in facts["tensors"] if each["name"] == MATRIX)
    assert (matrix["codec"], matrix["relative_error"]) == ("exact", 0)


@pytest.fixture
def two_deltas(make: Callable[..., dict[str, Any]], tmp_path: Path) -> Path:
    make("tuned", tmp_path / "full", "ternary", "density=0.2")
    make("adapter", tmp_path / "lora", "int", "bits=8")
    return tmp_path


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_switching_restores_the_base_bit_by_bit(
    dtype: torch.dtype, two_deltas: Path, models: Path, lrc: Callable[..., Any], tmp_path: Path
) -> None:
    base = models / "base"
    if dtype != torch.float32:
        base = tmp_path / "base"
        load(models / "base").to(dtype).save_pretrained(base)
        for name in ("full", "lora"):
            shutil.rmtree(two_deltas / name)
        for name, tuned in (("full", "tuned"), ("lora", "adapter")):
            done = lrc("delta", "make", base, models / tuned, two_deltas / name, "-q")
            assert done.code == 0, done.err
    # A base in bfloat16 may also run in float32.
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    deltas = package.load_delta(model, two_deltas / "full", name="full")
    with_full = logits_of(model)
    deltas.add("lora", two_deltas / "lora")
    assert torch.equal(logits_of(model), with_full)
    deltas.activate("lora")
    with_lora = logits_of(model)
    deltas.activate("full")
    assert torch.equal(logits_of(model), with_full)
    assert not torch.equal(with_lora, with_full)
    deltas.deactivate()
    assert deltas.active is None
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    deltas.activate("lora")
    assert torch.equal(logits_of(model), with_lora)


@pytest.mark.parametrize("method", ["ternary", "int", "sparse", "low-rank"])
def test_peft_loads_the_adapter(
    method: str,
    make: Callable[..., dict[str, Any]],
    lrc: Callable[..., Any],
    models: Path,
    tmp_path: Path,
) -> None:
    options = ["rank=2"] if method == "low-rank" else METHODS[method]
    facts = make("adapter", tmp_path / "delta", method, *options)
    numbers = sum(
        t.numel() for t in load_file(models / "adapter/adapter_model.safetensors").values()
    )
    assert facts["sizes"]["numbers"] == numbers
    done = lrc("delta", "apply", models / "base", tmp_path / "delta", tmp_path / "out")
    assert done.code == 0, done.err
    adapted = peft.PeftModel.from_pretrained(load(models / "base"), tmp_path / "out").eval()
    model = load(models / "base")
    deltas = package.load_delta(model, tmp_path / "delta")
    torch.testing.assert_close(logits_of(model), logits_of(adapted), rtol=0, atol=1e-4)
    deltas.deactivate()
    assert not torch.allclose(logits_of(model), logits_of(adapted), atol=1e-2)


def test_an_adapter_of_its_own_rank_keeps_its_products_and_scaling(
    make: Callable[..., dict[str, Any]], lrc: Callable[..., Any], models: Path, tmp_path: Path
) -> None:
    facts = make("adapter", tmp_path / "delta", "low-rank", "keep=1", "dtype=float32")
    assert facts["sizes"]["relative_error"] < 1e-6
    lrc("delta", "apply", models / "base", tmp_path / "delta", tmp_path / "out")
    base = load(models / "base")
    expected = logits_of(peft.PeftModel.from_pretrained(base, models / "adapter").eval())
    found = logits_of(
        peft.PeftModel.from_pretrained(load(models / "base"), tmp_path / "out").eval()
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_the_table_has_one_row_for_layers_that_are_alike(
    lrc: Callable[..., Any], models: Path, tmp_path: Path
) -> None:
    arguments = ("delta", "make", models / "base", models / "tuned")
    short = lrc(*arguments, tmp_path / "a", "-q").out
    assert "model.layers.*.self_attn.q_proj.weight" in short
    assert "times smaller than in 16 bits" in short
    every = lrc(*arguments, tmp_path / "b", "--all", "-q").out
    assert MATRIX in every


def test_inspect_shows_what_make_has_reported(
    make: Callable[..., dict[str, Any]], lrc: Callable[..., Any], tmp_path: Path
) -> None:
    facts = make("tuned", tmp_path / "delta", "sparse", "density=0.1")
    ended = lrc("inspect", tmp_path / "delta", "--json")
    assert (ended.code, ended.err) == (0, "")
    shown = json.loads(ended.out)
    for each in facts["tensors"]:
        del each["relative_error"]  # of which the folder has only the total
    for key in ("kind", "method", "sizes", "tensors", "file_bytes"):
        assert shown[key] == facts[key]
    assert "model.layers.*.self_attn.q_proj.weight" in lrc("inspect", tmp_path / "delta").out
    weights_file = tmp_path / "delta/delta.safetensors"
    weights_file.write_bytes(weights_file.read_bytes()[:-1] + b"x")
    lrc("inspect", tmp_path / "delta").refuses(1, "has changed", code="changed-file")
    description = tmp_path / "delta/delta.json"
    description.write_text(description.read_text().replace('"numbers"', '"number"'))
    lrc("inspect", tmp_path / "delta").refuses(1, "keys are missing", code="invalid-delta")


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


def test_names_of_loaded_deltas_are_checked(
    make: Callable[..., dict[str, Any]], models: Path, tmp_path: Path
) -> None:
    make("tuned", tmp_path / "delta", "ternary")
    deltas = package.LoadedDeltas(load(models / "base"))
    deltas.add("a", tmp_path / "delta")
    with pytest.raises(DeltaError, match="has been added already"):
        deltas.add("a", tmp_path / "delta")
    with pytest.raises(DeltaError, match=r"must be the name of a delta.*one of a"):
        deltas.activate("b")


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
