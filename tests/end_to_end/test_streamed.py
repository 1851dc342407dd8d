"""Evaluation layer by layer measures what whole models give, with one layer in memory."""

import json
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn
from weakref import finalize

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from lrc.cli import whole_models
from lrc.compressors import pipeline, run_evaluation
from lrc.compressors.calibrate.batch_size import BATCH_TOKENS
from lrc.compressors.evaluate import streaming_rule
from lrc.compressors.io.machine import Machine
from lrc.compressors.io.shards import read_folder
from lrc.compressors.model_versions import ModelVersions
from lrc.compressors.models import weights
from lrc.compressors.models.weights import WeightReader
from lrc.compressors.pipeline import compress
from lrc.compressors.prepare import Prepared, prepare
from lrc.compressors.stages import STAGES
from lrc.compressors.streamed import checkpoint_layers
from lrc.compressors.streamed.checkpoint_layers import CheckpointFiller
from lrc.configs.errors import CheckpointError, EvaluationIncomplete, Stopped
from lrc.configs.load import load_recipe

SIZES = {
    "vocab_size": 512,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
LLAMA = {
    "model_type": "llama",
    **SIZES,
    "intermediate_size": 48,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
    "head_dim": 8,
}
OPT = {"model_type": "opt", **SIZES, "ffn_dim": 48, "word_embed_proj_dim": 32, "init_std": 0.2}
MIXTRAL = {**LLAMA, "model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}
SLIDING = {"sliding_window": 9, "initializer_range": 0.5}  # windows are longer
KFAC = {"decompose": {"method": "kfac", "keep": 0.6, "compensate": {}}}
SVD = {"decompose": {"method": "svd-llm", "keep": 0.6}}
SHARED = {"decompose": {"method": "basis-sharing", "keep": 0.7}}
WIDTHS = {
    "slice": {
        **{"method": "modegpt", "keep": 0.9, "uniform": False, "heads": False},
        "width_multiple": 2,
    }
}
DROP = {"slice": {"method": "drop", "keep": 0.9}}
BLOCKS = {"slice": {"method": "slicegpt", "rotations": "block", "keep": 0.98}}
INT4 = {"quantize": {"method": "rtn", "bits": 4, "group_size": 16}}

CASES: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {
    "llama-dropped-layer": (LLAMA, [DROP]),
    "llama-tied-quantized-embedding": (
        {**LLAMA, "tie_word_embeddings": True},
        [SHARED, {"quantize": {"method": "rtn", "targets": [], "embeddings": "int8"}}],
    ),
    "llama-widths-by-layer": (LLAMA, [WIDTHS, KFAC, {"quantize": {"method": "rtn", "bits": 8}}]),
    "llama-rotated-blocks": (
        LLAMA,
        [
            BLOCKS,
            {"quantize": {"method": "rtn", "bits": 8, "embeddings": "int8", "lm_head": "int8"}},
        ],
    ),
    "llama-plain-integers": (LLAMA, [INT4]),
    "gemma2-caps": (
        {
            **{**LLAMA, "model_type": "gemma2"},
            **{"final_logit_softcapping": 2.0, "attn_logit_softcapping": 1.0, **SLIDING},
        },
        [SVD],
    ),
    "gemma3-sliding": (
        {
            **{**LLAMA, "model_type": "gemma3_text", **SLIDING},
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
        [SVD],
    ),
    "opt": (OPT, [KFAC]),
    "mixtral": (MIXTRAL, [SVD]),
    "mixtral-attention-alone": (
        MIXTRAL,
        [{"decompose": {"method": "svd-llm", "keep": 0.6, "targets": ["*self_attn*"]}}],
    ),
}

WITH_BASELINES = {"llama-tied-quantized-embedding", "gemma2-caps", "opt", "mixtral"}
PREPARED: dict[tuple[Path, str], Prepared] = {}
"""The last recipe, which several runs evaluate in different ways."""

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def text(tiny_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """File of about a thousand tokens, which are tokenized many times."""
    path = tmp_path_factory.mktemp("short") / "text.txt"
    path.write_text(tiny_text.read_text(encoding="utf-8")[:3000], encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def write_in(
    text: Path,
    tiny_recipe: Callable[..., Path],
    make_tokenizer: Callable[..., PreTrainedTokenizerFast],
) -> Callable[..., Path]:
    """Write a random model to a folder, and a recipe that compresses it to ``run``."""

    def write(folder: Path, config: dict[str, Any], stages: list[dict[str, Any]]) -> Path:
        options = dict(config)
        source = folder / "source"
        with torch.random.fork_rng():
            torch.manual_seed(0)
            made = AutoConfig.for_model(options.pop("model_type"), **options)
            model = AutoModelForCausalLM.from_config(made, dtype=torch.float32)
        model.to(torch.bfloat16).save_pretrained(source)
        make_tokenizer(bos="gemma" in config["model_type"]).save_pretrained(source)
        texts = [
            {"source": str(text), "name": "long", "window": 32, "windows": 5},
            {"source": str(text), "name": "short", "window": 20, "windows": 3},
        ]
        baselines = ["int4-g16", "sparse"]
        evaluate = {"perplexity": texts, "kl_tokens": 100, "baselines": baselines}
        return tiny_recipe(source, folder / "run", stages=stages, evaluate=evaluate)

    return write


@pytest.fixture
def write(tmp_path: Path, write_in: Callable[..., Path]) -> Callable[..., Path]:
    return partial(write_in, tmp_path)


@pytest.fixture(scope="module")
def finished(write_in: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Recipe of a model that has been compressed, and evaluated as a whole."""
    recipe = write_in(tmp_path_factory.mktemp("finished"), LLAMA, [KFAC])
    run(recipe, "never")
    return recipe


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    """Recipe of a copy of a finished run."""
    shutil.copytree(finished.parent, tmp_path, dirs_exist_ok=True)
    recipe = tmp_path / finished.name
    recipe.write_text(finished.read_text().replace(str(finished.parent), str(tmp_path)))
    return recipe


def run(recipe: Path, streaming: str, *overrides: str, **options: Any) -> dict[str, Any]:
    """Run a recipe, or only its evaluation if the rest is there."""
    for path in (recipe.parent / "run").glob("work/evaluation-*"):
        path.unlink()
    (recipe.parent / "run/report.json").unlink(missing_ok=True)
    loaded = load_recipe(recipe, [f"evaluate.streaming={streaming}", *overrides])
    key = recipe, recipe.read_text(encoding="utf-8")
    if key not in PREPARED:
        PREPARED.clear()
        PREPARED[key] = prepare(loaded.recipe, STAGES)
    prepared = replace(PREPARED[key], recipe=loaded.recipe)
    result: dict[str, Any] = compress(loaded, Machine("cpu", **options), prepared)["evaluation"]
    return result


def leaves(value: Any, key: str = "") -> dict[str, Any]:
    """Return the leaves of nested JSON values by their paths."""
    if not isinstance(value, dict | list):
        return {key: value}
    parts = value.items() if isinstance(value, dict) else enumerate(value)
    return {k: v for name, part in parts for k, v in leaves(part, f"{key}/{name}").items()}


def refuse(*_: Any, **__: Any) -> NoReturn:
    raise AssertionError("a whole model is loaded")


@pytest.mark.parametrize("case", CASES)
def test_scores_are_those_of_whole_models(
    write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    monkeypatch.setitem(BATCH_TOKENS, "cpu", 64)  # several windows in a batch, the last alone
    recipe = write(*CASES[case])
    few = [] if case in WITH_BASELINES else ["evaluate.baselines=[]"]
    expected = leaves(run(recipe, "never", *few))
    monkeypatch.setattr(ModelVersions, "load_dense", refuse)
    monkeypatch.setattr(run_evaluation, "load_checkpoint", refuse)
    found = leaves(run(recipe, "always", *few))
    assert found.keys() == expected.keys()
    assert expected["/kl/long/forward"] > 1e-4
    assert few or expected["/baselines/1/perplexity/short"] is not None
    for key, value in expected.items():
        if isinstance(value, float):
            assert found[key] == pytest.approx(value, rel=1e-4, abs=1e-6), key
        else:
            assert found[key] == value, key
    assert not list((recipe.parent / "run/work").glob("evaluation*.live"))


def test_each_layer_is_read_once_and_one_layer_is_in_memory(
    write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write({**LLAMA, "num_hidden_layers": 5}, [KFAC])
    run(recipe, "never")
    reads: Counter[str] = Counter()
    alive, peak = 0, 0

    def counted(cls: Any, model: str) -> None:
        read = cls.read

        def counting(self: Any, name: str, **options: Any) -> Any:
            reads[f"{model}: {name}"] += 1
            return read(self, name, **options)

        monkeypatch.setattr(cls, "read", counting)

    def free(n_bytes: int) -> None:
        nonlocal alive
        alive -= n_bytes

    def set_and_count(owner: Any, leaf: str, tensor: torch.Tensor) -> None:
        nonlocal alive, peak
        before = getattr(owner, leaf)
        set_(owner, leaf, tensor)
        held = getattr(owner, leaf)
        if not held.is_meta and held is not before:  # a table of positions stays
            alive += held.nbytes
            peak = max(peak, alive)
            finalize(held, free, held.nbytes)

    set_ = weights._set
    monkeypatch.setattr(weights, "_set", set_and_count)
    counted(WeightReader, "dense")
    counted(CheckpointFiller, "compressed")
    monkeypatch.setattr(ModelVersions, "load_dense", refuse)
    monkeypatch.setattr(run_evaluation, "load_checkpoint", refuse)
    run(recipe, "always")

    for model, folder in (("dense", "source"), ("compressed", "run/checkpoint")):
        stored = [name for name in read_folder(recipe.parent / folder) if ".layers." in name]
        assert {name: reads[f"{model}: {name}"] for name in stored} == dict.fromkeys(stored, 1)
    head = 512 * 32 + 32  # with the last norm
    layer = 2 * 32 * (32 + 16) + 3 * 32 * 48 + 2 * 32
    assert alive == 0
    # Both heads at once, or an embedding, or one layer.
    assert 4 * max(head, layer) <= peak <= 4 * 2 * head
    assert peak < 4 * (2 * head + 5 * layer) / 2  # of the dense model


def test_it_is_chosen_where_whole_models_do_not_fit(
    copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []

    def on_step(stage: str, done: int, total: int) -> None:
        seen.append(stage)

    whole = run(copied, "auto", on_step=on_step)
    assert "evaluate layer by layer" not in seen
    monkeypatch.setattr(run_evaluation, "free_memory", lambda device: 1000)
    found = run(copied, "auto", on_step=on_step)
    assert seen.count("evaluate layer by layer") == 2 * 3
    assert found["perplexity"]["long"]["compressed"] == pytest.approx(
        whole["perplexity"]["long"]["compressed"], rel=1e-4
    )


def test_what_needs_whole_models_is_measured_or_its_reason_given(
    copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = ["evaluate.generations={prompts: [def], tokens: 4}", "evaluate.baselines=[]"]
    result = run(copied, "always", *more)
    assert result["missing"] == []
    assert result["generations"][0]["prompt"] == "def"
    with monkeypatch.context() as patch:
        patch.setattr(streaming_rule, "free_memory", lambda device: 1000)
        patch.setattr("lrc.compressors.evaluate.side_by_side.free_memory", lambda device: 1000)
        patch.setattr("lrc.compressors.prepare.check_tasks", lambda tasks: None)
        patch.setattr(pipeline, "check_evaluation", lambda *_, **__: None)
        patch.setattr(pipeline, "_check_source", lambda session: None)
        patch.setattr(ModelVersions, "load_dense", refuse)
        with pytest.raises(EvaluationIncomplete) as incomplete:
            run(copied, "always", *more, "evaluate.tasks=[arc_easy]")
    evaluation = incomplete.value.report["evaluation"]
    assert evaluation["perplexity"] == result["perplexity"]
    reasons = {f"{m['model']} {m['metric']}": m["reason"] for m in evaluation["missing"]}
    assert reasons.keys() == {
        *("dense tasks.arc_easy", "compressed tasks.arc_easy", "compressed generations.0")
    }
    assert "the dense model does not fit into memory" in reasons["dense tasks.arc_easy"]
    assert "lm-eval tasks need the whole model" in reasons["compressed tasks.arc_easy"]
    assert "both models do not fit" in reasons["compressed generations.0"]


def test_it_can_be_stopped_and_starts_again(copied: Path) -> None:
    recipe = copied
    expected = run(recipe, "always")
    recipe.write_text(
        recipe.read_text().replace("samples: 4", "samples: 4\n  memory_limit_gib: 1.0e-06")
    )
    buffer = recipe.parent / "run/work/evaluation.live"

    def stop(stage: str, done: int, total: int) -> None:
        if stage == "evaluate layer by layer" and done == 4:
            # Four bytes x tokens x width for both models and two baselines.
            assert buffer.stat().st_size == 4 * (5 * 32 + 3 * 20) * 32 * 4
            raise Stopped("requested")

    with pytest.raises(Stopped):
        run(recipe, "always", on_step=stop)
    assert not buffer.exists()
    assert run(recipe, "always") == expected


def test_damaged_weights_are_found_when_they_are_loaded(copied: Path) -> None:
    checkpoint = copied.parent / "run/checkpoint"
    header = read_folder(checkpoint)["model.layers.1.input_layernorm.weight"]
    with header.file.open("r+b") as file:
        file.seek(header.offset)
        file.write(b"\xff" * header.nbytes)  # NaN
    with pytest.raises(CheckpointError, match=r"changed|differs|damaged"):
        run(copied, "always")
    shutil.rmtree(checkpoint / "lrc")  # as after save_pretrained: no hashes
    files = checkpoint_layers.open_checkpoint(checkpoint, dtype=torch.float32)
    with pytest.raises(CheckpointError, match=r"layers.1.input_layernorm.weight is not finite"):
        files.reader.fill_("model.layers.1", device="cpu", dtype=torch.float32)


def test_lrc_eval_reads_all_checkpoints_layer_by_layer(
    finished: Path,
    lrc: Callable[..., Any],
    text: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source, result = finished.parent / "source", finished.parent / "run/checkpoint"
    texts = ["--perplexity", text, "--window", 32, "--windows", 5, "--kl-tokens", 100]
    options = [*texts, "--device", "cpu", "--json", "-q"]

    def measured(streaming: str) -> dict[str, Any]:
        done = lrc("eval", source, result, *options, "--streaming", streaming)
        assert done.code == 0, done.err
        return leaves(json.loads(done.out))

    expected = measured("never")
    monkeypatch.setattr(whole_models, "load_checkpoint", refuse)
    found = measured("always")
    assert found.keys() == expected.keys()
    assert any("/kl/" in key for key in found)
    for key, value in expected.items():
        assert found[key] == (
            pytest.approx(value, rel=1e-4, abs=1e-6) if isinstance(value, float) else value
        ), key
    monkeypatch.setattr("lrc.cli.evaluate.free_memory", lambda device: 1000)
    assert measured("auto") == found
