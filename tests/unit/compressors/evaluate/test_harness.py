"""lm-eval on local task files, dense against compressed, and quality gates."""

import json
import random
import shutil
from pathlib import Path

import accelerate
import pytest
import torch
import yaml

from lrc.compressors.evaluate import harness
from lrc.compressors.evaluate.gates import (
    check_gate_names,
)
from lrc.compressors.evaluate.harness import check_requests, check_tasks, run_tasks
from lrc.compressors.evaluate.scores import check_evaluation, compare, evaluate_model
from lrc.configs.errors import DataError, ModelError, RecipeError
from lrc.configs.recipe import Evaluate, Gate, Perplexity, Tasks


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Hold task files of four kinds, a group and a tag, over local data."""
    root = tmp_path_factory.mktemp("tasks")
    rows = [
        {"question": f"What is {i} + 1?", "choices": ["seven", "a cat", str(i)], "gold": i % 3}
        for i in range(12)
    ]
    texts = [{"text": f"The statement {'is executed again. ' * i}", "last": "ok"} for i in range(8)]
    for name, data in (("rows", rows), ("texts", texts)):
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in data))
    choice = {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{gold}}",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }
    rolling = {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
    }
    last_word = {
        "output_type": "loglikelihood",
        "doc_to_text": "{{text}}",
        "doc_to_target": "{{last}}",
        "metric_list": [{"metric": "perplexity"}, {"metric": "acc"}],
    }
    filters = [{"name": "first", "filter": [{"function": "take_first"}]}]
    generated = {
        "output_type": "generate_until",
        "doc_to_text": "{{text}}",
        "doc_to_target": "{{last}}",
        "generation_kwargs": {"max_gen_toks": 2, "until": ["\n"]},
        "filter_list": filters,
        "metric_list": [{"metric": "exact_match"}],
    }
    tasks = {
        "toy_choice": (choice, "rows"),
        "toy_choice_b": (choice, "rows"),
        "toy_text": (rolling, "texts"),
        "toy_word": (last_word, "texts"),
        "toy_generate": (generated, "texts"),
        "toy_unreachable": (rolling, None),
    }
    for name, (task, data) in tasks.items():
        place = (
            {"dataset_path": "nobody/has-this"}
            if data is None
            else {
                "dataset_path": "json",
                "dataset_kwargs": {"data_files": {"test": str(root / f"{data}.jsonl")}},
            }
        )
        tag = {"tag": "toy_tag"} if task is choice else {}
        content = {"task": name, "test_split": "test", **place, **tag, **task}
        content["metadata"] = {"version": 1.5}
        (root / f"{name}.yaml").write_text(yaml.safe_dump(content))
    group = {
        "group": "toy_group",
        "task": ["toy_choice", "toy_choice_b"],
        "aggregate_metric_list": [{"metric": "acc", "weight_by_size": True}],
        "metadata": {"version": 2},
    }
    (root / "_group.yaml").write_text(yaml.safe_dump(group))
    return str(root)


@pytest.fixture(autouse=True)
def _local_tasks_only(monkeypatch, tmp_path_factory):
    """Index no built-in task (half a minute), and cache data sets out of the home folder."""
    build = harness._manager
    monkeypatch.setattr(harness, "_manager", lambda path, defaults: build(path, False))
    import datasets

    cache = tmp_path_factory.getbasetemp() / "datasets"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)


def tasks(folder, *names, **changes):
    return Tasks(names=list(names), include_path=folder, **changes)


def test_a_model_recovers_all_of_itself(tiny_llama, tiny_tokenizer, folder):
    options = Evaluate(
        perplexity=[Perplexity(source="python-docs", window=64, windows=2)],
        tasks=tasks(folder, "toy_choice", "toy_text", "toy_word"),
    )
    blocks = [evaluate_model(tiny_llama(), tiny_tokenizer, options, seed=0) for _ in range(2)]
    report = json.loads(json.dumps(compare(*blocks), allow_nan=False))
    entry = report["perplexity"]["python-docs"]
    assert entry["ratio"] == 1
    assert entry["dense"] == entry["compressed"] > 1
    assert (entry["window"], entry["windows"], entry["tokens"]) == (64, 2, 126)
    assert (entry["bos"], entry["dtype"], len(entry["text_sha256"])) == (False, "float32", 64)
    recovered = {
        f"{task}.{metric}": score["recovery"]
        for task, metrics in report["tasks"].items()
        for metric, score in metrics.items()
    }
    assert recovered.pop("toy_word.acc") is None  # a score of 0 cannot be recovered
    assert recovered == {
        "toy_choice.acc": 100,
        "toy_choice.acc_norm": 100,
        "toy_text.word_perplexity": 100,
        "toy_text.bits_per_byte": 100,
        "toy_word.perplexity": 100,
    }
    assert report["tasks"]["toy_text"]["bits_per_byte"]["higher_is_better"] is False


def test_scores_carry_error_documents_and_version(tiny_llama, tiny_tokenizer, folder):
    options = tasks(folder, "toy_choice", "toy_text", "toy_word", limit=5)
    results = run_tasks(tiny_llama(), tiny_tokenizer, options, seed=0)
    accuracy = results["toy_choice"]["acc"]
    assert (accuracy["documents"], accuracy["version"]) == (5, "1.5")
    value = accuracy["value"]
    spread = (value * (1 - value) / 4) ** 0.5  # of a mean of five 0s and 1s
    assert accuracy["stderr"] == pytest.approx(spread)
    assert accuracy["higher_is_better"] is True
    assert results["toy_text"]["bits_per_byte"]["stderr"] is None
    assert results["toy_word"]["perplexity"]["stderr"] > 0  # bootstrapped


def test_offloaded_weights_change_no_score(tiny_llama, tiny_tokenizer, folder):
    options = tasks(folder, "toy_word", limit=4)
    expected = run_tasks(tiny_llama(), tiny_tokenizer, options, seed=0)
    model = accelerate.cpu_offload(tiny_llama(), execution_device=torch.device("cpu"))
    assert run_tasks(model, tiny_tokenizer, options, seed=0) == expected


def test_a_single_document_has_no_error(tiny_llama, tiny_tokenizer, folder):
    results = run_tasks(tiny_llama(), tiny_tokenizer, tasks(folder, "toy_choice", limit=1), seed=0)
    assert results["toy_choice"]["acc"]["stderr"] is None


def test_a_rolling_score_is_the_models_own_likelihood(tiny_llama, tiny_tokenizer, folder):
    model = tiny_llama()
    result = run_tasks(model, tiny_tokenizer, tasks(folder, "toy_text"), seed=0)["toy_text"]
    nats = size = 0.0
    for i in range(8):
        text = f"The statement {'is executed again. ' * i}"
        ids = torch.tensor([[0, *tiny_tokenizer(text, add_special_tokens=False)["input_ids"]]])
        with torch.no_grad():
            logp = model(ids).logits.double().log_softmax(-1)[:, :-1]
        nats -= logp.gather(-1, ids[:, 1:, None]).sum().item()
        size += len(text.encode())
    bits = nats / size / torch.tensor(2.0).log().item()
    assert result["bits_per_byte"]["value"] == pytest.approx(bits, rel=1e-5)


def test_a_group_gives_its_aggregate_and_a_tag_its_members(tiny_llama, tiny_tokenizer, folder):
    group = run_tasks(tiny_llama(), tiny_tokenizer, tasks(folder, "toy_group"), seed=0)
    assert list(group) == ["toy_group"]
    accuracy = group["toy_group"]["acc"]
    assert (accuracy["documents"], accuracy["version"]) == (24, "2")
    tag = run_tasks(tiny_llama(), tiny_tokenizer, tasks(folder, "toy_tag"), seed=0)
    assert list(tag) == ["toy_choice", "toy_choice_b"]
    mean = sum(result["acc"]["value"] for result in tag.values()) / 2
    assert accuracy["value"] == pytest.approx(mean)


def test_filters_stay_in_the_name(tiny_llama, tiny_tokenizer, folder):
    options = tasks(folder, "toy_generate", limit=2)
    result = run_tasks(tiny_llama(), tiny_tokenizer, options, seed=0)["toy_generate"]
    assert list(result) == ["exact_match,first"]


def test_nothing_is_printed_and_nothing_is_changed(tiny_llama, tiny_tokenizer, folder, capfd):
    random_before, torch_before = random.getstate(), torch.get_rng_state()
    run_tasks(tiny_llama(), tiny_tokenizer, tasks(folder, "toy_word", "toy_text"), seed=3)
    assert capfd.readouterr() == ("", "")
    assert random.getstate() == random_before
    assert torch.equal(torch.get_rng_state(), torch_before)
    assert tiny_tokenizer.pad_token is None  # lm-eval sets one on the tokenizer it is given


def test_progress_counts_requests_and_may_stop(tiny_llama, tiny_tokenizer, folder):
    steps = []
    options = tasks(folder, "toy_choice", "toy_text", batch_size=4)
    run_tasks(
        tiny_llama(), tiny_tokenizer, options, seed=0, on_step=lambda *step: steps.append(step)
    )
    choice = [step[1:] for step in steps if step[0] == "toy_choice"]
    assert choice[0] == (0, 1)
    assert choice[1:] == [(n, 36) for n in range(1, 37)]
    assert [step for step in steps if step[0] == "toy_text"][-1] == ("toy_text", 8, 8)

    def stop(label, done, total):
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_tasks(tiny_llama(), tiny_tokenizer, options, seed=0, on_step=stop)


def test_unknown_tasks_are_refused_all_at_once_with_hints(folder):
    with pytest.raises(RecipeError) as caught:
        check_tasks(tasks(folder, "toy_choise", "toy_text", "zzz"))
    assert len(caught.value.problems) == 2
    assert "unknown task 'toy_choise'" in str(caught.value.problems[0])
    assert "did you mean 'toy_choice'" in str(caught.value.problems[0])
    assert folder in str(caught.value.problems[0])
    with pytest.raises(RecipeError, match="include_path: no such folder"):
        check_tasks(tasks(folder + "x", "toy_text"))
    check_tasks(tasks(folder, "toy_text", "toy_group", "toy_tag"))
    check_tasks(Tasks())


def test_the_error_for_missing_data_names_a_remedy(tiny_llama, tiny_tokenizer, folder):
    options = tasks(folder, "toy_unreachable")
    check_tasks(options)
    with pytest.raises(DataError, match=r"toy_unreachable.*include_path"):
        run_tasks(tiny_llama(), tiny_tokenizer, options, seed=0)


def test_chat_templates_are_applied_or_refused(tiny_llama, make_tokenizer, folder):
    options = tasks(folder, "toy_choice", apply_chat_template=True, limit=4)
    with pytest.raises(RecipeError, match="has no chat template"):
        run_tasks(tiny_llama(), make_tokenizer(), options, seed=0)
    template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    plain = options.model_copy(update={"apply_chat_template": False})
    results = [
        evaluate_model(
            tiny_llama(), make_tokenizer(chat_template=template), Evaluate(tasks=a), seed=0
        )
        for a in (options, plain)
    ]
    assert results[0]["tasks"].keys() == results[1]["tasks"].keys()


def test_a_score_that_is_not_finite_is_an_error(tiny_llama, tiny_tokenizer, folder):
    model = tiny_llama()
    model.lm_head.weight.data.fill_(torch.nan)
    with pytest.raises(ModelError, match="word_perplexity of task 'toy_text' is nan"):
        run_tasks(model, tiny_tokenizer, tasks(folder, "toy_text"), seed=0)


# Before the work, and after it


@pytest.fixture
def without_special_tokens(make_tokenizer):
    tokenizer = make_tokenizer()
    tokenizer.bos_token = tokenizer.eos_token = None
    return tokenizer


def skeleton(tiny_llama):
    with torch.device("meta"):
        return type(tiny_llama())(tiny_llama().config)


def test_one_request_of_every_task_is_built_before_the_work(tiny_llama, tiny_tokenizer, folder):
    names = ["toy_choice", "toy_text", "toy_word", "toy_group", "toy_tag"]
    check_requests(skeleton(tiny_llama), tiny_tokenizer, tasks(folder, *names), seed=0)
    check_requests(skeleton(tiny_llama), tiny_tokenizer, Tasks(), seed=0)
    assert tiny_tokenizer.pad_token is None


def test_a_tokenizer_without_bos_and_eos_is_found_before_the_work(
    tiny_llama, without_special_tokens, folder
):
    options = tasks(folder, "toy_choice", "toy_text", "toy_generate")
    with pytest.raises(RecipeError) as caught:
        check_evaluation(
            skeleton(tiny_llama), without_special_tokens, Evaluate(tasks=options), seed=0
        )
    assert len(caught.value.problems) == 3
    for problem, name in zip(caught.value.problems, options.names, strict=True):
        assert problem.where == "evaluate.tasks.names"
        assert f"'{name}'" in str(problem)
        assert "neither a bos nor an eos token" in str(problem)


def broken(folder, tmp_path, **changes):
    """Return options with a task that lm-eval loads and cannot run."""
    content = yaml.safe_load((Path(folder) / "toy_word.yaml").read_text())
    (tmp_path / "broken.yaml").write_text(yaml.safe_dump(content | {"task": "broken"} | changes))
    for name in ("toy_word", "toy_choice"):
        shutil.copy(Path(folder) / f"{name}.yaml", tmp_path)
    return tasks(str(tmp_path), "toy_word", "broken", "toy_choice")


@pytest.mark.parametrize(
    "changes",
    [
        {"doc_to_target": "{{missing.key}}"},
        {"doc_to_text": "{% if %}"},
        {"output_type": "generate_until", "metric_list": [{"metric": "exact_match"}]},
    ],
)
def test_a_task_that_cannot_be_run_is_found_before_the_work(
    tiny_llama, tiny_tokenizer, folder, tmp_path, changes
):
    options = broken(folder, tmp_path, **changes)
    # The last would generate 256 tokens, which is all of the model's context.
    with pytest.raises((RecipeError, DataError), match="task 'broken' cannot be") as caught:
        check_requests(skeleton(tiny_llama), tiny_tokenizer, options, seed=0)
    assert len(caught.value.problems) == 1


def test_a_task_that_fails_costs_no_other_result(tiny_llama, tiny_tokenizer, folder, tmp_path):
    failing = "{% if text|length > 30 %}{{ missing.key }}{% endif %}ok"  # not the first document
    options = Evaluate(
        perplexity=[Perplexity(source="python-docs", window=64, windows=1)],
        tasks=broken(folder, tmp_path, doc_to_target=failing),
    )
    check_requests(skeleton(tiny_llama), tiny_tokenizer, options.tasks, seed=0)
    scores = evaluate_model(tiny_llama(), tiny_tokenizer, options, seed=0)
    assert list(scores["perplexity"]) == ["python-docs"]
    assert list(scores["tasks"]) == ["toy_word", "toy_choice"]
    assert list(scores["missing"]) == ["tasks.broken"]
    assert "missing" in scores["missing"]["tasks.broken"]
    # The same again measures only what is missing.
    steps = []
    again = evaluate_model(
        tiny_llama(),
        tiny_tokenizer,
        options,
        seed=0,
        on_step=lambda *step: steps.append(step[0]),
        scores=scores,
    )
    assert set(steps) == {"broken"}
    assert again == scores


def test_a_perplexity_that_is_not_finite_costs_no_other_result(tiny_llama, tiny_tokenizer, folder):
    model = tiny_llama()
    model.lm_head.weight.data[7].fill_(torch.nan)
    options = Evaluate(
        perplexity=[Perplexity(source="python-docs", window=64, windows=1)],
        tasks=tasks(folder, "toy_choice"),
    )
    scores = evaluate_model(model, tiny_tokenizer, options, seed=0)
    assert "not finite" in scores["missing"]["perplexity.python-docs"]
    assert list(scores["tasks"]) == ["toy_choice"]


def test_gate_names_are_checked_before_the_run(folder):
    good = ["perplexity.w.x", "tasks.toy_choice.acc_norm", "tasks.toy_generate.exact_match,first"]
    bad = {
        "perplexity.wx": "did you mean 'perplexity.w.x'",
        "tasks.toy_choice.ac": "did you mean 'tasks.toy_choice.acc'",
        "tasks.toy_choise.acc": "did you mean 'tasks.toy_choice.acc'",
        "tasks.toy_choice": "must be perplexity.NAME, kl.NAME, agreement.NAME, tasks.NAME.METRIC",
        "size.kept": "tasks.NAME.METRIC or size, got 'size.kept'",
    }
    options = Evaluate(
        perplexity=[Perplexity(source="python-docs", name="w.x")],
        tasks=tasks(folder, "toy_choice", "toy_generate"),
        dense=False,
    )
    check_gate_names([Gate(metric=name, at_most=1) for name in good], options)
    with pytest.raises(RecipeError) as caught:
        check_gate_names([Gate(metric=name, at_most=1) for name in bad], options)
    assert len(caught.value.problems) == len(bad)
    for problem, hint in zip(caught.value.problems, bad.values(), strict=True):
        assert hint in str(problem)
    with pytest.raises(RecipeError, match=r"gates\[0\]\.relative: .*evaluate\.dense"):
        check_gate_names([Gate(metric="perplexity.w.x", at_most=1, relative=True)], options)


def test_members_of_a_group_may_have_gates(folder):
    options = Evaluate(tasks=tasks(folder, "toy_tag"))
    check_gate_names([Gate(metric="tasks.toy_choice.acc", at_least=0.1)], options)
    with pytest.raises(RecipeError, match="allowed: none"):
        check_gate_names([Gate(metric="tasks.toy_choice.acc", at_least=0.1)], Evaluate())
