"""Benchmark tasks, scored by lm-eval.

lm-eval is imported inside functions: it takes seconds. Its task index of 14,000 files takes half a
minute, so it is built only where a name is not found among the task files of the recipe.
"""

import copy
import math
from difflib import get_close_matches
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lrc.compressors.corpus.hub import quiet_datasets
from lrc.compressors.evaluate.logits import input_device
from lrc.compressors.evaluate.quiet import quiet_harness, seeded
from lrc.compressors.io.machine import OnStep, no_progress
from lrc.configs.errors import DataError, ModelError, RecipeError
from lrc.configs.recipe import Tasks

BOOTSTRAP_DRAWS = 1000
"""For metrics whose standard error has no formula: 1,000 determine it to about 2 %, lm-eval's
100,000 take minutes."""
TaskScores = dict[str, dict[str, dict[str, Any]]]
"""Task -> metric -> ``{value, stderr, higher_is_better, documents, version}``, JSON values."""


def run_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Tasks,
    *,
    seed: int,
    on_step: OnStep = no_progress,
) -> TaskScores:
    """Score a model on tasks; metrics have lm-eval's names, followed by ",FILTER" if there is one.

    Nothing is cached: lm-eval's caches do not distinguish models. A group with an aggregate is
    scored as one; of a tag, or a group without, the members. The model is left in eval mode, and
    the global random generators are restored.

    `on_step` is called with (task, 0, 1) before a task and (task, requests done, requests) after
    every batch. Where lm-eval cuts documents into windows, their number is not known beforehand,
    and the total grows.

    Raises
    ------
    RecipeError
        If a task is unknown, or the tokenizer lacks a required chat template.
    DataError
        If a task's data is not available.
    ModelError
        If a metric is not finite.
    """
    if not tasks.names:
        return {}
    manager = _manager_for(tasks)
    _check_template(tokenizer, tasks)
    results: TaskScores = {}
    for name in dict.fromkeys(tasks.names):
        on_step(name, 0, 1)
        with seeded(seed), quiet_harness(partial(on_step, name)):
            loaded = _load(manager, name, tasks, seed)
            lm = _language_model(model, tokenizer, tasks.batch_size)
            lm._device = input_device(model)  # it takes the first weight's: "meta" if offloaded
            answers = _evaluate(lm, loaded, tasks, tasks.limit)
        results |= _results(name, answers, loaded)
    return results


def check_requests(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tasks: Tasks, *, seed: int
) -> None:
    """Build the requests of one document of every task, and score made-up answers.

    The model may be a skeleton without weights.

    Raises
    ------
    RecipeError
        If a task cannot be run with this tokenizer and model: all problems at once.
    DataError
        If a task's data is not available.
    """
    if not tasks.names:
        return
    manager = _manager_for(tasks)
    _check_template(tokenizer, tasks)
    problems = []
    for name in dict.fromkeys(tasks.names):
        with seeded(seed), quiet_harness():
            loaded = _load(manager, name, tasks, seed)
            try:
                _evaluate(_pretend(_language_model(model, tokenizer, 1)), loaded, tasks, 1)
            except Exception as error:  # the code of a task or of lm-eval
                problems.append(_unsuitable(name, tokenizer, error))
    if problems:
        raise RecipeError(problems)


def _pretend(lm: Any) -> Any:
    """Let lm-eval tokenize its requests, but give made-up answers instead of the model's."""

    def likelihoods(requests: Any, **_: Any) -> list[tuple[float, bool]]:
        for _request, context, continuation in requests:
            if not context or not continuation:
                raise ValueError("a text of it has no tokens")
        return [(-1.0, False)] * len(requests)

    def generated(context: Any, **_: Any) -> Any:
        return torch.cat([context, context[:, -1:]], dim=1)

    lm._device = torch.device("cpu")
    lm._loglikelihood_tokens, lm._model_generate = likelihoods, generated
    return lm


def _unsuitable(name: str, tokenizer: PreTrainedTokenizerBase, error: Exception) -> str:
    where = f"evaluate.tasks.names: task '{name}' cannot be run with this model and its tokenizer"
    if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
        return (
            f"{where}: it has neither a bos nor an eos token, and lm-eval puts one before a text;"
            " add one to tokenizer_config.json, name another tokenizer under model.tokenizer, or"
            " remove the task"
        )
    reason = " ".join(str(error).split())[:500]
    return f"{where} ({type(error).__name__}: {reason}); repair or remove the task"


def _check_template(tokenizer: PreTrainedTokenizerBase, tasks: Tasks) -> None:
    if tasks.apply_chat_template and not tokenizer.chat_template:
        raise RecipeError(
            "evaluate.tasks.apply_chat_template: the tokenizer has no chat template; set it"
            " to false or name the tokenizer of an instruct model under model.tokenizer"
        )


def _language_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch: int) -> Any:
    from lm_eval.models.huggingface import HFLM

    own = copy.deepcopy(tokenizer)  # it adds a padding token where there is none
    return HFLM(pretrained=model, tokenizer=own, batch_size=batch)


