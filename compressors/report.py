"""Write `report.json`, and the model card that is made from it.

`SCHEMA` documents every key of the report; a test compares it with a real report.
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from lrc.compressors.calibrate.calibration_windows import provenance, vocabulary_warning
from lrc.compressors.checkpoint import format as layout
from lrc.compressors.checkpoint.manifest import CHECKSUM, read_manifest, report_checksum
from lrc.compressors.compress.profile import stored_profile
from lrc.compressors.evaluate.baselines import Targets, plan_baseline
from lrc.compressors.evaluate.broken_source import near_uniform
from lrc.compressors.evaluate.domains import domain_gap, texts_read, with_domains
from lrc.compressors.evaluate.evaluator import is_current
from lrc.compressors.heal.run import training_report
from lrc.compressors.io.files import write_text
from lrc.compressors.io.journal import Journal
from lrc.compressors.io.machine import peak_resident_bytes
from lrc.compressors.io.versions import environment
from lrc.compressors.model_card import model_card
from lrc.compressors.models.source_license import stated_license
from lrc.compressors.planning.coverage import coverage_json
from lrc.compressors.planning.plan import Plan
from lrc.compressors.planning.predicted_times import predicted_times
from lrc.compressors.planning.spectra import stored_spectra
from lrc.compressors.planning.summary import summarize
from lrc.compressors.prepare import Prepared
from lrc.compressors.session import Session

ESTIMATE = "estimate.json"
"""The journal's name for the estimate with which a run has begun."""
SCHEMA_VERSION = 2
SCHEMA = {
    "schema_version": "2; raised when a key changes its meaning or is removed",
    "recipe": "the recipe, written out in full",
    "seed": "the recipe's seed",
    "size.targeted.{bits,dense_bits}": "of the targeted matrices: stored, and in model.dtype",
    "size.targeted.{kept,removed}": "bits / dense_bits, and 1 minus that; 1 and 0 without targets",
    "size.model.parameters.{dense,compressed}": "of the whole model; tied ones once",
    "size.model.file_bytes.{dense,compressed}": "safetensors files; dense: in the recipe's dtype",
    "size.model.tensor_bytes.{dense,compressed}": "the same without the headers of the files",
    "size.source.{file_bytes,quantized}": (
        "weight files, and whether quantized; null if the source was still on the Hub"
    ),
    "size.baselines.NAME": "computed bytes of the model after round-to-nearest",
    "slices[].{stage,method}": "one record per slicing stage",
    "slices[].{parameters,bytes,config}": "before and after; changed config keys",
    "slices[].facts": "decisions of the method, such as the removed layers",
    "training[].{stage,method,minutes}": "one record per stage that trains; its limit of time",
    "training[].{steps,tokens}": "what was done; of `block`, the mean number of a fit",
    "training[].{trainable,kept}": "numbers that were trained; whether the result is used",
    "training[].moved": "values that have other places; null if places are fixed",
    "training[].{before,after}": "divergence from dense on held-out text, nats per token",
    "training[].cross_entropy.{before,after}": (
        "with `cross_entropy`: of the next tokens of held-out text, nats per token; else absent"
    ),
    "training[].{losses,best_step,skipped}": (
        "of the whole model, [step, divergence, with `cross_entropy` plus its multiple]; steps "
        "without finite gradients"
    ),
    "training[].rates": "steps done at every start of training, and the learning rate from there",
    "training[].budgets[].{keep,before,after}": (
        "of an elastic checkpoint: divergence at each budget, above are means; else empty"
    ),
    "training[].layers[]": "of `block`: the same for every fit, with relative errors of outputs",
    "training[].{text,warning}": "source, hash, numbers of tokens; whether it is repeated",
    "training[].{seconds,peak_bytes}": "wall time; peak memory up to its end, of the GPU if used",
    "layers[].{name,stage,method}": "one record per targeted matrix; index of its stage",
    "layers[].config": "how it is stored: shape and components, as in config.json",
    "layers[].{bits,dense_bits}": "size as stored, and in model.dtype",
    "layers[].relative_error": (
        "weighted squared error, divided by that of replacing the weight by zero, [0, 1]"
    ),
    "layers[].predicted_nats": "predicted loss increase, nats per token; null without gradients",
    "layers[].refit": "whether it was fitted to the inputs that the compressed model produces",
    "layers[].{note,fallback}": "why it stays dense; deviations from the plan; null if none",
    "spectra[]": (
        "of the weights whose ranks an allocator has chosen: weights (names), ranks, and the "
        "fraction of the squared error of removing the weight that is lost at each rank"
    ),
    "experts": "what the experts received of the calibration text; null without experts",
    "experts.{layers,per_layer,per_token}": "layers with experts; number; selected by a token",
    "experts.coverage.{experts,tokens_min,tokens_median}": (
        "calibration tokens that they received; null if no statistics were needed"
    ),
    "experts.coverage.{needed,starved}": (
        "tokens that statistics need; number of experts with fewer, which use a fallback"
    ),
    "profile": "what `lrc plan --profile` measured before this run compressed; null if nothing",
    "profile.{windows,tokens,dense}": "of the calibration text; loss of the dense model on them",
    "profile.{divergences,increases}.NAME": (
        "KL divergence from dense and increase of the loss due to this matrix alone, nats per token"
    ),
    "latency": "predicted times, see below; null without `measure: latency`",
    "latency.{device,dtype,rows,threads,place}": "what times hold for, and the same in words",
    "latency.{dense_seconds,seconds,ratio}": "of all targeted matrices per step, and their ratio",
    "latency.forms[].{form,weights,seconds,dense_seconds}": "by the way that matrices are stored",
    "latency.{head_dense_seconds,head_seconds}": "of the output head, if quantized; else 0",
    "latency.slower_forms.FORM": "number of matrices for which it is never faster than dense",
    "calibration": "source, tokens, bos, hashes of text and tokens; null if no method needed any",
    "calibration.loss_tokens": "with `loss: answers`: tokens of the windows that count in the loss",
    "calibration.vocabulary.{used,size}": "different tokens in the windows; all of the model",
    "{calibration,training[].text}.texts[]": "of several sources: the same for each",
    "evaluation.perplexity.NAME": "dense, compressed, ratio, tokens, window, windows, bos, dtype",
    "evaluation.perplexity.NAME.stderr.{dense,compressed}": (
        "standard error, from the differences between windows; null for one window"
    ),
    "evaluation.perplexity.NAME.in_domain": (
        "whether it has the source or the hash of a text that the compression read; null if none"
    ),
    "evaluation.domain_gap": "a sentence if text that is not in domain loses much more; or null",
    "evaluation.kl.NAME.{forward,reverse}": (
        "KL divergence of compressed from dense, and the reverse, nats per token"
    ),
    "evaluation.kl.NAME.agreement": "fraction of positions with the same most likely token",
    "evaluation.kl.NAME.stderr": (
        "standard errors of the same, from the differences between windows; null for one window"
    ),
    "evaluation.kl.NAME.positions[].{context,forward,reverse,agreement,stderr}": (
        "the same by number of tokens that the predictions see, [smallest, largest]"
    ),
    "evaluation.kl.NAME.{tokens,window,windows,bos,dtype,text_sha256}": (
        "what was compared: the first windows of the perplexity text"
    ),
    "evaluation.generations[].{prompt,dense,compressed}": "greedy continuations of a prompt",
    "evaluation.generations[].{new_tokens,first_difference}": (
        "of each model; number of new tokens before the first that differs, null if none does"
    ),
    "evaluation.tasks.NAME.METRIC": "dense, compressed, stderr, recovery in percent of dense",
    "evaluation.missing[].{model,metric,reason}": "what could not be measured; exit code 1",
    "evaluation.baselines[].{name,how}": "the same matrices compressed without calibration",
    "evaluation.baselines[].{bytes,kept}": "of all tensors of the model; as size.targeted.kept",
    "evaluation.baselines[].perplexity.NAME": "measured in this run; null if not finite",
    "evaluation.baseline_comparison": "which wins, result or baseline: one sentence, or null",
    "timing.seconds.STAGE": "wall time; after an interruption, the sum over all attempts",
    "timing.cpu_seconds.STAGE": "of all threads of the process that finished the run",
    "memory.{peak_rss_bytes,peak_gpu_bytes}": "of the process that finished the run",
    "memory.peak_disk_bytes": "largest size of the output folder in that process, between steps",
    "estimate": "what was expected before the work began; null if nothing was left to do",
    "estimate.{seconds,host_bytes,gpu_bytes,disk_bytes}.STAGE": (
        "time, and the peaks of resident memory, GPU memory and the output folder"
    ),
    "estimate.processes": "number of processes, each with these peaks of memory",
    "estimate.peak.{host_bytes,gpu_bytes,disk_bytes}": "the largest of all stages; GPU or null",
    "estimate.not_estimated[]": "parts of the run that the estimate does not include",
    "environment": "versions, processor, threads, device",
    "speed": "result of `lrc bench --report`: its JSON for this model and dense; null if none",
    "warnings": (
        "parts of the source that were ignored, discouraged options, signs of a damaged source"
    ),
    "sha256": "of lrc/manifest.json and the other keys, sorted and without spaces",
}


