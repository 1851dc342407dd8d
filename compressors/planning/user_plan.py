"""Plan files that an earlier run wrote and a user may have edited: read and checked.

Of every task only the names of its weights and its configuration are used.
"""

import json
from bisect import bisect_left
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lrc.compressors.layers import COMPONENTS, WeightConfig
from lrc.compressors.methods.base import FixedSizeMethod, Method
from lrc.compressors.planning.plan import PLAN_VERSION
from lrc.compressors.planning.problems import Problems
from lrc.compressors.planning.tasks import LayerTask

SHOWN = 10
"""Problems that are listed; a plan of another model is wrong everywhere."""
MAX_BYTES = 10**8
"""A plan takes about half a kilobyte per weight; a larger file was named by mistake."""
REMEDY = "name the plan.json that an earlier run of lrc compress wrote"


@dataclass(frozen=True)
class UserPlan:
    """A plan file."""

    path: str
    text: str
    configs: dict[tuple[str, ...], WeightConfig]
    """Names of the weights of a task -> its configuration."""
    embeddings: dict[tuple[str, ...], WeightConfig]
    """The same of embedding and head."""


def read_user_plan(path: str, where: str, problems: Problems) -> UserPlan | None:
    """Read a plan file; None if it is not one, with the reason in `problems`."""
    key = f"{where}.plan"
    try:
        with Path(path).expanduser().open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        problems.add("unreadable-file", key, f"{path} cannot be read: {reason}; {REMEDY}")
        return None
    try:
        if len(data) > MAX_BYTES:
            raise ValueError(f"larger than {MAX_BYTES:,} bytes")
        text = data.decode("utf-8")
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        problems.add("invalid-user-plan", key, f"{path} is not JSON ({error}); {REMEDY}")
        return None
    values = values if isinstance(values, dict) else {}
    wrong: str | None = None
    if not isinstance(values.get("tasks"), list):
        wrong = "is of format version 1" if "matrices" in values else "contains no list 'tasks'"
    elif values.get("version") != PLAN_VERSION:
        got = values.get("version")
        wrong = f"'version' must be {PLAN_VERSION}, got {got!r:.60}"
    if wrong is not None:
        problems.add("invalid-user-plan", key, f"{path}: {wrong}; {REMEDY}")
        return None
    found = Problems()
    configs, embeddings = (_configs(key, values, path, found) for key in ("tasks", "embeddings"))
    _report(found, path, problems)
    return None if found else UserPlan(path, text, configs, embeddings)


def check_names(
    plan: UserPlan, targeted: Collection[str], known: Collection[str], problems: Problems
) -> None:
    """Report weights that no stage targets, or that the model does not have."""
    found = Problems()
    unknown = (
        "is not a decoder linear layer of this model; use the plan of a run on the same "
        "architecture"
    )
    ignored = "is not targeted by any stage; delete it there, or change 'targets' and 'ignore'"
    for name in (name for names in plan.configs for name in names):
        if name not in known:
            found.add("unknown-layer", f"{plan.path}: {name}", unknown)
        elif name not in targeted:
            found.add("not-targeted", f"{plan.path}: {name}", ignored)
    _report(found, plan.path, problems)


def apply_user_plan(
    plan: UserPlan, tasks: Sequence[LayerTask], method: Method, problems: Problems
) -> list[LayerTask]:
    """Return tasks with the configurations of a plan file; dense where there is a problem."""
    found = Problems()
    configs = [_config_for(plan, task, method, found) for task in tasks]
    _report(found, plan.path, problems)
    return [
        task.with_config(config)
        if config is not None and config.compressed
        else task.kept_dense(None if config is None else "dense in the given plan")
        for task, config in zip(tasks, configs, strict=True)
    ]


def _configs(
    key: str, values: dict[str, Any], path: str, found: Problems
) -> dict[tuple[str, ...], WeightConfig]:
    """Read the list of tasks under a key; problems are added to `found`."""
    records = values.get(key, [])
    if not isinstance(records, list):
        found.add(
            "invalid-user-plan", path, f"'{key}' must be a list, got {records!r:.60}; {REMEDY}"
        )
        return {}
    configs: dict[tuple[str, ...], WeightConfig] = {}
    seen: set[str] = set()
    for number, record in enumerate(records):
        names = _names(record)
        if names is None:
            found.add(
                "invalid-user-plan", f"{path}: {key}[{number}]", "has no 'weights' with names"
            )
            continue
        twice = seen & {*names}
        if twice:
            found.add("invalid-user-plan", f"{path}: {min(twice)}", "is listed twice; delete one")
        seen |= {*names}
        try:
            configs[names] = WeightConfig.from_json(record.get("config")).at_budget(0)
        except ValueError as error:
            found.add("invalid-user-plan", f"{path}: {names[0]}", f"'config' {error}; correct it")
    return configs


