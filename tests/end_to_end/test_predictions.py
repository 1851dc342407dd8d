"""Predictions of the dense and the compressed model: measured, kept, shown, and gates on them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import kl_div
from transformers import AutoModelForCausalLM, AutoTokenizer

from lrc.compressors import report
from lrc.compressors.corpus.windows import evaluation_windows
from lrc.compressors.evaluate import side_by_side
from lrc.compressors.io.machine import Machine
from lrc.compressors.model_card import model_card
from lrc.compressors.pipeline import compress
from lrc.compressors.planning.plan import Plan
from lrc.configs.errors import EvaluationIncomplete, Stopped
from lrc.configs.load import load_recipe
from lrc.configs.recipe import Perplexity

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPTS = "evaluate.generations={prompts: [def f(x), The], tokens: 8}"


def run(recipe: Path, *overrides: str, **options: Any) -> dict[str, Any]:
    return compress(load_recipe(recipe, overrides), Machine("cpu", **options))


@torch.no_grad()
def measured_by_hand(output: Path, dense: Path, text: Path, windows: int) -> list[float]:
    """Return both divergences and the agreement, from full logits."""
    spec = Perplexity(source=str(text), window=32, windows=windows)
    tokens = evaluation_windows(spec, AutoTokenizer.from_pretrained(dense)).tokens
    # The dense model is that of the recipe, in bfloat16, run in float32.
    models = [
        AutoModelForCausalLM.from_pretrained(dense, dtype=torch.bfloat16).float(),
        AutoModelForCausalLM.from_pretrained(output / "checkpoint", dtype=torch.float32),
    ]
    p, q = (m(input_ids=tokens).logits[:, :-1].double().log_softmax(-1) for m in models)
    forward, reverse = (
        kl_div(b, a, reduction="none", log_target=True).sum(-1) for a, b in ((p, q), (q, p))
    )
    same = (p.argmax(-1) == q.argmax(-1)).double()
    return [float(each.mean()) for each in (forward, reverse, same)]


def test_predictions_are_compared_in_report_table_and_card(
    lrc: Callable[..., Any],
    recipe: Path,
    output: Path,
    tiny_model_folder: Path,
    tiny_text: Path,
    executed: Callable[[Path], Plan],
) -> None:
    ended = lrc("compress", recipe, PROMPTS, "evaluate.perplexity.0.windows=3")
    assert ended.code == 0, ended.err
    evaluation = json.loads((output / "report.json").read_text())["evaluation"]
    entry = evaluation["kl"]["english"]
    found = [entry[key] for key in ("forward", "reverse", "agreement")]
    by_hand = measured_by_hand(output, tiny_model_folder, tiny_text, 3)
    assert found == pytest.approx(by_hand, rel=1e-4)
    assert found[0] > 0.01
    assert (entry["windows"], entry["tokens"], entry["dtype"]) == (3, 93, "float32")
    perplexity = evaluation["perplexity"]["english"]
    assert entry["text_sha256"] == perplexity["text_sha256"]
    assert perplexity["in_domain"] is True  # calibrated on the same file
    assert evaluation["domain_gap"] is None

    said = " ".join(ended.out.split())
    card = " ".join((output / "checkpoint/README.md").read_text().split())
    for text in (said, card):
        for value, error in zip(found[:2], ("forward", "reverse"), strict=True):
            assert f"{value:.4f} ± {entry['stderr'][error]:.4f}" in text
    assert "english (93 tokens)" in said
    assert "after 1 token 0." in said
    assert "in domain" in said

    first, second = evaluation["generations"]
    assert (first["prompt"], second["prompt"]) == ("def f(x)", "The")
    written = lrc(
        *("generate", tiny_model_folder, output / "checkpoint"),
        *("--prompt", "The", "--tokens", 8, "--json"),
    )
    # lrc generate reads the source as it is stored, in float32, not in the recipe's bfloat16.
    assert second["compressed"] == [*json.loads(written.out)["continuations"].values()][1]
    for each in (first, second):
        assert each["new_tokens"]["dense"] <= 8
        assert f"prompt: {each['prompt']}" in said
    inspected = lrc("inspect", output / "checkpoint").out
    assert "KL(dense || compressed)" in inspected
    assert "prompt: The" in inspected

    # The report of an earlier version, for which `lrc bench --report` writes the card again.
    earlier = json.loads((output / "report.json").read_text())
    del earlier["evaluation"]["kl"], earlier["evaluation"]["domain_gap"]
    del earlier["evaluation"]["perplexity"]["english"]["in_domain"]
    old_card = model_card(earlier, executed(output), plain=False)
    assert "| english | " in old_card
    assert "agreement" not in old_card


def test_a_number_of_tokens_limits_the_comparison(recipe: Path) -> None:
    whole = run(recipe, "evaluate.perplexity.0.windows=4")["evaluation"]
    assert (whole["kl"]["english"]["windows"], whole["perplexity"]["english"]["windows"]) == (4, 4)
    seen = set[str]()
    fewer = run(
        recipe,
        *("evaluate.perplexity.0.windows=4", "evaluate.kl_tokens=70"),
        on_step=lambda stage, *_: seen.add(stage),
    )["evaluation"]
    assert fewer["kl"]["english"]["windows"] == 2
    assert fewer["perplexity"] == whole["perplexity"]
    assert seen == {"evaluate dense and compressed: KL english"}
    none = run(recipe, "evaluate.perplexity.0.windows=4", "evaluate.kl_tokens=0")["evaluation"]
    assert none["kl"] == {}


def test_an_interrupted_comparison_costs_no_other_score(recipe: Path, output: Path) -> None:
    undisturbed = run(recipe, PROMPTS)["evaluation"]
    for file in ("report.json", "work/evaluation-pair.json"):
        (output / file).unlink()
    seen: list[str] = []

    def stop(stage: str, done: int, total: int) -> None:
        seen.append(stage)
        if stage.endswith("generations"):
            raise Stopped("requested")

    with pytest.raises(Stopped):
        run(recipe, PROMPTS, on_step=stop)
    again = run(recipe, PROMPTS, on_step=lambda stage, *_: seen.append(stage))["evaluation"]
    assert again == undisturbed
    assert {stage.partition(":")[0] for stage in seen} == {"evaluate dense and compressed"}


def test_without_the_memory_for_both_models_the_rest_is_reported(
    recipe: Path, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compare(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("tried to allocate 9 GiB")

    with monkeypatch.context() as patch:
        patch.setattr(side_by_side, "compare_predictions", compare)
        with pytest.raises(EvaluationIncomplete, match=r"evaluation\.kl\.english.*9 GiB"):
            run(recipe)
    evaluation = json.loads((output / "report.json").read_text())["evaluation"]
    assert evaluation["perplexity"]["english"]["ratio"] > 0
    assert [each["metric"] for each in evaluation["missing"]] == ["kl.english"]
    evaluation = run(recipe)["evaluation"]
    assert evaluation["missing"] == []
    assert evaluation["kl"]["english"]["forward"] > 0


def test_a_missed_gate_on_the_divergence_exits_with_4(
    lrc: Callable[..., Any], recipe: Path
) -> None:
    gates = "[{metric: kl.english, at_most: 1.0e-9}, {metric: agreement.english, at_least: 0}]"
    ended = lrc("compress", recipe, f"evaluate.gates={gates}", "--json", "-q")
    assert ended.code == 4
    value = json.loads(ended.out)["evaluation"]["kl"]["english"]["forward"]
    assert ended.errors == [f"error[gate-missed]: kl.english is {value:.4g}: must be at most 1e-09"]


def test_lrc_eval_compares_with_the_first_model(
    lrc: Callable[..., Any],
    recipe: Path,
    output: Path,
    tiny_model_folder: Path,
    tiny_text: Path,
    tiny_llama: Callable[..., Any],
    tmp_path: Path,
) -> None:
    checkpoint = output / "checkpoint"
    expected = run(recipe, "model.dtype=float32", "evaluate.perplexity.0.windows=3")
    expected = expected["evaluation"]["kl"]["english"]
    other = tmp_path / "other"
    tiny_llama(vocab_size=520).save_pretrained(other)
    AutoTokenizer.from_pretrained(tiny_model_folder).save_pretrained(other)
    options = ("--perplexity", tiny_text, "--window", 32, "--windows", 3)
    models = (tiny_model_folder, checkpoint, other)
    ended = lrc("eval", *models, *options, "--json")
    assert ended.code == 0, ended.err
    dense, compressed, foreign = json.loads(ended.out)["checkpoints"].values()
    assert dense["kl"] == foreign["kl"] == {}
    assert compressed["kl"]["english"]["forward"] == pytest.approx(expected["forward"], rel=1e-4)
    assert compressed["kl"]["english"]["agreement"] == expected["agreement"]
    words = f"has another vocabulary than {tiny_model_folder}"
    assert words in ended.err
    assert any(words in text for text in foreign["warnings"])

    shown = lrc("eval", *models[:2], *options, "-q").out
    assert f"{expected['forward']:.4f}" in shown
    assert "KL(first || this) english (93 tokens)" in shown
    without = lrc("eval", *models[:2], *options, "--kl-tokens", 0, "-q").out
    assert "KL" not in without


def test_a_text_of_another_kind_is_marked_and_a_gap_is_shown(
    lrc: Callable[..., Any],
    recipe: Path,
    output: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """How large a gap must be is tested elsewhere: a random model loses as much on any text."""
    numbers, copy = tmp_path / "numbers.txt", tmp_path / "copy.txt"
    numbers.write_text(" ".join(str(n * n) for n in range(600)), encoding="utf-8")
    source = load_recipe(recipe).recipe.calibration.source
    assert isinstance(source, str)
    copy.write_bytes(Path(source).read_bytes())  # of the same hash
    monkeypatch.setattr(report, "domain_gap", lambda _: "domain-gap: much [more] is lost")
    texts = ", ".join(f"{{source: {path}, window: 32, windows: 2}}" for path in (copy, numbers))
    ended = lrc("compress", recipe, f"evaluate.perplexity=[{texts}]", "-q")
    found = json.loads((output / "report.json").read_text())
    marks = {name: e["in_domain"] for name, e in found["evaluation"]["perplexity"].items()}
    assert marks == {"copy": True, "numbers": False}
    assert found["evaluation"]["domain_gap"] == "domain-gap: much [more] is lost"
    assert found["evaluation"]["domain_gap"] in found["warnings"]
    said = " ".join(ended.out.split())
    assert "warning: domain-gap: much [more] is lost" in said
    assert "in domain" in said
    assert "other text" in said
    card = (output / "checkpoint/README.md").read_text()
    assert "**Note:** much [more] is lost." in card
    rows = [line.split(" | ")[4] for line in card.splitlines() if "disjoint windows" in line]
    assert rows == ["yes", "no"]


def test_without_calibration_there_is_no_domain(recipe: Path) -> None:
    found = run(recipe, "stages=[{quantize: {method: rtn}}]")["evaluation"]
    assert found["perplexity"]["english"]["in_domain"] is None
    assert found["domain_gap"] is None