def write(session: Session, plan: Plan, evaluation: dict[str, Any]) -> dict[str, Any]:
    """Collect the facts of a finished run; write them next to and into its checkpoint.

    Parameters
    ----------
    plan : Plan
        With results.

    Returns
    -------
    dict
        The content of ``report.json``.
    """
    prepared, checkpoint = session.prepared, session.checkpoint
    times = predicted_times(plan)
    calibration = provenance(session.journal) if _reads_text(plan) else None
    training = training_report(plan, session.journal, session.clock.seconds)
    read = texts_read([calibration, *(each["text"] for each in training if each["kept"])])
    specs = prepared.recipe.evaluate.perplexity
    perplexity = with_domains(evaluation["perplexity"], specs, read)
    gap = domain_gap(perplexity)
    evaluation = {**evaluation, "perplexity": perplexity, "domain_gap": gap}
    profile = stored_profile(plan, session.journal)
    little = vocabulary_warning(calibration)
    report = {
        "schema_version": SCHEMA_VERSION,
        "recipe": prepared.recipe.model_dump(mode="json"),
        "seed": plan.seed,
        "size": _size(plan, checkpoint, prepared),
        "slices": plan.to_json()["slices"],
        "training": training,
        "layers": [row.to_json() for row in summarize(plan)],
        "spectra": stored_spectra(session.journal),
        "experts": coverage_json(plan),
        "profile": None if profile is None else asdict(profile),
        "latency": None if times is None else times.to_json(),
        "calibration": calibration,
        "evaluation": evaluation,
        "timing": {
            "seconds": {k: round(s, 2) for k, s in session.clock.seconds.items()},
            "cpu_seconds": {k: round(s, 2) for k, s in session.clock.cpu_seconds.items()},
        },
        "memory": _memory(session),
        "estimate": stored_estimate(session.journal),
        "environment": environment(session.device),
        "speed": None,
        "warnings": [
            *plan.warnings,
            *(record.facts["warning"] for record in plan.training if record.facts.get("warning")),
            *_source_warnings(prepared, evaluation),
            *([] if gap is None else [gap]),
            *([] if little is None else [little]),
        ],
    }
    report[CHECKSUM] = report_checksum(checkpoint, report)
    text = json.dumps(report, indent=1, allow_nan=False) + "\n"
    manifest = read_manifest(checkpoint)
    assert manifest is not None
    card = model_card(
        report,
        plan,
        prepared.dense.kind,
        plain=manifest.plain,
        stated_license=stated_license(prepared.source),
    )
    write_text(checkpoint / layout.REPORT, text)
    for folder in (checkpoint, session.journal.output):
        write_text(folder / "README.md", card)
    write_text(session.journal.output / "report.json", text)  # last: the run is then complete
    return report


