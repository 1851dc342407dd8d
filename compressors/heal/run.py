"""Run a stage that trains: its text, its method, and the record of what it did."""

from dataclasses import replace
from functools import partial
from typing import Any

import torch

from lrc.compressors.corpus.tokens import default_bos
from lrc.compressors.heal.added_components import with_added
from lrc.compressors.heal.block_fit import fit_blocks
from lrc.compressors.heal.distill import distill
from lrc.compressors.heal.extended_text import extended
from lrc.compressors.heal.held_out import TrainingText, mixed, repetition_warning, training_text
from lrc.compressors.heal.nuclear_norm import with_ranks
from lrc.compressors.heal.pace import Pace
from lrc.compressors.heal.text_request import TextRequest, text_requests
from lrc.compressors.heal.trained_files import (
    facts_file,
    folder,
    state_file,
    text_folder,
    usage_file,
)
from lrc.compressors.heal.work import HealWork
from lrc.compressors.io.journal import Journal
from lrc.compressors.io.machine import peak_resident_bytes
from lrc.compressors.planning.plan import Plan, TrainingRecord
from lrc.compressors.session import Session
from lrc.configs.heal import Block, Distill, HealBase, LogitFit, Scales


def requests_of(session: Session, stage: int, options: HealBase) -> list[TextRequest]:
    """Return what text a stage needs, one request for every source."""
    return text_requests(
        f"stages[{stage}].heal",
        options,
        session.calibration,
        stage=stage,
        seed=session.prepared.plan.seed,
        device=torch.device(session.device).type,
    )


def read_text(session: Session, request: TextRequest) -> TrainingText:
    """Return the windows of one source of a stage; raises as `training_text`."""
    embedding = session.prepared.dense.model.get_input_embeddings()
    sample = partial(session.sampled_windows, seed=request.seed + 1 + request.stage)
    return training_text(request, session.prepared.tokenizer, embedding, session.journal, sample)


def run_training(session: Session, plan: Plan, options: dict[int, HealBase]) -> Plan:
    """Carry out the stages that train; return the plan with their facts."""
    for record in plan.training:
        stage, journal = record.stage, session.journal
        if not journal.has(facts_file(stage)):
            with session.clock(clock_name(plan, stage)):
                pace = Pace()
                facts = _train(session, plan, record, options[stage], pace)
            usage = {
                "peak_bytes": _peak_memory(session.device),
                "tokens_per_second": pace.tokens_per_second,
            }
            journal.write_json(usage_file(stage), usage)
            journal.write_json(facts_file(stage), facts)
        done = replace(record, facts=journal.read_json(facts_file(stage)))
        training = [done if each.stage == stage else each for each in plan.training]
        plan = with_added(replace(plan, training=training), done.facts.get("added", {}))
        plan = with_ranks(plan, done.facts.get("ranks", {}))
    return plan


def clock_name(plan: Plan, stage: int) -> str:
    """Return the name under which the time of a stage is counted."""
    return "heal" if len(plan.training) == 1 else f"heal[{stage}]"


def training_files(plan: Plan) -> list[str]:
    """Return the journal's names of everything that the stages leave."""
    kinds = (folder, state_file, text_folder)
    return [name(record.stage) for record in plan.training for name in kinds]


def training_report(
    plan: Plan, journal: Journal, seconds: dict[str, float]
) -> list[dict[str, Any]]:
    """Return the records of the stages for the report."""
    return [
        {
            "stage": record.stage,
            "method": record.method,
            "minutes": record.minutes,
            **record.facts,
            "seconds": round(seconds.get(clock_name(plan, record.stage), 0.0), 2),
            **(
                journal.read_json(usage_file(record.stage))
                if journal.has(usage_file(record.stage))
                else {"peak_bytes": None, "tokens_per_second": None}
            ),
        }
        for record in plan.training
    ]


def _train(
    session: Session, plan: Plan, record: TrainingRecord, options: HealBase, pace: Pace
) -> dict[str, Any]:
    requests = requests_of(session, record.stage, options)
    texts = [read_text(session, request) for request in requests]
    if isinstance(options, LogitFit) and options.extend:
        texts = [_extended(session, *pair) for pair in zip(requests, texts, strict=True)]
    text = mixed(requests, texts)
    work = HealWork(session, plan, record.stage, options, record.steps, text, pace)
    if isinstance(options, Block):
        facts = fit_blocks(work, options)
    else:
        assert isinstance(options, Distill | Scales)
        facts = distill(work, options)
    if record.steps is not None:
        facts["steps"] = record.steps  # also if a layer had nothing to train
    warnings = (
        repetition_warning(request, each, facts["steps"])
        for request, each in zip(requests, texts, strict=True)
    )
    return {
        **facts,
        "tokens": facts["steps"] * options.batch * text.training.shape[1],
        "text": text.facts,
        "warning": "; ".join(filter(None, warnings)) or None,
    }


def _extended(session: Session, request: TextRequest, text: TrainingText) -> TrainingText:
    return extended(
        text,
        request,
        session.journal,
        bos=default_bos(session.prepared.tokenizer),
        continue_=partial(session.continued_windows, seed=request.seed + 2 + request.stage),
    )


def _peak_memory(device: str) -> int:
    """Return the peak so far: of the GPU's memory, or of the process on a CPU."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device)
    return peak_resident_bytes()
