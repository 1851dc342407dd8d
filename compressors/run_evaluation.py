"""Evaluation of a run: the dense and the compressed model, and the baselines."""

from dataclasses import replace
from typing import Any

import torch

from lrc.compressors import report
from lrc.compressors.checkpoint.reader import load_checkpoint, load_tokenizer
from lrc.compressors.estimates.workload import Workload
from lrc.compressors.evaluate.evaluator import Evaluator
from lrc.compressors.evaluate.streaming_rule import why_too_large
from lrc.compressors.io.machine import free_memory
from lrc.compressors.session import Session
from lrc.compressors.stages.compress_weights import executed_plan
from lrc.compressors.streamed.checkpoint_layers import open_checkpoint
from lrc.compressors.streamed.streamed_evaluation import StreamedEvaluation


def warn_of_missing_tasks(session: Session) -> None:
    """Warn of scores that will be missing because they need whole models."""
    evaluate = session.prepared.recipe.evaluate
    sizes = Workload(session.prepared, session.device).model_bytes
    name, n_bytes = ("dense", sizes.dense) if evaluate.dense else ("compressed", sizes.compressed)
    reason = why_too_large(n_bytes, name, session.device)
    if reason and evaluate.tasks.names:
        session.machine.on_warning(f"evaluate.tasks: {reason}")


def evaluate_run(session: Session) -> dict[str, Any]:
    """Score the dense and the compressed model and the baselines.

    Returns
    -------
    dict
        The key ``evaluation`` of the report.
    """
    models, prepared, executed = session.models, session.prepared, executed_plan(session)
    assert executed is not None
    recipe = prepared.recipe
    trusted = recipe.model.trust_remote_code
    targets = report.baseline_targets(executed, prepared)
    work = Workload(replace(prepared, plan=executed), session.device)
    streaming = StreamedEvaluation(
        {
            "dense": models.dense_files,
            "compressed": lambda: open_checkpoint(
                session.checkpoint, dtype=models.dtype, trust_remote_code=trusted
            ),
        },
        journal=session.journal,
        device=session.device,
        memory_limit_gib=session.calibration.memory_limit_gib / session.processes.size,
        on_step=session.on_step,
        processes=session.processes,
    )
    streamed = session.processes.agree(work.streams(free_memory(session.device)))
    evaluator = Evaluator(
        recipe.evaluate,
        recipe.seed,
        session.journal,
        session.clock,
        session.on_step,
        precision={"dtype": str(models.dtype), "device": torch.device(session.device).type},
        sizes=work.model_bytes,
        load_tokenizer=lambda: load_tokenizer(session.checkpoint, trust_remote_code=trusted),
        load_dense=lambda: models.load_dense(models.dtype),
        load_compressed=lambda: load_checkpoint(
            session.checkpoint,
            dtype=models.dtype,
            device=session.device,
            trust_remote_code=trusted,
        ),
        streaming=streaming if streamed else None,
        processes=session.processes,
    )
    return evaluator.add_baselines(evaluator.evaluate(targets), targets)
