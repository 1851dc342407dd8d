"""What needs the dense and the compressed model at the same time: predictions, continuations.

`evaluate_model` scores one model; the scores here are of a pair. They have the same form: JSON
values, with the reason for everything that could not be measured.
"""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import asdict
from functools import partial

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lrc.compressors.corpus.windows import Windows, evaluation_windows
from lrc.compressors.distributed.processes import ALONE, Processes
from lrc.compressors.evaluate.agreement import Agreement, compare_predictions
from lrc.compressors.evaluate.generations import compare_continuations, read_prompts
from lrc.compressors.evaluate.scores import Scores, attempt
from lrc.compressors.evaluate.task_metrics import SIMILARITY, task_metrics
from lrc.compressors.evaluate.task_scores import similarity_metric
from lrc.compressors.io.machine import OnStep, free_memory
from lrc.configs.errors import LrcError
from lrc.configs.recipe import Evaluate, Perplexity
from lrc.configs.size import GIB

OUT_OF_MEMORY = (MemoryError, torch.OutOfMemoryError)


def unmeasured_pair(evaluate: Evaluate) -> Scores:
    """Return the scores of a pair of which nothing has been measured."""
    wanted = [f"kl.{spec.name}" for spec in evaluate.compared_texts]
    wanted += [f"generations.{i}" for i in range(len(read_prompts(evaluate.generations)))]
    if evaluate.task is not None and SIMILARITY in task_metrics(evaluate):
        wanted.append(f"tasks.{evaluate.task.name}.{SIMILARITY}")
    return {
        "kl": {},
        "generations": {},
        "similarity": {},
        "missing": dict.fromkeys(wanted, "not measured yet"),
    }


def evaluate_pair(
    load: Callable[[], tuple[PreTrainedModel, PreTrainedModel]],
    tokenizer: PreTrainedTokenizerBase,
    evaluate: Evaluate,
    scores: Scores,
    *,
    on_step: OnStep,
    processes: Processes = ALONE,
) -> Scores:
    """Measure what `scores` of a pair lack.

    If the models do not fit into memory together, the reason is noted for all that is missing.

    Parameters
    ----------
    load : callable
        Returns the dense and the compressed model.
    tokenizer : PreTrainedTokenizerBase
        Of both.
    evaluate : Evaluate
    scores : dict
        From `unmeasured_pair`, or from an earlier call.
    on_step : callable
        Called with progress; may raise to stop.
    processes : Processes
        They divide the windows of texts; the first one writes the continuations.

    Returns
    -------
    dict
        ``{"kl": {NAME: {...}}, "generations": {NUMBER: {...}}, "similarity": {NAME: {...}},
        "missing": {"kl.NAME", "generations.NUMBER" or "tasks.NAME.similarity": REASON}}``.
    """
    scores = deepcopy(scores)
    missing = scores["missing"]
    try:
        dense, compressed = load()
        for spec in evaluate.compared_texts:
            measure = partial(agreement_entry, dense, compressed, tokenizer, spec, evaluate)
            measure = partial(measure, on_step, processes)
            found = attempt(missing, f"kl.{spec.name}", measure, LrcError)
            scores["kl"] |= {spec.name: found} if found else {}
        if (task := evaluate.task) is not None:
            key = f"tasks.{task.name}.{SIMILARITY}"
            measure = partial(similarity_metric, dense, compressed, tokenizer, task, on_step)
            found = attempt(missing, key, measure, LrcError)
            scores["similarity"] |= {task.name: {SIMILARITY: found}} if found else {}
        prompts = read_prompts(evaluate.generations) if processes.first else []
        for number, prompt in enumerate(prompts):
            write = partial(compare_continuations, dense, compressed, tokenizer, prompt)
            write = partial(write, evaluate.generations.tokens)
            # transformers raises nearly anything, for example for a prompt that is too long.
            found = attempt(missing, f"generations.{number}", write, Exception)
            scores["generations"] |= {str(number): found} if found else {}
            on_step("generations", number + 1, len(prompts))
    except OUT_OF_MEMORY as error:
        if isinstance(error, torch.OutOfMemoryError) and not processes.alone:
            raise  # the others may have enough
        text = " ".join(str(error).split())[:200] or "no details"
        reason = (
            f"both models do not fit into memory at the same time ({text}); use a device with more"
            " memory, or set kl_tokens to 0 and remove generations"
        )
        missing |= dict.fromkeys({*missing} & {*unmeasured_pair(evaluate)["missing"]}, reason)
    return scores


def agreement_entry(
    dense: PreTrainedModel,
    compressed: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    spec: Perplexity,
    evaluate: Evaluate,
    on_step: OnStep,
    processes: Processes = ALONE,
) -> Scores:
    """Compare predictions on the first ``evaluate.kl_tokens`` tokens of a text.

    At least one window is compared.
    """
    first = spec.model_copy(update={"windows": compared_windows(spec, evaluate)})
    windows = evaluation_windows(first, tokenizer)
    on_window = partial(on_step, f"KL {spec.name}")
    found = compare_predictions(
        dense, compressed, windows, on_window=on_window, processes=processes
    )
    return agreement_scores(found, windows)


def compared_windows(spec: Perplexity, evaluate: Evaluate) -> int:
    """Return the highest number of windows on which predictions are compared."""
    most = max(1, evaluate.kl_tokens // spec.window)
    return min(most, spec.windows or most)


def agreement_scores(found: Agreement, windows: Windows) -> Scores:
    """Return how closely two models predict the same on windows, as JSON values."""
    result = asdict(found)
    return {
        **_flat(result),
        # A list, as it is read back.
        "positions": [
            {**_flat(each), "context": list(each["context"])} for each in result["positions"]
        ],
        "text_sha256": windows.sha256,
    }


def refuse_pair(n_bytes: int, device: str, processes: Processes = ALONE) -> None:
    """Raise `MemoryError` if `n_bytes` exceed the free memory of the host, on which models run.

    Linux ends a process that uses more memory than there is; a GPU raises an error by itself.
    """
    if torch.device(device).type == "cpu" and n_bytes > (
        free := processes.agree(free_memory(device))
    ):
        raise MemoryError(
            f"they take at least {n_bytes / GIB:.1f} GiB, and {free / GIB:.1f} GiB are free"
        )


def _flat(entry: Scores) -> Scores:
    """Move the means of an entry to its top level."""
    return {**entry["mean"], **{key: value for key, value in entry.items() if key != "mean"}}
