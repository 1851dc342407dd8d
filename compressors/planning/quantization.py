"""Checks of quantization stages: which weights cannot be quantized as requested."""

from collections.abc import Collection, Mapping
from math import gcd

from lrc.compressors.layers import COMPONENTS, QuantizationArgs
from lrc.compressors.planning.problems import Problems
from lrc.compressors.planning.tasks import LayerTask, QuantizationTask

SMALLEST_GROUP = 8
"""Smallest advisable group size: with 16-bit scales, smaller groups add over two bits a number."""


def check_correction(
    where: str, quantize: QuantizationTask, tasks: Collection[LayerTask], problems: Problems
) -> None:
    """Report a low-rank correction as large as the weight that it corrects."""
    if quantize.correction is None or not tasks:
        return
    rank, narrowest = quantize.correction_rank, min(tasks, key=lambda t: min(t.shape))
    if rank >= min(narrowest.shape):
        problems.add(
            "rank-out-of-range",
            f"{where}.low_rank_correction.rank",
            f"must be below {min(narrowest.shape)}, the smaller dimension of {narrowest.name} "
            f"{list(narrowest.shape)}, got {rank}; lower it, or list such layers under 'ignore'",
        )


def check_shared(where: str, tasks: Collection[LayerTask], problems: Problems) -> None:
    """Report compensation of layers that share a factor, which are solved together."""
    shared = next((t for t in tasks if len(t.weights) > 1), None)
    if shared is not None:
        problems.add(
            "shared-factor",
            f"{where}.compensate",
            f"must be left out where layers share a factor, got {shared.weights[1].name}, which "
            f"shares the factor of {shared.name}; leave compensate out, or list such layers under "
            "'ignore'",
        )


def check_growth(
    where: str,
    quantize: QuantizationTask,
    before: Collection[LayerTask],
    after: Collection[LayerTask],
    problems: Problems,
) -> None:
    """Report integers that take, with scales and corrections, as much as what they replace."""
    args = quantize.args
    assert args is not None
    for old, new in zip(before, after, strict=True):
        if new.bits < old.bits:
            continue
        key, got, remedy = "bits", args.bits, "lower it"
        if quantize.correction is not None:
            key, got = "low_rank_correction.rank", quantize.correction_rank
        elif args.group_size is not None:
            key, got, remedy = "group_size", args.group_size, "raise it"
        problems.add(
            "no-saving",
            f"{where}.{key}",
            f"must make {old.name} {list(old.shape)} smaller than its {old.bits // 8:,} bytes, got "
            f"{got}, which results in {new.bits // 8:,} bytes; {remedy}, or list the layer under "
            "'ignore'",
        )


def check_sparsity(
    where: str, quantize: QuantizationTask, tasks: Collection[LayerTask], problems: Problems
) -> None:
    """Report the removal of groups from weights that an earlier stage decomposes."""
    taken = [t for t in tasks if t.compressed]
    if quantize.sparsity is None or not taken:
        return
    more = f" and {len(taken) - 1} more" if len(taken) > 1 else ""
    problems.add(
        "already-decomposed",
        f"{where}.method",
        "gqsa removes groups of layers that no earlier stage decomposes, got "
        f"{taken[0].name}{more} of stages[{taken[0].stage}]; list them under 'ignore', or use "
        "method: gptq",
    )


def check_groups(
    where: str, args: QuantizationArgs, tasks: Collection[LayerTask], problems: Problems
) -> None:
    """Report a group size that does not divide the rows of some matrices."""
    group = args.group_size
    if group is None:
        return
    rows = {t.name: _rows(t) for t in tasks}
    wrong = {name: [w for w in widths if w % group] for name, widths in rows.items()}
    wrong = {name: widths for name, widths in wrong.items() if widths}
    if not wrong:
        return
    common = gcd(*(width for widths in rows.values() for width in widths))
    largest = max(n for n in range(1, min(common, group) + 1) if common % n == 0)
    remedy = f"set group_size: {largest}, which divides all"
    if all(t.config.compressed for t in tasks if t.name in wrong):
        remedy = "make their ranks multiples of it"
    elif largest < SMALLEST_GROUP:
        remedy = "leave group_size out, for one scale per row"
    problems.add(
        "indivisible-rows",
        f"{where}.group_size",
        f"must divide the rows of the matrices, got {group} for {_summary(wrong)}; {remedy}, or "
        "list these layers under 'ignore'",
    )


def _rows(task: LayerTask) -> list[int]:
    """Return the row lengths of all matrices of a task, as far as they are known."""
    config = task.config
    if not config.compressed:
        return [config.shape[1]]
    return [
        spec.shape[-1]
        for component in config.components
        for spec in COMPONENTS[component.type].tensors(*config.shape, component).values()
        if spec.role == "matrix"
    ]


def _summary(wrong: Mapping[str, list[int]]) -> str:
    """Return names and row lengths; layers that differ only in their index are merged."""
    alike: dict[tuple[str, str], list[str]] = {}
    for full, widths in wrong.items():
        name = ".".join("*" if part.isdigit() else part for part in full.split("."))
        rows = " and ".join(map(str, dict.fromkeys(widths)))
        alike.setdefault((name, rows), []).append(full)
    return "; ".join(
        f"{name} ({len(group)} layers, rows of {rows})"
        if len(group) > 1
        else f"{group[0]} (rows of {rows})"
        for (name, rows), group in alike.items()
    )
