"""The model card: what a checkpoint is, with metadata and results in the format of the Hub."""

from collections.abc import Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from jinja2 import Environment, StrictUndefined

from lrc.compressors.corpus.hub import HUB_SOURCES
from lrc.compressors.models.model_kinds import CAUSAL, ModelKind
from lrc.compressors.models.source import is_on_hub
from lrc.compressors.planning.plan import Plan
from lrc.configs.size import MIB

DIGITS = 4
"""Of results, after the decimal point."""


def model_card(
    report: dict[str, Any],
    plan: Plan,
    kind: ModelKind = CAUSAL,
    *,
    plain: bool,
    stated_license: Mapping[str, str] | None = None,
) -> str:
    """Render the model card: contents, comparison, loading, provenance.

    `plain` states that transformers loads the checkpoint without lrc. `stated_license` has the keys
    of a model card that state the licence of the source.
    """
    base = report["recipe"]["model"]["path"]
    local = Path(base).expanduser()
    on_hub = is_on_hub(base)
    name = base.rpartition("/")[2] if on_hub else local.resolve().name.removesuffix(".gguf")
    types = {c["type"] for layer in report["layers"] for c in layer["config"]["components"]}
    stated = stated_license or {}
    results = [*evaluation_results(report, kind.pipeline)]
    header = ModelCardData(
        library_name="transformers",
        pipeline_tag=kind.pipeline,
        tags=["lrc", "compressed", *sorted(each.replace("_", "-") for each in types - {"dense"})],
        base_model=base if on_hub else None,
        model_name=f"{name}, compressed" if results else None,
        eval_results=results or None,
        license=stated.get("license"),
        license_name=stated.get("license_name"),
        license_link=stated.get("license_link"),
    )
    environment = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["mib"] = lambda n: "unknown" if n is None else f"{n / MIB:,.1f} MiB"
    template = resources.files("lrc.compressors").joinpath("card.md.j2").read_text("utf-8")
    return environment.from_string(template).render(
        header=header.to_yaml(),
        name=name,
        report=report,
        architecture=plan.model.architecture,
        unchanged=plan.model.unchanged,
        dtype=plan.model.dtype,
        base=base if on_hub else name,
        plain=plain,
        auto_class=kind.auto_class.__name__,
        integers="dense" in types,
    )


def evaluation_results(report: dict[str, Any], pipeline: str) -> Iterator[EvalResult]:
    """Return the scores of the compressed model, each with the data set it was measured on."""
    evaluate = report["recipe"]["evaluate"]
    sources = {spec["name"]: spec["source"] for spec in evaluate["perplexity"]}
    for name, text in report["evaluation"]["perplexity"].items():
        part = HUB_SOURCES.get(sources.get(name, ""), {}).get("evaluation")
        yield EvalResult(
            task_type=pipeline,
            dataset_type=name if part is None else part.path,
            dataset_name=name,
            dataset_config=None if part is None else part.config,
            dataset_split=None if part is None else part.split,
            metric_type="perplexity",
            metric_name=f"perplexity per token, windows of {text['window']:,} tokens",
            metric_value=round(text["compressed"], DIGITS),
        )
    for task, metrics in report["evaluation"]["tasks"].items():
        for metric, value in metrics.items():
            if isinstance(value, Mapping):
                yield EvalResult(
                    task_type=pipeline,
                    dataset_type=task,
                    dataset_name=task,
                    metric_type=metric,
                    metric_value=round(value["compressed"], DIGITS),
                )