def stored(prepared: Prepared, journal: Journal) -> dict[str, Any] | None:
    """Return the report of an earlier run of the same recipe, if it has one."""
    path = journal.output / "report.json"
    if not path.is_file():
        return None
    try:
        report: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        requested = prepared.recipe.model_dump(mode="json")
        found = (report["schema_version"], report["recipe"], report[CHECKSUM])
        checksum = report_checksum(journal.output / "checkpoint", report)
        known = found == (SCHEMA_VERSION, requested, checksum)
        known = known and not report["evaluation"]["missing"]
    except (OSError, ValueError, TypeError, KeyError):  # edited: written again
        return None
    return report if known and is_current(journal, prepared.recipe.evaluate) else None


def _source_warnings(prepared: Prepared, evaluation: dict[str, Any]) -> list[str]:
    """Return warnings of a dense model that is no better than chance."""
    dense = {name: entry["dense"] for name, entry in evaluation["perplexity"].items()}
    return near_uniform(dense, prepared.source.config.get_text_config().vocab_size)


def _reads_text(plan: Plan) -> bool:
    """Return whether the result depends on calibration text."""
    return bool(plan.slices) or any(t.statistics or t.compensate is not None for t in plan.tasks)


def _size(plan: Plan, checkpoint: Path, prepared: Prepared) -> dict[str, Any]:
    files = sum(f.stat().st_size for f in checkpoint.glob("*.safetensors"))
    dense, compressed = plan.dense_bytes, plan.compressed_bytes
    targets = baseline_targets(plan, prepared)
    return {
        "targeted": {
            "bits": plan.bits,
            "dense_bits": plan.dense_bits,
            "kept": plan.kept,
            "removed": 1 - plan.kept,
        },
        "model": {
            "parameters": {
                "dense": plan.dense_parameters,
                "compressed": plan.compressed_parameters,
            },
            "file_bytes": {"dense": dense, "compressed": files},
            "tensor_bytes": {"dense": dense, "compressed": compressed},
        },
        "source": {
            "file_bytes": plan.model.source_file_bytes,
            "quantized": plan.model.source_quantized,
        },
        "baselines": {
            "int8_per_channel": plan_baseline("int8", targets).bytes,
            "int4_groups_of_64": plan_baseline("int4-g64", targets).bytes,
        },
    }


