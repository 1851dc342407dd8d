"""The results of a benchmark as JSON. `SCHEMA` documents every key."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lrc.compressors.benchmark.grid import SEED, Settings
from lrc.compressors.benchmark.measure import IN_TURN, Measured, Samples
from lrc.compressors.benchmark.measured_models import Target
from lrc.compressors.benchmark.predictions import predicted_ratio
from lrc.compressors.benchmark.timing import paired_ratio, speed_of
from lrc.compressors.io.versions import environment

SCHEMA_VERSION = 1
SCHEMA = {
    "schema_version": "1; raised when a key changes its meaning or is removed",
    "against": "the dense model of the ratios; null if there are none",
    "settings.{modes,batches,prompts,tokens}": "the grid; tokens are the decoding steps",
    "settings.{repeats,seconds,seed}": "rounds; their time per point, or null; of the prompts",
    "settings.dtype": "precision of the computation",
    "settings.together": "whether all models were in memory, and took turns within each round",
    "environment": "versions, processor, threads, device",
    "notes": "what limits the results",
    "models[].{name,dense}": "one record per model, the dense one first",
    "models[].file_bytes": "its safetensors files; of a GGUF file, after conversion",
    "models[].weight_bytes": "parameters and buffers in memory; null if it was not loaded",
    "models[].resident_bytes": "growth of memory by loading: allocated on a GPU, or resident set",
    "models[].load_peak_bytes": "largest growth while it was loaded",
    "models[].load_seconds": "from cached files until all weights are read; hashes are compared",
    "models[].slow_forms[].{form,layers,example,reason}": (
        "weights without a fast path on the device: component, pattern, quantization; number, name"
    ),
    "results[].{model,repeated}": "one record per turn; true for the dense model measured again",
    "results[].{mode,batch,prompt,tokens}": "the point of the grid",
    "results[].rounds": "number of measurements",
    "results[].{prefill,decode}": "speed in tokens per second, see below; null if it failed",
    "results[].PHASE.{median,p10,p90}": "over the rounds",
    "results[].PHASE.ratio": "median over the rounds of the speed relative to dense; null if none",
    "results[].PHASE.verdict": "faster, slower, or equal within the noise; null without a ratio",
    "results[].predicted_ratio": (
        "decode speed relative to dense by the predicted times in its report; null without them or "
        "if they hold for another batch size, mode, dtype, device or number of threads"
    ),
    "results[].peak_bytes": "largest use of memory by the model while it runs, weights included",
    "results[].failed": "why it could not be measured, or null; exit code 1",
    "noise[].{mode,batch,prompt,prefill,decode}": "difference of dense from dense repeated",
}


def results_json(
    measured: Measured,
    targets: Sequence[Target],
    settings: Settings,
    *,
    device: str,
    dtype: torch.dtype,
    dense: bool,
    notes: Sequence[str],
) -> dict[str, Any]:
    """Return what was measured, as `SCHEMA` documents it.

    Parameters
    ----------
    dense : bool
        Whether the first target is the dense model.
    notes : sequence of str
        Notes to add to those about the measurement.
    """
    results, noises = [], []
    for point in measured.points:
        slots = [measured.samples[slot, point] for slot in range(len(measured.order))]
        noise = _noise(slots) if dense else {"prefill": None, "decode": None}
        place = {"mode": str(point.mode), "batch": point.batch, "prompt": point.prompt}
        if dense:
            noises.append({**place, **noise})
        for slot, (index, samples) in enumerate(zip(measured.order, slots, strict=True)):
            repeated = slot >= len(targets)
            read, written = point.batch * point.prompt, point.batch * point.tokens
            ratios = _ratios(slot, slots, repeated=repeated) if dense else {}
            speeds: dict[str, Any] = {"prefill": None, "decode": None}
            for phase, tokens in (("prefill", read), ("decode", written)):
                seconds = getattr(samples, phase)
                if seconds and samples.failed is None:
                    ratio, limit = ratios.get(phase), None if repeated else noise[phase]
                    speeds[phase] = speed_of(seconds, tokens, ratio=ratio, noise=limit).to_json()
            results.append(
                {
                    "model": targets[index].name,
                    "repeated": repeated,
                    **place,
                    "tokens": point.tokens,
                    "rounds": len(samples.decode),
                    **speeds,
                    "predicted_ratio": predicted_ratio(
                        targets[index].folder, point, slots[0], device=device, dtype=dtype
                    )
                    if dense and index
                    else None,
                    "peak_bytes": samples.peak_bytes,
                    "failed": samples.failed,
                }
            )
    return {
        "schema_version": SCHEMA_VERSION,
        "against": targets[0].name if dense else None,
        "settings": {
            "modes": [str(mode) for mode in settings.modes],
            "batches": list(settings.batches),
            "prompts": list(settings.prompts),
            "tokens": settings.tokens,
            "repeats": settings.repeats,
            "seconds": settings.seconds,
            "seed": SEED,
            "dtype": str(dtype).removeprefix("torch."),
            "together": measured.together,
        },
        "environment": environment(device),
        "notes": [*notes, *([] if measured.together else [IN_TURN])],
        "models": [
            _model(target, measured, slot, dense=dense) for slot, target in enumerate(targets)
        ],
        "results": results,
        "noise": noises,
    }


def failures(report: dict[str, Any]) -> list[str]:
    """Return one sentence for every model and reason that something could not be measured."""
    places: dict[tuple[str, str], dict[str, None]] = {}
    for each in report["results"]:
        if each["failed"] is not None:
            place = f"{each['mode']}, batch {each['batch']}, prompt {each['prompt']}"
            places.setdefault((each["model"], each["failed"]), {})[place] = None
    return [
        f"{model}: not measured ({'; '.join(where)}): {reason}"
        for (model, reason), where in places.items()
    ]


PHASES = ("prefill", "decode")


@dataclass(frozen=True)
class Slower:
    """A model that is slower than dense in some measurements."""

    model: str
    places: tuple[str, ...]
    """Phase, point and ratio of each, such as ``decode (eager, batch 1, prompt 64) 0.87x``."""
    compared: int
    """Number of measurements with a ratio."""


def slower_models(report: dict[str, Any]) -> list[Slower]:
    """Return the models that are slower than dense in some measurement."""
    found: dict[str, list[str]] = {}
    count: dict[str, int] = {}
    for each in report["results"]:
        for phase in PHASES:
            if each["repeated"] or not each[phase] or each[phase]["ratio"] is None:
                continue
            count[each["model"]] = count.get(each["model"], 0) + 1
            if each[phase]["verdict"] == "slower":
                point = f"({each['mode']}, batch {each['batch']}, prompt {each['prompt']:,})"
                place = f"{phase} {point} {each[phase]['ratio']:.2f}x"
                found.setdefault(each["model"], []).append(place)
    return [Slower(model, tuple(places), count[model]) for model, places in found.items()]


def _model(target: Target, measured: Measured, slot: int, *, dense: bool) -> dict[str, Any]:
    loading = measured.loading.get(slot)
    return {
        "name": target.name,
        "dense": dense and slot == 0,
        "file_bytes": target.file_bytes,
        "weight_bytes": None if loading is None else loading.weight_bytes,
        "resident_bytes": None if loading is None else loading.resident_bytes,
        "load_peak_bytes": None if loading is None else loading.peak_bytes,
        "load_seconds": None if loading is None else loading.seconds,
        "slow_forms": [form.to_json() for form in measured.slow.get(slot, [])],
    }


def _ratios(slot: int, slots: Sequence[Samples], *, repeated: bool) -> dict[str, float | None]:
    """Return the speed of a slot relative to dense; the repeated one is compared with the first."""
    if slot == 0:
        return {}
    first, last, own = slots[0], slots[-1], slots[slot]
    return {
        phase: paired_ratio(
            getattr(own, phase), getattr(first, phase), None if repeated else getattr(last, phase)
        )
        for phase in ("prefill", "decode")
    }


def _noise(slots: Sequence[Samples]) -> dict[str, float | None]:
    """Return by how much the two results of the dense model differ."""
    ratios = _ratios(len(slots) - 1, slots, repeated=True)
    return {phase: None if ratio is None else abs(ratio - 1) for phase, ratio in ratios.items()}
