"""Perplexity, benchmark tasks, comparison with the dense model and baselines, quality gates."""

from lrc.compressors.evaluate.gates import check_gate_names, check_gates
from lrc.compressors.evaluate.harness import check_tasks, run_tasks
from lrc.compressors.evaluate.perplexity import PerplexityResult, check_window, perplexity
from lrc.compressors.evaluate.scores import check_texts, compare, evaluate_model, recovery

__all__ = [
    "PerplexityResult",
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
