"""A recipe, text or name that cannot be used: one clear error each, and nothing half-written."""

import os
from pathlib import Path

import pytest

from lrc.compressors.models.weights import WeightReader

FILES: dict[str, tuple[bytes, str, str, tuple[str, ...]]] = {
    "empty": (b"", "empty-recipe", "", ("lrc recipes show svd-llm",)),
    "only a comment": (b"# later\n", "empty-recipe", "", ()),
    "binary": (b"model: \xff\xfe\x00", "unreadable-recipe", "", ("UTF-8", "byte 7")),
    "not YAML": (b"model: [a", "invalid-yaml", ":1:10", ("closing ']' is missing",)),
    "a list": (b"- model: a\n", "wrong-type", "", ("got a list of 1 entry", "remove the '- '")),
    "one key twice": (
        b"model: a\nstages: [{decompose: {method: svd, keep: 1}}]\noutput: o\nmodel: b\n",
        "duplicate-key",
        ":1",
        ("model: ", "again in line 4"),
    ),
}


@pytest.mark.parametrize("case", FILES)
def test_files_that_are_not_recipes(lrc, tmp_path: Path, case: str) -> None:
    content, code, place, words = FILES[case]
    path = tmp_path / "bad.yaml"
    path.write_bytes(content)
    for command in ("compress", "plan"):
        lrc(command, path).refuses(2, f"{path}{place}: ", *words, code=code)
    assert os.listdir(tmp_path) == ["bad.yaml"]


def test_missing_recipes(lrc, recipe: Path, tmp_path: Path) -> None:
    code = "unreadable-recipe"
    lrc("compress", tmp_path / "no.yaml").refuses(2, "no.yaml", "lrc recipes list", code=code)
    lrc("compress", tmp_path / "uot.yaml").refuses(2, "did you mean", "out.yaml", code=code)
    lrc("compress", "svd-llm").refuses(2, "lrc recipes copy svd-llm", code=code)
    lrc("compress", tmp_path).refuses(2, "is a folder", "out.yaml", code=code)


OVERRIDES: dict[str, tuple[str, str, str, tuple[str, ...]]] = {
    "misspelt key": (
        "stages.0.decompose.kep=0.5",
        "unknown-key",
        "stages[0].decompose.kep",
        ("did you mean 'keep'?",),
    ),
    "unknown key": (
        "nonsense=1",
        "unknown-key",
        "nonsense",
        ("Allowed: model, calibration, stages",),
    ),
    "wrong type": (
        "calibration.samples=many",
        "wrong-type",
        "calibration.samples",
        ("> 0", "got 'many'"),
    ),
    "keep above 1": (
        "stages.0.decompose.keep=1.2",
        "out-of-range",
        "stages[0].decompose.keep",
        ("> 0 and <= 1", "got 1.2", "lower"),
    ),
    "keep 0": (
        "stages.0.decompose.keep=0",
        "out-of-range",
        "stages[0].decompose.keep",
        ("> 0 and <= 1", "got 0", "raise"),
    ),
    "keep below 0": (
        "stages.0.decompose.keep=-0.5",
        "out-of-range",
        "stages[0].decompose.keep",
        ("> 0 and <= 1", "got -0.5"),
    ),
    "keep not finite": (
        "stages.0.decompose.keep=.nan",
        "out-of-range",
        "stages[0].decompose.keep",
        ("finite",),
    ),
    "unknown method": (
        "stages.0.decompose.method=svdllm",
        "unknown-value",
        "stages[0].decompose.method",
        ("did you mean 'svd-llm'?",),
    ),
    "no stage": ("stages=[]", "out-of-range", "stages", ("at least 1 entry",)),
    "no key and value": ("keep", "invalid-override", "", ("key.path=value",)),
    "a stage that is not there": (
        "stages.3.decompose.keep=0.5",
        "invalid-override",
        "",
        ("stages[3]",),
    ),
    "a model that is not there": (
        "model=no/such/model",
        "invalid-recipe",
        "model.path",
        ("'no/such/model'", "check the path"),
    ),
    "a tokenizer that is not there": (
        "model.tokenizer=./no",
        "invalid-recipe",
        "model.tokenizer",
        ("'./no'",),
    ),
    "no such text": (
        "calibration.source=no.jsonl",
        "invalid-recipe",
        "calibration.source",
        ("no.jsonl",),
    ),
    "a text of no known kind": (
        "calibration.source=wikitxt2",
        "invalid-recipe",
        "calibration.source",
        ("did you mean 'wikitext2'?",),
    ),
    "a folder as text": (
        "calibration.source=.",
        "invalid-recipe",
        "calibration.source",
        ("is a folder",),
    ),
    "no text to evaluate on": (
        "evaluate.perplexity.0.source=no.txt",
        "invalid-recipe",
        "evaluate.perplexity.source",
        ("no.txt",),
    ),
    "longer than the context": (
        "calibration.length=257",
        "invalid-recipe",
        "calibration.length",
        ("256", "got 257", "lower length"),
    ),
    "a window longer than the context": (
        "evaluate.perplexity.0.window=300",
        "invalid-recipe",
        "evaluate.perplexity[0].window",
        ("256", "got 300", "lower window"),
    ),
    "a target of nothing": (
        "stages.0.decompose.targets=['*.q_porj']",
        "no-match",
        "stages[0].decompose.targets",
        ("'*.q_porj'", "did you mean '*.q_proj'?"),
    ),
    "an ignore of nothing": (
        "stages.0.decompose.ignore=['*.router']",
        "no-match",
        "stages[0].decompose.ignore",
        ("'*.router'", "the last parts are q_proj, k_proj"),
    ),
    "a rank too large": (
        "stages.0.decompose.overrides=[{match: '*.k_proj', rank: 17}]",
        "rank-out-of-range",
        "stages[0].decompose.overrides[0].rank",
        ("[1, 16]", "got 17", "lower rank", "1 more of this kind"),
    ),
    "nothing to gain": (
        "stages.0.decompose.keep=0.001",
        "nothing-smaller",
        "stages",
        ("(too small: rank 1 needs more than 0.1% of its bits)", "raise 'keep'"),
    ),
    "a gate on nothing": (
        "evaluate.gates=[{metric: perplexity.englsh, at_most: 1}]",
        "invalid-recipe",
        "evaluate.gates[0].metric",
        ("did you mean 'perplexity.english'?",),
    ),
    "a gate without a number": (
        "evaluate.gates=['perplexity.english <= low']",
        "unknown-value",
        "evaluate.gates[0]",
        ("must be a gate such as", "got 'perplexity.english <= low'"),
    ),
    "a text shorter than its windows": (
        "evaluate.perplexity=[{source: python-docs, tokens: 1000}]",
        "conflicting-keys",
        "evaluate.perplexity[0]",
        ("'tokens' must be at least 'window', 2,048, got 1,000", "lower 'window'"),
    ),
    "tasks from nowhere": (
        "evaluate.tasks={names: [a], include_path: nowhere}",
        "invalid-recipe",
        "evaluate.tasks.include_path",
        ("nowhere",),
    ),
}


