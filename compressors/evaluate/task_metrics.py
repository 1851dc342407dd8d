"""The metrics that are measured on the examples of a task."""

from lrc.configs.recipe import Evaluate

ACCURACY, SIMILARITY, PERPLEXITY = "accuracy", "similarity", "perplexity"


def task_metrics(evaluate: Evaluate) -> list[str]:
    """Return the metrics that are measured on `Evaluate.task`."""
    if evaluate.task is None:
        return []
    if evaluate.task.target is not None:
        return [PERPLEXITY]
    measured = {ACCURACY: evaluate.task.label is not None, SIMILARITY: evaluate.dense}
    return [name for name, wanted in measured.items() if wanted]
