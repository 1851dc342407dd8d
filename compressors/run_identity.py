"""What determines the bytes of a result, by which an interrupted run is recognized."""

from collections.abc import Mapping
from typing import Any

from lrc.compressors.corpus.documents import source_identity
from lrc.compressors.corpus.examples import task_identity
from lrc.compressors.io.versions import versions
from lrc.compressors.prepare import Prepared


def identity(prepared: Prepared) -> dict[str, Any]:
    """Return everything that determines the bytes of the checkpoint."""
    recipe = prepared.recipe.model_dump(mode="json", include={"calibration", "stages", "seed"})
    for key in ("memory_limit_gib", "disk_limit_gib"):
        del recipe["calibration"][key]
    if (task := prepared.recipe.calibration.task) is not None:
        recipe["calibration"]["task"]["data"] = task_identity(task)
    texts = [recipe["calibration"], *(o for stage in recipe["stages"] for o in stage.values())]
    for options in texts:
        if options.get("source") is not None:
            options["source"] = _text_identity(options["source"])
    installed, times = versions(), prepared.plan.times
    return {
        "model": prepared.source.fingerprint(),
        **recipe,
        **({} if times is None else {"latency_table": times.table.digest}),
        "user_plans": {str(k): v for k, v in prepared.plan.user_plans.items()},
        "versions": {name: installed[name] for name in ("lrc", "torch", "transformers")},
    }


def _text_identity(source: str | Mapping[str, float]) -> str | list[list[str | float]]:
    if isinstance(source, str):
        return source_identity(source)
    return [[source_identity(name), fraction] for name, fraction in source.items()]
