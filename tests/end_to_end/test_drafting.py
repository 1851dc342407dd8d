"""`lrc eval --draft`, drafters that read their embedding from the parent, and their budgets."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, LlamaForCausalLM

import lrc as library
from lrc.configs.errors import CheckpointError

FACTORS = {"decompose": {"method": "svd-llm", "keep": 0.6}}
INTEGERS = {"quantize": {"method": "rtn", "bits": 8}}
DRAFTER = {
    "method": "mixed",
    "components": ["dense"],
    "schemes": ["int8", "int4-g16", "int3-g16"],
    "drafter": [0.3, 0.6],
}


@pytest.fixture(scope="module")
def checkpoint(run_stages: Callable[..., Any]) -> Path:
    """Return a checkpoint of factors of the tiny model."""
    return Path(run_stages(FACTORS)[1]) / "checkpoint"


@pytest.fixture
def shared(
    lrc: Callable[..., Any], checkpoint: Path, tiny_model_folder: Path, tmp_path: Path
) -> Path:
    """Return the same checkpoint without embedding and head."""
    return export(lrc, checkpoint, tiny_model_folder, tmp_path / "shared")


def export(lrc: Callable[..., Any], folder: Path, parent: Path, out: Path) -> Path:
    ended = lrc("export", folder, out, "--format", "drafter", "--parent", parent)
    assert ended.code == 0, ended.err
    return out


def load(folder: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)


def equal(one: Any, other: Any) -> bool:
    pairs = zip(one.state_dict().items(), other.state_dict().items(), strict=True)
    return all(a[0] == b[0] and torch.equal(a[1], b[1]) for a, b in pairs)


def test_a_drafter_is_measured_with_its_parent(
    lrc: Callable[..., Any], checkpoint: Path, tiny_model_folder: Path, tiny_text: Path
) -> None:
    command = ["eval", tiny_model_folder, "--draft", checkpoint, "--perplexity", tiny_text]
    command += ["--draft-tokens", 3, "--prompts", 2, "--prompt", 16, "--tokens", 12]
    ended = lrc(*command, "--device", "cpu", "--json")
    assert ended.code == 0, ended.err
    assert "drafting: 4 of 4" in ended.err
    found = json.loads(ended.out)
    assert found["settings"]["repeats"] == 1
    assert found["exact"] == {"static caches": {"texts": 2, "differ": []}}
    assert len(found["acceptance"][tiny_text.stem]["by_position"]) == 3
    memory = found["memory"]
    assert memory["together"] == memory["parent"] + memory["drafter"] - memory["shared"]


def test_the_table_says_what_was_measured(
    lrc: Callable[..., Any], tiny_model_folder: Path, shared: Path, tiny_text: Path
) -> None:
    command = ["eval", tiny_model_folder, "--draft", shared, "--perplexity", tiny_text]
    command += ["--draft-tokens", 2, "--prompts", 1, "--prompt", 8, "--tokens", 4]
    ended = lrc(*command, "--repeats", 1, "--device", "cpu")
    assert ended.code == 0, ended.err
    for text in ("draft 2", "tokens per round", "with drafter", "the same tokens", "together"):
        assert text in ended.out


def test_other_tokens_are_refused_before_a_weight_is_read(
    lrc: Callable[..., Any],
    tiny_model_folder: Path,
    tiny_llama: Callable[..., LlamaForCausalLM],
    make_tokenizer: Callable[..., Any],
    tiny_text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def loads(*_: Any, **__: Any) -> None:
        raise AssertionError("loaded")

    monkeypatch.setattr("lrc.cli.eval_draft.load_model", loads)
    larger, renamed = tmp_path / "larger", tmp_path / "renamed"
    tiny_llama(vocab_size=520).save_pretrained(larger)
    make_tokenizer().save_pretrained(larger)
    shutil.copytree(tiny_model_folder, renamed)
    file = renamed / "tokenizer.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    vocabulary = content["model"]["vocab"]
    one, other = sorted(token for token in vocabulary if len(token) == 1)[:2]
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
    file.write_text(json.dumps(content), encoding="utf-8")
    for other_model, words in (
        (larger, "512 and 520 tokens"),
        (renamed, f"they differ in {one!r}"),
    ):
        ended = lrc("eval", tiny_model_folder, "--draft", other_model, "--perplexity", tiny_text)
        ended.refuses(2, words, code="other-tokenizer", where="--draft")
    # The embedding is that of the parent, of which `renamed` is a copy.
    ended = lrc(
        *("export", tiny_model_folder, tmp_path / "out"),
        "--format",
        "drafter",
        *("--parent", renamed),
    )
    ended.refuses(2, f"they differ in {one!r}", code="other-tokenizer", where="--parent")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--draft", "{model}"], "another model than the parent"),
        (["--draft", "x", "--tasks", "piqa"], "--tasks: cannot be combined"),
        (["--draft", "x", "--window", "2048"], "--window: cannot be combined"),
        (["--draft", "x", "--tokens", "3"], "must be at least 6"),
        (["--draft", "{other}", "--prompt", "250"], "the context of"),
        (["--draft", "x", "--kl-tokens", "32768"], "--kl-tokens: cannot be combined"),
        (["--draft", "x", "--streaming", "auto"], "--streaming: cannot be combined"),
        (["--draft", "x", "--seed", "0"], "--seed: cannot be combined"),
        (["--draft", "x", "--window", "64"], "--window: cannot be combined"),
        (["--prompts", "3"], "is an option of --draft"),
        (["--limit", "3"], "--limit: is an option of --tasks"),
        (["{model}", "--draft", "x"], "needs one model"),
        (["--streaming", "sometimes"], "--streaming: must be auto, always or never"),
    ],
)
def test_wrong_options_are_refused(
    lrc: Callable[..., Any],
    tiny_model_folder: Path,
    checkpoint: Path,
    tiny_text: Path,
    options: list[str],
    words: str,
) -> None:
    given = [each.format(model=tiny_model_folder, other=checkpoint) for each in options]
    lrc("eval", tiny_model_folder, *given, "--perplexity", tiny_text).refuses(2, words)


@pytest.mark.parametrize("stage", [FACTORS, INTEGERS], ids=["lrc", "plain"])
def test_a_shared_embedding_is_loaded_from_the_parent(
    lrc: Callable[..., Any],
    run_stages: Callable[..., Any],
    stage: dict[str, Any],
    tiny_model_folder: Path,
    tmp_path: Path,
) -> None:
    folder = Path(run_stages(stage)[1]) / "checkpoint"
    out = export(lrc, folder, tiny_model_folder, tmp_path / "shared")
    stored = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    left = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    assert stored - left > 0.9 * 2 * 512 * 32 * 2  # two matrices in bfloat16
    original, model = load(folder).dequantize() if stage is FACTORS else load(folder), load(out)
    tokens = torch.arange(2, 40)[None]
    with torch.inference_mode():
        assert torch.allclose(model(tokens).logits, original(tokens).logits, atol=1e-4)
    assert lrc("inspect", out, "--verify").code == 0


def test_a_drafter_and_its_parent_have_one_embedding_in_memory(
    shared: Path, checkpoint: Path, tiny_model_folder: Path, tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(shared, dtype=torch.bfloat16)
    parent = AutoModelForCausalLM.from_pretrained(tiny_model_folder, dtype=torch.bfloat16)
    assert library.share_embeddings(model, parent) == [
        "model.embed_tokens.weight",
        "lm_head.weight",
    ]
    model.save_pretrained(tmp_path / "complete")  # which has an embedding again
    assert equal(load(tmp_path / "complete"), load(checkpoint))


def test_the_decoder_alone_finds_its_embedding(shared: Path, checkpoint: Path) -> None:
    found, expected = (
        AutoModel.from_pretrained(folder, dtype=torch.float32) for folder in (shared, checkpoint)
    )
    assert torch.equal(found.embed_tokens.weight, expected.embed_tokens.weight)


def test_tied_weights_stay_tied(
    lrc: Callable[..., Any],
    tiny_llama: Callable[..., LlamaForCausalLM],
    make_tokenizer: Callable[..., Any],
    tmp_path: Path,
) -> None:
    parent, folder = tmp_path / "parent", tmp_path / "short"
    for path, layers in ((parent, 2), (folder, 1)):
        tiny_llama(tie_word_embeddings=True, num_hidden_layers=layers).save_pretrained(path)
        make_tokenizer().save_pretrained(path)
    embedding = load(parent).get_input_embeddings().weight
    short = load(folder)
    with torch.no_grad():
        short.get_input_embeddings().weight.copy_(embedding)
    short.save_pretrained(folder)
    out = export(lrc, folder, parent, tmp_path / "shared")
    found, loading = load(out, output_loading_info=True)
    assert not loading["missing_keys"]
    assert found.lm_head.weight is found.model.embed_tokens.weight
    assert equal(found, short)


def test_a_missing_or_different_parent_is_an_error(
    lrc: Callable[..., Any],
    shared: Path,
    tiny_llama: Callable[..., LlamaForCausalLM],
    tiny_model_folder: Path,
    tmp_path: Path,
) -> None:
    other, moved = tmp_path / "other", tmp_path / "moved"
    tiny_llama(seed=5).save_pretrained(other)
    shutil.copytree(tiny_model_folder, moved)
    with pytest.raises(CheckpointError, match="cannot be read") as gone:
        load(shared, parent_model=str(tmp_path / "nowhere"))
    with pytest.raises(CheckpointError, match="another model") as different:
        load(shared, parent_model=str(other))
    assert (gone.value.code, different.value.code) == ("missing-parent", "other-parent")
    assert equal(load(shared, parent_model=str(moved)), load(shared))
    lrc("export", shared, tmp_path / "dense", "--format", "dense").refuses(
        1, "uses that of its parent", code="cannot-export"
    )


def test_what_is_not_the_parents_cannot_be_shared(
    lrc: Callable[..., Any],
    checkpoint: Path,
    tiny_llama: Callable[..., LlamaForCausalLM],
    make_tokenizer: Callable[..., Any],
    tmp_path: Path,
) -> None:
    tiny_llama(seed=5).save_pretrained(tmp_path / "other")
    make_tokenizer().save_pretrained(tmp_path / "other")
    command = ["export", checkpoint, tmp_path / "out", "--format"]
    ended = lrc(*command, "drafter", "--parent", tmp_path / "other")
    ended.refuses(1, "nothing in common", code="cannot-export")
    lrc(*command, "drafter").refuses(2, "--parent: is needed", where="--parent")
    lrc(*command, "dense", "--parent", "x").refuses(2, "is an option of --format drafter")


def test_the_fastest_of_several_budgets_is_chosen(
    lrc: Callable[..., Any],
    run_stages: Callable[..., Any],
    executed: Callable[[Path], Any],
) -> None:
    plan = executed(Path(run_stages({"decompose": DRAFTER})[1]))
    assert [pair.keep for pair in plan.pairs] == [0.6, 0.3]
    assert [pair.chosen for pair in plan.pairs].count(True) == 1
    chosen = next(pair for pair in plan.pairs if pair.chosen)
    assert chosen.speed == max(pair.speed for pair in plan.pairs)
    assert plan.allocations[0].keep == chosen.keep
    assert plan.kept <= chosen.keep
    nats = sum(result.predicted_nats or 0 for result in plan.results.values())
    assert nats == pytest.approx(chosen.nats)
    assert chosen.cost == pytest.approx(plan.compressed_bytes / plan.dense_bytes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"keep": 0.5}, "exactly one of"),
        ({"drafter": [1, 0.5]}, "different budgets below 1"),
        ({"measure": "macs"}, "multiply-adds do not give"),
        ({"min_keep": 0.4}, "at most the smallest of 'drafter'"),
        ({"drafter": [0.5, 0.01]}, "drafter"),
    ],
)
def test_wrong_budgets_are_refused(
    plan_stages: Callable[..., Any], changes: dict[str, Any], words: str
) -> None:
    plan_stages({"decompose": {**DRAFTER, **changes}}).refuses(2, words)


def test_a_method_without_predicted_losses_is_refused(plan_stages: Callable[..., Any]) -> None:
    stage = {"method": "svd-llm", "allocation": "lagrangian", "drafter": [0.5, 0.4]}
    ended = plan_stages({"decompose": stage})
    ended.refuses(2, "a method that predicts losses", where="stages[0].decompose.drafter")
