"""From facts to `report.json` and the model card.

`SCHEMA` documents every key of the report; a test holds a real report against it.
"""

import json
import os
import platform
import resource
import sys
from importlib import metadata, resources
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCardData
from jinja2 import Environment, StrictUndefined

from lrc.compressors.calibrate.calibration_windows import provenance
from lrc.compressors.checkpoint import format as layout
from lrc.compressors.checkpoint.reader import is_plain
from lrc.compressors.evaluate.baselines import Targets, plan_baseline
from lrc.compressors.io.journal import Journal, write_text
from lrc.compressors.layers import FORMS
from lrc.compressors.models.architecture import Architecture
from lrc.compressors.planning.required_statistics import method_needs
from lrc.compressors.prepare import Prepared
from lrc.compressors.slicing import METHODS as SLICERS

SCHEMA_VERSION = 1
SCHEMA = {
    "schema_version": "1; raised when a key changes its meaning or goes away",
    "recipe": "the recipe, written out in full",
    "seed": "the recipe's seed",
    "size.targeted.{bits,source_bits}": "of the matrices that are made smaller, stored and before",
    "size.targeted.{kept,removed}": "bits / source_bits, and 1 - that; 1 and 0 if there are none",
    "size.model.parameters.{dense,compressed}": "numbers in the whole model; tied ones once",
    "size.model.file_bytes.{dense,compressed}": "safetensors files; dense: at the recipe's dtype",
    "size.model.tensor_bytes.{dense,compressed}": "the same without the headers of the files",
    "size.source.{file_bytes,quantized}": "the weights as the source stores them; null if on a Hub",
    "size.baselines.NAME": "bytes of the same model, quantized by round-to-nearest, calculated",
    "slices[].{stage,method}": "one record a slicing stage",
    "slices[].{parameters,bytes,config}": "before and after; of the config what changes",
    "slices[].facts": "what the method had to decide, such as the layers that went",
    "layers[].{name,shape,method,form}": "one record a targeted matrix",
    "layers[].{bits,source_bits}": "as stored, and dense",
    "layers[].{scheme,rounded}": "its integers, such as int4-g64, and the stage that makes them",
    "layers[].{rank,nonzeros,atoms,groups}": "those of its form; of a dense one rank, null",
    "layers[].predicted_loss": "share of the (weighted) energy of the matrix that is lost, [0, 1]",
    "layers[].predicted_nats": "rise of the loss, nats a token; null where the method cannot tell",
    "layers[].refit": "whether it was fitted behind the compressed layers before it",
    "layers[].{note,fallback}": "why it stays dense; what deviated from the plan; null if nothing",
    "calibration": "source, tokens, bos, hashes of text and tokens; null if no method needed any",
    "evaluation.perplexity.NAME": "dense, compressed, ratio, tokens, window, windows, bos, dtype",
    "evaluation.tasks.NAME.METRIC": "dense, compressed, stderr, recovery in percent of dense",
    "evaluation.baselines[].{name,how}": "the same matrices compressed without calibration",
    "evaluation.baselines[].{bytes,kept}": "tensors of the whole model; as size.targeted.kept",
    "evaluation.baselines[].perplexity.NAME": "measured in this run; null if not finite",
    "evaluation.baseline_comparison": "which wins, result or baseline: one sentence, or null",
    "timing.seconds.STAGE": "wall time, summed over the runs that an interrupted one took",
    "memory.{peak_rss_bytes,peak_gpu_bytes}": "of the process that finished the run",
    "environment": "versions, processor, threads, device",
    "warnings": "what was planned although it is not advised",
}


def write(
    prepared: Prepared,
    journal: Journal,
    evaluation: dict[str, Any],
    seconds: dict[str, float],
    device: str,
) -> dict[str, Any]:
    """Gather the facts of a finished run and write them beside and into its checkpoint.

    Returns
    -------
    dict
        What ``report.json`` holds.
    """
    checkpoint = journal.output / "checkpoint"
    plan = journal.read_json("executed.json")
    report = {
        "schema_version": SCHEMA_VERSION,
        "recipe": prepared.recipe.model_dump(mode="json"),
        "seed": prepared.recipe.seed,
        "size": _size(plan, checkpoint, prepared),
        "slices": plan.get("slices", []),
        "layers": [_layer(m) for m in [*plan["matrices"], *plan.get("outside", [])]],
        "calibration": provenance(journal) if _reads_text(prepared) else None,
        "evaluation": evaluation,
        "timing": {"seconds": {stage: round(s, 2) for stage, s in seconds.items()}},
        "memory": _memory(device),
        "environment": _environment(device),
        "warnings": plan["warnings"],
    }
    text = json.dumps(report, indent=1, allow_nan=False) + "\n"
    card = model_card(report, plan, plain=is_plain(checkpoint))
    write_text(checkpoint / layout.REPORT, text)
    write_text(checkpoint / "README.md", card)
    write_text(journal.output / "README.md", card)
    write_text(journal.output / "report.json", text)
    return report


def stored(prepared: Prepared, journal: Journal) -> dict[str, Any] | None:
    """Return the report of an earlier run if nothing is left to do for this recipe."""
    path = journal.output / "report.json"
    if not path.is_file() or not (journal.output / "checkpoint").is_dir():
        return None
    try:
        report: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        asked = prepared.recipe.model_dump(mode="json")
        known = (report["schema_version"], report["recipe"]) == (SCHEMA_VERSION, asked)
    except (ValueError, TypeError, KeyError):  # edited: written again
        return None
    return report if known else None