def _names(record: Any) -> tuple[str, ...] | None:
    try:
        names = tuple(weight["name"] for weight in record["weights"])
    except (TypeError, KeyError):
        return None
    return names if names and all(isinstance(name, str) for name in names) else None


def _config_for(
    plan: UserPlan, task: LayerTask, method: Method, found: Problems
) -> WeightConfig | None:
    """Return the configuration of a task in a plan file, if the task can have it."""

    def refuse(code: str, message: str) -> None:
        found.add(code, f"{plan.path}: {task.name}", message)

    config = plan.configs.get(tuple(w.name for w in task.weights))
    if config is None:
        together = f" as one task with {task.weights[1].name}" if len(task.weights) > 1 else ""
        refuse(
            "missing-layer",
            f"is targeted but not listed{together}; add it, or list it under 'ignore'",
        )
        return None
    if config.shape != task.shape:
        refuse(
            "unequal-shapes",
            f"must have the shape {list(task.shape)} of the model, got {list(config.shape)}; use "
            "the plan of a run on the same model",
        )
        return None
    config = _before_quantization(config, task, method)
    if not config.compressed:
        return config
    one = len(task.weights) > 1 or isinstance(method, FixedSizeMethod)
    allowed = [task.types] if one else [*method.types]
    if method.chooses_quantization:
        allowed.append("dense")
    if config.types not in allowed:
        refuse(
            "wrong-component",
            f"components must be of type {' or '.join(allowed)} here, got {config.types}; correct "
            "it, or change the method",
        )
        return None
    problem = _size_problem(task, config)
    if problem is not None:
        refuse("size-out-of-range", problem)
        return None
    return config


def _before_quantization(config: WeightConfig, task: LayerTask, method: Method) -> WeightConfig:
    """Return a configuration as the decomposition leaves it.

    Plans also show what a later stage quantizes; that stage decides about it.
    """
    components = tuple(
        replace(c, shares=None, pattern=task.pattern if c.type in task.types else c.pattern)
        for c in config.components
    )
    if not method.chooses_quantization:
        if components and components[0].type in ("dense", "block_sparse"):
            return WeightConfig(config.shape)
        components = tuple(c.with_quantization(None) for c in components)
    return task.with_components(components)


def _size_problem(task: LayerTask, config: WeightConfig) -> str | None:
    """Return why a task cannot have the sizes of a configuration, or gains nothing by them."""
    types, shape = config.types, task.stacked_shape
    largest: dict[str, int] = {}
    try:
        for kind in (COMPONENTS[c.type] for c in config.components):
            steps = kind.largest_step(*shape, pattern=task.pattern)
            largest |= kind.sizes_at(steps, *shape, ratio=task.ratio)
    except ValueError as error:  # no weight of that shape can have the pattern
        return f"{error}; make the weight dense"
    for name, size in config.sizes.items():
        if size > largest[name]:
            return (
                f"{name} must be in [1, {largest[name]}] for {list(task.shape)}, got {size}; lower "
                "it, or make the weight dense"
            )
    try:
        bits = task.bits_of(config)
    except ValueError as error:  # sizes that contradict each other or the group size
        return f"{error}; correct it, or make the weight dense"
    if bits < task.dense_bits:
        return None
    if not config.sizes:
        return (
            f"integers of {config.quantization} take as much as the dense weight; use others, or "
            "make it dense"
        )
    fitting, name = _largest_fitting(task, config)
    remedy = f"lower {name} to at most {fitting}" if fitting else f"lower {' and '.join(largest)}"
    return (
        f"{types} with {name} {config.sizes[name]} takes as much as the dense weight; {remedy}, or "
        "make the weight dense"
    )


def _largest_fitting(task: LayerTask, config: WeightConfig) -> tuple[int, str]:
    """Return the largest value of the last size that makes the weight smaller, and its name."""
    last = config.components[-1]
    name = list(last.sizes)[-1]
    args = last.quantization
    step = args.row_multiple if args is not None and name == "rank" else 1

    def bits(size: int) -> int:
        changed = replace(last, sizes={**last.sizes, name: size})
        return task.bits_of(replace(config, components=(*config.components[:-1], changed)))

    fitting = bisect_left(range(step, last.sizes[name], step), task.dense_bits, key=bits)
    return step * fitting, name


def _report(found: Problems, path: str, problems: Problems) -> None:
    """Add the first problems and the number of the others."""
    problems += found[:SHOWN]
    if len(found) > SHOWN:
        problems.add("more-problems", path, f"and {len(found) - SHOWN} more problems")
