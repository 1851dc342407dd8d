"""Benchmark tasks, scored by lm-eval.

lm-eval is imported inside functions: it takes seconds. Its task index of 14,000 files takes half a
minute, so it is built only where a name is not found among the task files of the recipe.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lrc.compressors.corpus.hub import quiet_datasets
from lrc.compressors.evaluate.perplexity import input_device
from lrc.compressors.evaluate.quiet import quiet_harness, seeded
from lrc.compressors.io.machine import OnStep
from lrc.configs.errors import DataError, ModelError, RecipeError
from lrc.configs.recipe import Tasks

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


BOOTSTRAP_DRAWS = 1000
"""For the metrics whose standard error has no formula. lm-eval's 100,000 give the same two digits
after minutes; 1,000 know the error to about 2 %."""


@dataclass(frozen=True)
class MetricValue:
    """One number of a task."""

    value: float
    stderr: float | None
    higher_is_better: bool | None
    """None where the task does not say."""


@dataclass(frozen=True)
class TaskResult:
    """All metrics of one task, or of a group as lm-eval aggregates it."""

    metrics: dict[str, MetricValue]
    documents: int
    version: str | None


def run_tasks(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    tasks: Tasks,
    *,
    seed: int,
    on_step: OnStep | None = None,
) -> dict[str, TaskResult]:
    """Score a model on tasks.

    Nothing is cached: lm-eval's caches do not tell one model from another.

    Parameters
    ----------
    model : PreTrainedModel
        Left in eval mode.
    tokenizer : PreTrainedTokenizerBase
        Not changed (lm-eval gives a tokenizer without padding token one; a copy gets it).
    tasks : Tasks
        A group with an aggregate gives that; a tag, or a group without, gives its members.
    seed : int
        Of few-shot examples and sampling. The global generators are left as they were.
    on_step : callable, optional
        Called with (task, 0, 1) before a task and (task, requests done, requests) after every
        batch. Where lm-eval cuts documents into windows their number is not known beforehand:
        the total then grows with what is done.

    Returns
    -------
    dict of str to TaskResult
        By task; metrics by lm-eval's name, with ",FILTER" behind it where there is a filter.

    Raises
    ------
    RecipeError
        If a task is unknown, or a chat template is asked of a tokenizer without one.
    DataError
        If a task's data cannot be had.
    ModelError
        If a metric is not finite.
    """
    if not tasks.names:
        return {}
    manager = _manager_for(tasks)
    if tasks.apply_chat_template and not tokenizer.chat_template:
        raise RecipeError(
            [
                "evaluate.tasks.apply_chat_template: the tokenizer has no chat template; set it"
                " to false or name the tokenizer of an instruct model under model.tokenizer"
            ]
        )
    results: dict[str, TaskResult] = {}
    for name in dict.fromkeys(tasks.names):
        report = _labelled(on_step, name)
        report(0, 1)
        with seeded(seed), quiet_harness(report):
            from lm_eval.evaluator import evaluate
            from lm_eval.models.huggingface import HFLM

            loaded = _load(manager, name, tasks, seed)
            lm = HFLM(
                pretrained=model,
                tokenizer=copy.deepcopy(tokenizer),
                batch_size=tasks.batch_size,
            )
            lm._device = input_device(model)  # it takes the first weight's: "meta" if offloaded
            answers = evaluate(
                lm=lm,
                task_dict=loaded,
                limit=tasks.limit,
                bootstrap_iters=BOOTSTRAP_DRAWS,
                log_samples=False,
                apply_chat_template=tasks.apply_chat_template,
                fewshot_as_multiturn=tasks.apply_chat_template,
            )
        results |= _results(name, answers, loaded)
    return results


def check_tasks(tasks: Tasks, *, data: bool = False) -> None:
    """Refuse unknown tasks, before hours are spent.

    Parameters
    ----------
    tasks : Tasks
    data : bool
        Load the data sets too: it downloads what is not cached, and finds out what cannot be had.

    Raises
    ------
    RecipeError
        For unknown names, all of them at once, with suggestions.
    DataError
        If `data`, and the data of a task cannot be had.
    """
    if not tasks.names:
        return
    manager = _manager_for(tasks)
    for name in tasks.names if data else ():
        with quiet_harness():
            _load(manager, name, tasks, seed=0)


def declared_metrics(tasks: Tasks, name: str) -> list[str] | None:
    """List the metrics a task will give, as far as its file says so.

    Returns
    -------
    list of str or None
        Names without filter. None for groups, tags and tasks that compute metrics in Python: what
        they give is known only after the run. Empty if no task of that name will be run.
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


def _labelled(on_step: OnStep | None, label: str) -> Callable[[int, int], None]:
    def report(done: int, total: int) -> None:
        if on_step is not None:
            on_step(label, done, total)

    return report


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
            raise RecipeError(
                [f"evaluate.tasks.include_path: no such folder: {tasks.include_path}"]
            )
        folder = str(path)
        manager = _manager(folder, False)
        if set(tasks.names) <= set(manager.all_tasks):
            return manager
    manager = _manager(folder, True)
    known = manager.all_tasks
    unknown = [name for name in dict.fromkeys(tasks.names) if name not in known]
    if unknown:
        places = f"in {tasks.include_path} and among" if folder else "among"
        raise RecipeError(
            [
                f"evaluate.tasks.names: unknown task '{name}', looked {places} lm-eval's own"
                + _hint(name, known)
                + "; `lm-eval ls tasks` lists those"
                for name in unknown
            ]
        )
    return manager


def _hint(name: str, known: list[str]) -> str:
    close = get_close_matches(name, known, n=3)
    return f"; did you mean {' or '.join(map(repr, close))}?" if close else ""


def _load(manager: Any, name: str, tasks: Tasks, seed: int) -> Any:
    """Load a task, group or tag with its data, and set the number of examples."""
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


def _results(name: str, answers: dict[str, Any], loaded: Any) -> dict[str, TaskResult]:
    """Translate lm-eval's results for one requested name."""
    leaves = list(loaded["tasks"])
    aggregated = name in answers.get("groups", {})
    counts = {leaf: answers["n-samples"][leaf]["effective"] for leaf in leaves}
    return {
        task: TaskResult(
            metrics=_metrics(
                task, answers["results"][task], answers["higher_is_better"].get(task, {})
            ),
            documents=sum(counts.values()) if aggregated else counts[task],
            version=_text(answers["versions"].get(task)),
        )
        for task in ([name] if aggregated else leaves)
    }


def _metrics(
    task: str, scores: dict[str, Any], directions: dict[str, bool]
) -> dict[str, MetricValue]:
    metrics: dict[str, MetricValue] = {}
    for key, value in scores.items():
        metric, comma, filtered = key.partition(",")
        if not comma or metric.endswith("_stderr"):
            continue
        if not math.isfinite(value):
            raise ModelError(
                f"evaluate.tasks: {metric} of task '{task}' is {value}: the model's logits are not"
                " finite; compress less, or evaluate in bfloat16 or float32"
            )
        stderr = scores.get(f"{metric}_stderr,{filtered}")
        metrics[metric if filtered == "none" else key] = MetricValue(
            value=float(value),
            stderr=_number(stderr),
            higher_is_better=directions.get(metric),
        )
    return metrics


def _number(stderr: Any) -> float | None:
    """Translate lm-eval's "N/A"; a single document gives no finite error either."""
    if stderr is None or isinstance(stderr, str) or not math.isfinite(stderr):
        return None
    return float(stderr)


def _text(version: Any) -> str | None:
    return None if version in (None, "N/A", "Yaml") else str(version)