@pytest.mark.parametrize("case", OVERRIDES)
def test_invalid_values_in_a_recipe(
    lrc, recipe: Path, output: Path, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(recipe.parent)
    override, code, where, words = OVERRIDES[case]
    lrc("compress", recipe, override).refuses(2, *words, code=code, where=where)
    assert not output.exists()


BUDGETS: dict[str, tuple[str, str, str, tuple[str, ...]]] = {
    "a multiple beyond every rank": (
        "{method: svd, keep: 0.6, rank_multiple: 64}",
        "out-of-range",
        "stages[0].decompose.rank_multiple",
        ("[1, 19]", "got 64", "lower rank_multiple"),
    ),
    "a multiple that leaves everything dense": (
        "{method: svd, keep: 0.3, rank_multiple: 16}",
        "nothing-smaller",
        "stages",
        ("lower 'rank_multiple'",),
    ),
    "a multiple above the budget": (
        "{method: kfac, keep: 0.3, rank_multiple: 16}",
        "infeasible-budget",
        "stages[0].decompose.keep",
        ("at least 0.7587 of the bits", "lower 'rank_multiple' (16)"),
    ),
    "a multiple above the multiply-adds": (
        "{method: kfac, keep: 0.3, rank_multiple: 16, measure: macs}",
        "infeasible-budget",
        "stages[0].decompose.keep",
        ("of the multiply-adds", "lower 'rank_multiple' (16)"),
    ),
    "a floor above the budget": (
        "{method: kfac, keep: 0.3, min_keep: 0.4}",
        "conflicting-keys",
        "stages[0].decompose",
        ("'min_keep' must be at most 'keep', 0.3, got 0.4",),
    ),
    "a floor that multiples lift above the budget": (
        "{method: kfac, keep: 0.4, min_keep: 0.39, rank_multiple: 7}",
        "infeasible-budget",
        "stages[0].decompose.keep",
        ("at least 0.5693 of the bits", "'rank_multiple' (7)", "lower 'min_keep' (0.39)"),
    ),
    "a floor between two ranks": (
        "{method: svd, keep: 0.6, min_keep: 0.59, rank_multiple: 4}",
        "infeasible-budget",
        "stages[0].decompose.min_keep",
        ("model.layers.0.", "between 0.59 and 0.6", "lower min_keep or rank_"),
    ),
    "a cap without predictions": (
        "{method: svd, keep: 0.6, max_relative_error: 0.1}",
        "contradiction",
        "stages[0].decompose.max_relative_error",
        ("allocation: lagrangian", "got uniform"),
    ),
    "overrides above the budget": (
        "{method: kfac, keep: 0.3, overrides: [{match: '*.mlp.*', keep: 0.9}]}",
        "infeasible-budget",
        "stages[0].decompose.keep",
        ("at least 0.5747", "lower the budgets of 'overrides'"),
    ),
    "a size below the rest": (
        "{method: kfac, size: 60kB}",
        "infeasible-size",
        "stages[0].decompose.size",
        ("above 73.1 kB", "below the 98.7 kB", "got 60kB"),
    ),
    "a size barely above the rest": (
        "{method: kfac, size: 74kB}",
        "infeasible-budget",
        "stages[0].decompose.size",
        ("at least 75.8 kB, the cost", "got 74kB"),
    ),
    "a size above the dense model": (
        "{method: kfac, size: 1MiB}",
        "infeasible-size",
        "stages[0].decompose.size",
        ("below the 0.0941 MiB", "got 1MiB", "lower size"),
    ),
    "a size in multiply-adds": (
        "{method: kfac, size: 90kB, measure: macs}",
        "conflicting-keys",
        "stages[0].decompose",
        ("'size'", "'macs'", "'keep'"),
    ),
    "compensation of a shared factor": (
        "{method: basis-sharing, keep: 0.6, compensate: {}}",
        "wrong-type",
        "stages[0].decompose.compensate",
        ("must be null",),
    ),
    "compensation and a bias": (
        "{method: lord, keep: 0.6, compensate: {}}",
        "contradiction",
        "stages[0].decompose.method",
        ("lord", "'compensate'"),
    ),
    "a group of more layers than there are": (
        "{method: basis-sharing, keep: 0.6, layers_per_group: 3}",
        "out-of-range",
        "stages[0].decompose.layers_per_group",
        ("at most 2", "got 3"),
    ),
}


@pytest.mark.parametrize("case", BUDGETS)
def test_budgets_that_cannot_be_met_are_refused_before_any_weight_is_read(
    lrc, recipe: Path, output: Path, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage, code, where, words = BUDGETS[case]
    monkeypatch.setattr(WeightReader, "read", None)
    for command in ("plan", "compress"):
        ended = lrc(command, recipe, f"stages=[{{decompose: {stage}}}]")
        ended.refuses(2, *words, code=code, where=where)
    assert not output.exists()


QUANTIZATIONS: dict[str, tuple[str, str, str, tuple[str, ...]]] = {
    "groups of factors": (
        "{decompose: {method: svd, keep: 0.8}}, {quantize: {method: gqsa, group_size: 8}}",
        "already-decomposed",
        "stages[1].quantize.method",
        ("model.layers.0.self_attn.q_proj and 13 more of stages[0]", "'ignore'", "method: gptq"),
    ),
    "groups that fill no row": (
        "{quantize: {method: gqsa, group_size: 5}}",
        "indivisible-rows",
        "stages[0].quantize.group_size",
        ("got 5",),
    ),
    "groups without a size": (
        "{quantize: {method: gqsa}}",
        "conflicting-keys",
        "stages[0].quantize",
        ("'group_size'",),
    ),
    "a fraction of groups where all are kept": (
        "{quantize: {method: rtn, sparsity: 0.5}}",
        "conflicting-keys",
        "stages[0].quantize",
        ("'sparsity'",),
    ),
}


@pytest.mark.parametrize("case", QUANTIZATIONS)
def test_impossible_quantization_is_refused_before_any_weight_is_read(
    lrc, recipe: Path, output: Path, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages, code, where, words = QUANTIZATIONS[case]
    monkeypatch.setattr(WeightReader, "read", None)
    for command in ("plan", "compress"):
        ended = lrc(command, recipe, f"stages=[{stages}]")
        ended.refuses(2, *words, code=code, where=where)
    assert not output.exists()


def test_a_cap_on_losses_that_no_budget_allows(lrc, recipe: Path, output: Path) -> None:
    """Only the weights show it: the run stops right before they are compressed."""
    stage = "{method: svd, keep: 0.2, allocation: lagrangian, max_relative_error: 0.0001}"
    ended = lrc("compress", recipe, f"stages=[{{decompose: {stage}}}]", "-q")
    words = ("at least", "got 0.2", "raise 'max_relative_error' (0.0001)")
    ended.refuses(2, *words, code="infeasible-budget", where="stages[0].decompose.keep")
    assert not (output / "work/compressed").exists()
    assert not (output / "plan.json").exists()


def test_a_model_that_is_neither_local_nor_on_the_hub(lrc, recipe: Path, output: Path) -> None:
    words = ("'no-such/model'", "not a local folder", "Hub", "check the name")
    for override, where in (("model", "model.path"), ("model.tokenizer", "model.tokenizer")):
        ended = lrc("compress", recipe, f"{override}=no-such/model")
        ended.refuses(1, where, *words, code="invalid-model")
    assert not output.exists()


def test_an_unknown_task_is_refused_before_the_work(
    lrc, recipe: Path, output: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lrc.compressors.evaluate import harness

    find = harness._manager  # the index of lm-eval takes ten seconds and is tested elsewhere
    monkeypatch.setattr(harness, "_manager", lambda folder, defaults: find(folder, False))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "mine.yaml").write_text("task: my_task\ndataset_path: json\n")
    tasks = f"evaluate.tasks={{names: [my_tsk], include_path: {tmp_path / 'tasks'}}}"
    lrc("compress", recipe, tasks).refuses(2, "unknown task 'my_tsk'", "did you mean 'my_task'?")
    assert not output.exists()


def test_all_problems_are_reported_at_once(lrc, recipe: Path, output: Path) -> None:
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