def baseline_targets(plan: Plan, prepared: Prepared) -> Targets:
    """Return the weights of the dense model that baselines compress, for the same comparison.

    Slicing changes all linear layers.
    """
    dense = prepared.dense
    if plan.slices:
        shapes = {linear.name: (linear.d_out, linear.d_in) for linear in dense.linears}
    else:
        shapes = {weight.name: task.shape for task in plan.tasks for weight in task.weights}
    for task in plan.embeddings:  # a slice may have made it narrower, or untied a head
        stored = dense.tied.get(f"{task.name}.weight", f"{task.name}.weight")
        d_out, d_in = dense.model.get_parameter(stored).shape
        shapes[stored.removesuffix(".weight")] = d_out, d_in
    return Targets(shapes, prepared.source.dtype, plan.dense_bytes, plan.compressed_bytes)


def stored_estimate(journal: Journal) -> dict[str, Any] | None:
    """Return the JSON values of the estimate with which a run has begun."""
    found: dict[str, Any] | None = journal.read_json(ESTIMATE) if journal.has(ESTIMATE) else None
    return found


def _memory(session: Session) -> dict[str, int | None]:
    device, peak = session.device, peak_resident_bytes()
    gpu = torch.cuda.max_memory_allocated(device) if device.startswith("cuda") else None
    disk = session.clock.disk.peak
    return {"peak_rss_bytes": peak, "peak_gpu_bytes": gpu, "peak_disk_bytes": disk}