def model_card(report: dict[str, Any], plan: dict[str, Any], *, plain: bool) -> str:
    """Render the model card: what it is, how it compares, how to load it, how to make it again.

    `plain` says that stock transformers loads it.
    """
    base = report["recipe"]["model"]["path"]
    on_hub = not Path(base).exists() and not base.endswith(".gguf")
    header = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["lrc", *(["low-rank"] if report["layers"] else []), "compressed"],
        **({"base_model": base} if on_hub else {}),
    )
    environment = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["mib"] = lambda n: "unknown" if n is None else f"{n / 2**20:,.1f} MiB"
    template = resources.files("lrc.compressors").joinpath("card.md.j2").read_text("utf-8")
    name = Path(base).stem if base.endswith(".gguf") else base.rstrip("/").rpartition("/")[2]
    return environment.from_string(template).render(
        header=header.to_yaml(),
        name=name,
        report=report,
        plan=plan,
        base=base,
        plain=plain,
        integers=any(layer["form"] == "integers" for layer in report["layers"]),
    )


def versions() -> dict[str, str]:
    """Return the versions of what a result depends on."""
    names = ["torch", "transformers", "safetensors", "accelerate", "datasets", "lm_eval"]
    return {"lrc": metadata.version("lrc-compress")} | {n: metadata.version(n) for n in names}


def _reads_text(prepared: Prepared) -> bool:
    """Say whether the result depends on calibration text; a profile alone reads some too."""
    sliced = any(
        SLICERS[each.method].reads_text for each in prepared.recipe.stages_of("slice").values()
    )
    recipe, matrices = prepared.recipe, prepared.plan.matrices
    compensates = any(each.compensate is not None for each in recipe.works.values())
    return sliced or compensates or any(method_needs(m, recipe) for m in matrices)


def _size(plan: dict[str, Any], checkpoint: Path, prepared: Prepared) -> dict[str, Any]:
    totals = plan["totals"]
    files = sum(f.stat().st_size for f in checkpoint.glob("*.safetensors"))
    return {
        "targeted": {
            "bits": totals["bits"],
            "source_bits": totals["source_bits"],
            "kept": totals["kept"],
            "removed": 1 - totals["kept"],
        },
        "model": {
            "parameters": {
                "dense": totals["dense_parameters"],
                "compressed": totals["compressed_parameters"],
            },
            "file_bytes": {"dense": totals["dense_bytes"], "compressed": files},
            "tensor_bytes": {
                "dense": totals["dense_bytes"],
                "compressed": totals["compressed_bytes"],
            },
        },
        "source": {
            "file_bytes": plan["source_file_bytes"],
            "quantized": plan["source_quantized"],
        },
        "baselines": _baseline_bytes(plan, prepared),
    }


def baseline_targets(plan: dict[str, Any], dense: Architecture, dtype: torch.dtype) -> Targets:
    """Read the targets of baselines from an executed plan.

    Slices change every linear of the `dense` model; `dtype` is that of the dense model's file.
    """
    if plan.get("slices"):
        shapes = {linear.name: (linear.d_out, linear.d_in) for linear in dense.linears}
    else:
        shapes = {m["name"]: (m["shape"][0], m["shape"][1]) for m in plan["matrices"]}
    for m in plan.get("outside", []):  # a slice may have made it narrower, or untied a head
        stored = dense.tied.get(f"{m['name']}.weight", f"{m['name']}.weight")
        d_out, d_in = dense.model.get_parameter(stored).shape
        shapes[stored.removesuffix(".weight")] = d_out, d_in
    totals = plan["totals"]
    return Targets(shapes, dtype, totals["dense_bytes"], totals["compressed_bytes"])


def _baseline_bytes(plan: dict[str, Any], prepared: Prepared) -> dict[str, int]:
    """Return the bytes of two baselines, for comparison where none is measured."""
    targets = baseline_targets(plan, prepared.dense, prepared.source.dtype)
    return {
        "int8_per_channel": plan_baseline("int8", targets).bytes,
        "int4_groups_of_64": plan_baseline("int4-g64", targets).bytes,
    }


def _layer(matrix: dict[str, Any]) -> dict[str, Any]:
    sizes = FORMS[matrix["form"]].SIZES if matrix["form"] in FORMS else ("rank",)
    keys = ["name", "shape", "stage", "method", "form", *sizes, "scheme", "rounded"]
    keys += ["bits", "source_bits"]
    record = {key: matrix[key] for key in keys}
    return record | {
        "predicted_loss": matrix["loss"],
        "predicted_nats": matrix["predicted_nats"],
        "refit": matrix["refit"],
        "note": matrix["note"],
        "fallback": matrix["fallback"],
    }


def _memory(device: str) -> dict[str, int | None]:
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    gpu = torch.cuda.max_memory_allocated() if device.startswith("cuda") else None
    return {"peak_rss_bytes": peak, "peak_gpu_bytes": gpu}


def _environment(device: str) -> dict[str, Any]:
    on_gpu = device.startswith("cuda")
    return {
        "versions": versions(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
    }