def _evaluate(lm: Any, loaded: Any, tasks: Tasks, limit: int | None) -> dict[str, Any]:
    from lm_eval.evaluator import evaluate

    answers: dict[str, Any] = evaluate(
        lm=lm,
        task_dict=loaded,
        limit=limit,
        bootstrap_iters=BOOTSTRAP_DRAWS,
        log_samples=False,
        apply_chat_template=tasks.apply_chat_template,
        fewshot_as_multiturn=tasks.apply_chat_template,
    )
    return answers


def check_tasks(tasks: Tasks) -> None:
    """Raise `RecipeError` for all unknown tasks at once, before hours are spent."""
    if tasks.names:
        _manager_for(tasks)


def declared_metrics(tasks: Tasks, name: str) -> list[str] | None:
    """List the metrics that a task declares, without filter; none if no task of that name is run.

    Return None for groups, tags and tasks that compute metrics in Python, whose metrics are known
    only after the run.
    """
    if not tasks.names:
        return []
    index = _manager_for(tasks).task_index
    if name not in tasks.names:
        plain = all(index[requested].kind.name == "TASK" for requested in tasks.names)
        return [] if plain else None
    entry = index[name]
    rows = (entry.cfg or {}).get("metric_list")
    if entry.kind.name != "TASK" or not rows:
        return None
    names = [str(row["metric"]) for row in rows]
    return names if all(n.replace("_", "").isalnum() for n in names) else None  # a path: Python


@lru_cache(maxsize=4)
def _manager(include_path: str | None, defaults: bool) -> Any:
    with quiet_harness():
        from lm_eval.tasks import TaskManager

        return TaskManager(include_path=include_path, include_defaults=defaults)


def _manager_for(tasks: Tasks) -> Any:
    """Build the smallest task index that knows all names."""
    folder = None
    if tasks.include_path is not None:
        path = Path(tasks.include_path).expanduser().resolve()
        if not path.is_dir():
            raise RecipeError(f"evaluate.tasks.include_path: no such folder: {tasks.include_path}")
        folder = str(path)
        manager = _manager(folder, False)
        if set(tasks.names) <= set(manager.all_tasks):
            return manager
    manager = _manager(folder, True)
    known = manager.all_tasks
    unknown = [name for name in dict.fromkeys(tasks.names) if name not in known]
    if unknown:
        places = f"in {tasks.include_path} and among" if folder else "among"
        problems = []
        for name in unknown:
            close = " or ".join(map(repr, get_close_matches(name, known, n=3)))
            hint = f"; did you mean {close}?" if close else ""
            problems.append(
                f"evaluate.tasks.names: unknown task '{name}', looked {places} lm-eval's own{hint}"
                "; `lm-eval ls tasks` lists those"
            )
        raise RecipeError(problems)
    return manager


def _load(manager: Any, name: str, tasks: Tasks, seed: int) -> Any:
    """Load a task, group or tag with its data, and set the number of few-shot examples."""
    try:
        with quiet_datasets():
            loaded = manager.load([name])
    except Exception as error:  # datasets', httpx', yaml's and lm-eval's own errors
        reason = " ".join(str(error).split())
        raise DataError(
            f"evaluate.tasks: task '{name}' cannot be loaded ({type(error).__name__}: {reason});"
            " lm-eval's own tasks fetch their data from the Hugging Face Hub: without it, give"
            " a task file with local data in evaluate.tasks.include_path"
        ) from error
    for task in loaded["tasks"].values():
        # As lm_eval.simple_evaluate does; a task that insists on 0 examples keeps them.
        own = task.get_config("num_fewshot")
        if tasks.num_fewshot is not None and own != 0:
            task.set_config(key="num_fewshot", value=tasks.num_fewshot)
        elif own is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=seed)
    return loaded


def _results(name: str, answers: dict[str, Any], loaded: Any) -> TaskScores:
    """Convert lm-eval's results for one requested name."""
    counts = {leaf: answers["n-samples"][leaf]["effective"] for leaf in loaded["tasks"]}
    if name in answers.get("groups", {}):
        counts = {name: sum(counts.values())}
    return {task: _metrics(task, answers, documents) for task, documents in counts.items()}


def _metrics(task: str, answers: dict[str, Any], documents: int) -> dict[str, dict[str, Any]]:
    directions = answers["higher_is_better"].get(task, {})
    version, scores = answers["versions"].get(task), answers["results"][task]
    metrics = {}
    for key, value in scores.items():
        metric, comma, filtered = key.partition(",")
        if not comma or metric.endswith("_stderr"):
            continue
        if not math.isfinite(value):
            raise ModelError(
                f"evaluate.tasks: {metric} of task '{task}' is {value}: the model's logits are not"
                " finite; compress less, or evaluate in bfloat16 or float32"
            )
        stderr = scores.get(f"{metric}_stderr,{filtered}")  # "N/A", or nan for one document
        known = not isinstance(stderr, str | None) and math.isfinite(stderr)
        metrics[metric if filtered == "none" else key] = {
            "value": float(value),
            "stderr": float(stderr) if known else None,
            "higher_is_better": directions.get(metric),
            "documents": documents,
            "version": None if version in (None, "N/A", "Yaml") else str(version),
        }
    return metrics
