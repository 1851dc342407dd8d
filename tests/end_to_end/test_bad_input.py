"""A recipe, text or name that cannot be used: one clear error each, and nothing half-written."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lrc.compressors.models.weights import WeightReader

FILES: dict[str, tuple[bytes, tuple[str, ...]]] = {
    "empty": (b"", ("is empty", "lrc recipes show svd-llm")),
    "only a comment": (b"# later\n", ("is empty",)),
    "binary": (b"model: \xff\xfe\x00", ("not UTF-8", "byte 7")),
    "not YAML": (b"model: [a", (":1:10: not valid YAML", "closing ']' is missing")),
    "a list": (b"- model: a\n", ("must be a mapping", "got a list of 1 entry", "model: ...")),
    "one key twice": (
        b"model: a\nstages: [{decompose: {method: svd, keep: 1}}]\noutput: o\nmodel: b\n",
        (":4: model: given twice, first in line 1; remove one",),
    ),
}


@pytest.mark.parametrize("case", FILES)
def test_a_file_that_is_no_recipe(lrc, tmp_path: Path, case: str) -> None:
    content, words = FILES[case]
    path = tmp_path / "bad.yaml"
    path.write_bytes(content)
    for command in ("compress", "plan"):
        lrc(command, path).refuses(2, str(path), *words)
    assert os.listdir(tmp_path) == ["bad.yaml"]


def test_a_recipe_that_is_not_there(lrc, recipe: Path, tmp_path: Path) -> None:
    lrc("compress", tmp_path / "no.yaml").refuses(2, "no.yaml: no such file", "lrc recipes list")
    lrc("compress", tmp_path / "uot.yaml").refuses(2, "did you mean", "out.yaml")
    lrc("compress", "svd-llm").refuses(2, "lrc recipes copy svd-llm")
    lrc("compress", tmp_path).refuses(2, "is a folder", "out.yaml")


OVERRIDES: dict[str, tuple[str, tuple[str, ...]]] = {
    "misspelt key": ("stages.0.decompose.kep=0.5", ("unknown key; did you mean 'keep'?",)),
    "unknown key": ("nonsense=1", ("unknown key", "Allowed: model, calibration, stages")),
    "wrong type": ("calibration.samples=many", ("must be a whole number >= 1, got 'many'",)),
    "keep above 1": ("stages.0.decompose.keep=1.2", ("in (0, 1], got 1.2; lower it",)),
    "keep 0": ("stages.0.decompose.keep=0", ("in (0, 1], got 0; raise it",)),
    "keep below 0": ("stages.0.decompose.keep=-0.5", ("in (0, 1], got -0.5",)),
    "keep not finite": ("stages.0.decompose.keep=.nan", ("keep", "finite")),
    "unknown method": ("stages.0.decompose.method=svdllm", ("did you mean 'svd-llm'?",)),
    "no stage": ("stages=[]", ("stages: must have at least 1 entry",)),
    "no key and value": ("keep", ("must be key.path=value",)),
    "a stage that is not there": ("stages.3.decompose.keep=0.5", ("there is no stages[3]",)),
    "a model that is not there": ("model=no/such/model", ("no file or folder", "check the path")),
    "a tokenizer that is not there": ("model.tokenizer=./no", ("model.tokenizer: no folder",)),
    "no such text": (
        "calibration.source=no.jsonl",
        ("calibration.source: no such file: no.jsonl",),
    ),
    "a text of no known kind": ("calibration.source=wikitxt2", ("did you mean 'wikitext2'?",)),
    "a folder as text": ("calibration.source=.", ("is a folder; give a .jsonl or .txt file",)),
    "no text to evaluate on": (
        "evaluate.perplexity.0.source=no.txt",
        ("evaluate.perplexity.source: no such file: no.txt",),
    ),
    "longer than the context": (
        "calibration.length=257",
        ("calibration.length: must be at most 256, the model's context, got 257; lower length",),
    ),
    "a window longer than the context": (
        "evaluate.perplexity.0.window=300",
        ("evaluate.perplexity[0].window: must be at most 256", "got 300; lower window"),
    ),
    "a target of nothing": (
        "stages.0.decompose.targets=['*.q_porj']",
        ("targets: the pattern '*.q_porj' matches no linear", "did you mean '*.q_proj'?"),
    ),
    "an ignore of nothing": (
        "stages.0.decompose.ignore=['*.router']",
        ("ignore: the pattern '*.router' matches no linear", "the last parts are q_proj, k_proj"),
    ),
    "a rank too large": (
        "stages.0.decompose.overrides=[{match: '*.k_proj', rank: 17}]",
        ("overrides[0].rank: must be in [1, 16]", "got 17; lower rank", "1 more of this kind"),
    ),
    "nothing to gain": ("stages.0.decompose.keep=0.001", ("nothing would be smaller",)),
    "a gate on nothing": (
        "evaluate.gates=[{metric: perplexity.englsh, at_most: 1}]",
        ("evaluate.gates[0].metric", "did you mean 'perplexity.english'?"),
    ),
    "tasks from nowhere": (
        "evaluate.tasks={names: [a], include_path: nowhere}",
        ("evaluate.tasks.include_path: no such folder: nowhere",),
    ),
}


@pytest.mark.parametrize("case", OVERRIDES)
def test_what_a_recipe_cannot_ask_for(
    lrc, recipe: Path, output: Path, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(recipe.parent)
    override, words = OVERRIDES[case]
    lrc("compress", recipe, override).refuses(2, *words)
    assert not output.exists()


BUDGETS: dict[str, tuple[str, tuple[str, ...]]] = {
    "a multiple beyond every rank": (
        "{method: svd, keep: 0.6, rank_multiple: 64}",
        ("decompose.rank_multiple: must be in [1, 19]", "got 64; lower rank_multiple"),
    ),
    "a multiple that leaves everything dense": (
        "{method: svd, keep: 0.3, rank_multiple: 16}",
        ("nothing would be smaller; lower 'rank_multiple'",),
    ),
    "a multiple above the budget": (
        "{method: kfac, keep: 0.3, rank_multiple: 16}",
        ("decompose.keep: must be at least 0.7587 of the bits", "lower 'rank_multiple' (16)"),
    ),
    "a multiple above the multiply-adds": (
        "{method: kfac, keep: 0.3, rank_multiple: 16, measure: macs}",
        ("of the multiply-adds, which the cheapest", "lower 'rank_multiple' (16)"),
    ),
    "a floor above the budget": (
        "{method: kfac, keep: 0.3, min_keep: 0.4}",
        ("'min_keep' must be at most 'keep', 0.3, got 0.4; lower min_keep or raise keep",),
    ),
    "a floor that multiples lift above the budget": (
        "{method: kfac, keep: 0.4, min_keep: 0.39, rank_multiple: 7}",
        ("must be at least 0.5693 of the bits", "'rank_multiple' (7), lower 'min_keep' (0.39)"),
    ),
    "a floor between two ranks": (
        "{method: svd, keep: 0.6, min_keep: 0.59, rank_multiple: 4}",
        ("min_keep: model.layers.0.", "keeps between 0.59 and 0.6", "lower min_keep or rank_"),
    ),
    "a cap without predictions": (
        "{method: svd, keep: 0.6, max_loss: 0.1}",
        ("max_loss: needs allocation: lagrangian, which predicts losses, got uniform",),
    ),
    "overrides above the budget": (
        "{method: kfac, keep: 0.3, overrides: [{match: '*.mlp.*', keep: 0.9}]}",
        ("must be at least", "beside what the overrides fix", "lower the budgets of 'overrides'"),
    ),
    "a size below the rest": (
        "{method: kfac, size: 60kB}",
        ("decompose.size: must be above 72,309 bytes, which what is not targeted takes", "60kB"),
    ),
    "a size barely above the rest": (
        "{method: kfac, size: 73kB}",
        ("decompose.size: must be at least", "bytes, which the cheapest choice takes"),
    ),
    "a size above the dense model": (
        "{method: kfac, size: 1MiB}",
        ("below the 98,769 of the dense model, got 1MiB (1,048,576); lower size",),
    ),
    "a size in multiply-adds": (
        "{method: kfac, size: 90kB, measure: macs}",
        ("'size' counts bytes and cannot be measured in 'macs'; give 'keep' instead",),
    ),
    "compensation of a shared factor": (
        "{method: basis-sharing, keep: 0.6, compensate: {}}",
        ("decompose.compensate: must be",),
    ),
    "compensation beside a bias": (
        "{method: lord, keep: 0.6, compensate: {}}",
        ("decompose.method: lord cannot stand beside 'compensate'",),
    ),
    "a group of more layers than there are": (
        "{method: basis-sharing, keep: 0.6, layers_per_group: 3}",
        ("layers_per_group: must be in [2, 2], the number of layers, got 3; lower layers_per",),
    ),
}


@pytest.mark.parametrize("case", BUDGETS)
def test_budgets_that_cannot_be_met_are_refused_before_any_weight_is_read(
    lrc, recipe: Path, output: Path, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage, words = BUDGETS[case]
    monkeypatch.setattr(WeightReader, "read", None)
    for command in ("plan", "compress"):
        lrc(command, recipe, f"stages=[{{decompose: {stage}}}]").refuses(2, *words)
    assert not output.exists()


ROUNDINGS: dict[str, tuple[str, tuple[str, ...]]] = {
    "groups of factors": (
        "{decompose: {method: svd, keep: 0.8}}, {quantize: {method: gqsa, group_size: 8}}",
        (
            "stages[1].quantize.method: gqsa removes groups of linears that no earlier stage "
            "factors, got model.layers.0.self_attn.q_proj and 13 more of stages[0]; list them "
            "under 'ignore', or round them with method: gptq",
        ),
    ),
    "groups that fill no row": (
        "{quantize: {method: gqsa, group_size: 5}}",
        ("quantize.group_size: must divide the rows that it cuts into groups, got 5",),
    ),
    "groups without a size": (
        "{quantize: {method: gqsa}}",
        ("error[conflicting-keys]", "stages[0].quantize: ", "'group_size'"),
    ),
    "a share of groups of what keeps all": (
        "{quantize: {method: rtn, sparsity: 0.5}}",
        ("error[conflicting-keys]", "stages[0].quantize: ", "'sparsity'"),
    ),
}


@pytest.mark.parametrize("case", ROUNDINGS)
def test_rounding_that_cannot_be_is_refused_before_any_weight_is_read(
    lrc, recipe: Path, output: Path, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages, words = ROUNDINGS[case]
    monkeypatch.setattr(WeightReader, "read", None)
    for command in ("plan", "compress"):
        lrc(command, recipe, f"stages=[{stages}]").refuses(2, *words)
    assert not output.exists()


def test_a_cap_on_losses_that_no_budget_allows(lrc, recipe: Path, output: Path) -> None:
    """Only the weights tell: the last moment before they are factored."""
    stage = "{method: svd, keep: 0.2, allocation: lagrangian, max_loss: 0.0001}"
    words = ("keep: must be at least", "got 0.2; raise keep, raise 'max_loss' (0.0001)")
    lrc("compress", recipe, f"stages=[{{decompose: {stage}}}]", "-q").refuses(2, *words)
    assert not (output / "work/factors").exists()
    assert not (output / "plan.json").exists()


def of_first(**changes: Any) -> Callable[[dict[str, Any]], object]:
    return lambda plan: plan["matrices"][0].update(changes)


PLANS: dict[str, tuple[Callable[[dict[str, Any]], object], tuple[str, ...]]] = {
    "a matrix missing": (lambda plan: plan["matrices"].pop(0), ("q_proj: is targeted but not",)),
    "an unknown name": (
        lambda plan: plan["matrices"].append({**plan["matrices"][0], "name": "model.layers.9.up"}),
        ("model.layers.9.up: is no linear of a decoder layer of this model",),
    ),
    "another shape": (of_first(shape=[64, 32]), ("must have the shape [32, 32] of the model",)),
    "a rank too large": (of_first(rank=40), ("rank must be in [1, 32] for [32, 32], got 40",)),
    "a rank that saves nothing": (
        of_first(rank=20),
        ("low_rank of rank 20 takes as much as the dense matrix; lower rank to at most 15",),
    ),
    "an unknown form": (of_first(form="wavelet"), ("form must be one of dense, low_rank",)),
    "a form of another method": (
        of_first(form="sparse", nonzeros=100),
        ("form must be dense or low_rank or pivoted_low_rank here, got sparse",),
    ),
    "a form without its size": (
        of_first(form="sparse"),
        ("nonzeros must be a whole number for sparse, got None",),
    ),
    "no list": (lambda plan: plan.pop("matrices"), ("holds no list 'matrices'",)),
}


@pytest.mark.parametrize("case", PLANS)
def test_a_plan_that_does_not_fit_the_model(
    lrc, recipe: Path, output: Path, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil, words = PLANS[case]
    plan = json.loads(lrc("plan", recipe, "--json").out)
    spoil(plan)
    file = recipe.with_name("plan.json")
    file.write_text(json.dumps(plan))
    monkeypatch.setattr(WeightReader, "read", None)
    given = f"stages=[{{decompose: {{method: svd-llm, plan: {file}}}}}]"
    for command in ("plan", "compress"):
        lrc(command, recipe, given).refuses(2, str(file), *words)
    assert not output.exists()


def test_a_plan_that_is_none(lrc, recipe: Path, output: Path) -> None:
    file = recipe.with_name("plan.json")
    given = f"stages=[{{decompose: {{method: svd-llm, plan: {file}}}}}]"
    remedy = "name the plan.json that an earlier run of lrc compress wrote"
    lrc("compress", recipe, given).refuses(2, f"{file} cannot be read: no such file", remedy)
    file.write_bytes(b"\xff\x00")
    lrc("compress", recipe, given).refuses(2, f"{file} is not JSON", remedy)
    file.write_text('{"matrices": [')
    lrc("compress", recipe, given).refuses(2, f"{file} is not JSON", remedy)
    assert not output.exists()


def test_a_model_that_is_neither_here_nor_on_the_hub(lrc, recipe: Path, output: Path) -> None:
    words = ("'no-such/model' is not a local folder and could not be fetched", "check the name")
    lrc("compress", recipe, "model=no-such/model").refuses(1, "model.path", *words)
    lrc("compress", recipe, "model.tokenizer=no-such/model").refuses(1, "model.tokenizer", *words)
    assert not output.exists()


def test_an_unknown_task_is_refused_before_the_work(
    lrc, recipe: Path, output: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lrc.compressors.evaluate import harness

    find = harness._manager  # lm-eval's own index takes ten seconds and is tested elsewhere
    monkeypatch.setattr(harness, "_manager", lambda folder, defaults: find(folder, False))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "mine.yaml").write_text("task: my_task\ndataset_path: json\n")
    tasks = f"evaluate.tasks={{names: [my_tsk], include_path: {tmp_path / 'tasks'}}}"
    lrc("compress", recipe, tasks).refuses(2, "unknown task 'my_tsk'", "did you mean 'my_task'?")
    assert not output.exists()


def test_all_that_is_wrong_is_said_at_once(lrc, recipe: Path, output: Path) -> None:
    lrc("compress", recipe, "seed=x", "calibration.length=0", "tokens=1").refuses(
        2, "seed", "calibration.length", "tokens: unknown key", count=3
    )
    lrc(
        "compress", recipe, "calibration.source=a.txt", "evaluate.perplexity.0.source=b.txt"
    ).refuses(2, "a.txt", "b.txt", count=2)
    overrides = (
        "calibration.length=257",
        "evaluate.perplexity.0.window=258",
        "stages.0.decompose.ignore=['*.router']",
        "evaluate.gates=[{metric: perplexity.french, at_most: 9}]",
    )
    lrc("compress", recipe, *overrides).refuses(
        2, "got 257", "got 258", "'*.router'", "perplexity.french", count=4
    )
    assert not output.exists()


TEXTS: dict[str, tuple[bytes, tuple[str, ...]]] = {
    "empty.txt": (b"", ("the file is empty; give a file with text",)),
    "blank.txt": (b" \n\n \n", ("holds no text",)),
    "binary.txt": (b"\x00\x01\xff", ("must be UTF-8 text, got NUL bytes", "convert it")),
    "latin.txt": (b"caf\xe9", ("got byte 0xe9 at offset 3",)),
    "short.txt": (b"a few words", ("holds", "tokens", "lower")),
    "empty.jsonl": (b"", ("the file is empty",)),
    "binary.jsonl": (b'{"text": "\x00"}', ("must be UTF-8 text, got NUL bytes",)),
    "bad.jsonl": (b'{"text": "a"}\n{"text"\n', ("line 2: must be one JSON object",)),
    "other.jsonl": (b'{"body": "a"}\n', ("line 1: no key 'text'; got 'body'", "under 'field'")),
}


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize("key", ["calibration.source", "evaluate.perplexity.0.source"])
def test_texts_that_cannot_be_used_are_refused_before_the_work(
    lrc, recipe: Path, output: Path, name: str, key: str, tmp_path: Path
) -> None:
    content, words = TEXTS[name]
    (tmp_path / name).write_bytes(content)
    lrc("compress", recipe, f"{key}={tmp_path / name}").refuses(1, *words)
    left = {f.name for f in output.rglob("*")}
    assert left <= {"work", "lock", "run.json", "seconds.json"}


def test_too_few_tokens_for_calibration(lrc, recipe: Path, output: Path) -> None:
    ended = lrc("compress", recipe, "calibration.samples=9999")
    ended.refuses(1, "9,999 x 64 = 639,936; lower calibration.samples to at most")
    assert not (output / "checkpoint").exists()
    # What the message asks for needs no --overwrite: nothing of that run is worth keeping.
    assert lrc("compress", recipe, "calibration.samples=5", "-q").code == 0


def test_a_tokenizer_of_another_model(
    lrc, tiny_llama: Callable[..., Any], make_tokenizer: Callable[..., Any], recipe: Path
) -> None:
    model = recipe.parent / "small"
    tiny_llama(vocab_size=300).save_pretrained(model)
    make_tokenizer().save_pretrained(model)
    words = ("model.tokenizer: the tokenizer gives token", "the model has 300 tokens", "belongs")
    lrc("compress", recipe, f"model={model}").refuses(1, *words)
    lrc("compress", recipe, f"model={model}", "evaluate={}").refuses(1, *words)


def test_a_window_with_bos_that_leaves_a_table_of_positions(
    lrc, make_tokenizer: Callable[..., Any], recipe: Path
) -> None:
    from transformers import OPTConfig, OPTForCausalLM

    sizes = {"hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 48, "num_hidden_layers": 1}
    config = OPTConfig(vocab_size=512, num_attention_heads=4, max_position_embeddings=64, **sizes)
    OPTForCausalLM(config).save_pretrained(recipe.parent / "opt")
    make_tokenizer(bos=True).save_pretrained(recipe.parent / "opt")
    run = ("compress", recipe, f"model={recipe.parent / 'opt'}", "-q")
    lrc(*run, "evaluate.perplexity.0.window=64").refuses(2, "must be at most 63", "64 positions")
    assert lrc(*run, "evaluate.perplexity.0.window=63").code == 0
