"""How good a model is: perplexity, benchmark tasks, dense against compressed, quality gates."""

from lrc.compressors.evaluate.compare import check_texts, compare, evaluate_model, recovery
from lrc.compressors.evaluate.gates import check_gate_names, check_gates
from lrc.compressors.evaluate.harness import (
    MetricValue,
    TaskResult,
    check_tasks,
    run_tasks,
)
from lrc.compressors.evaluate.perplexity import PerplexityResult, check_window, perplexity

__all__ = [
    "MetricValue",
    "PerplexityResult",
    "TaskResult",
    "check_gate_names",
    "check_gates",
    "check_tasks",
    "check_texts",
    "check_window",
    "compare",
    "evaluate_model",
    "perplexity",
    "recovery",
    "run_tasks",
]
