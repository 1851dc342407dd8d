"""Match the patterns of a stage with the linear layers of the model."""

from collections.abc import Collection, Mapping, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase

from lrc.compressors.models.architecture import Linear
from lrc.compressors.planning.problems import Problems


def match_targets(
    targets: Sequence[str],
    ignore: Sequence[str],
    linears: Sequence[Linear],
    where: str,
    problems: Problems,
    others: Mapping[str, str] | None = None,
    unused: Collection[str] = (),
) -> list[Linear]:
    """Return the layers that match a pattern of `targets` and none of `ignore`.

    A pattern that matches no layer is a problem; `others` are further patterns to check, by key.
    `unused` are layers that patterns may name, but that are never returned.
    """
    names = [*(linear.name for linear in linears), *unused]
    patterns = [("targets", p) for p in targets] + [("ignore", p) for p in ignore]
    for key, pattern in [*patterns, *(others or {}).items()]:
        if not any(fnmatchcase(name, pattern) for name in names):
            problems.add("no-match", f"{where}.{key}", _no_match(pattern, names))

    def hit(name: str, patterns: Sequence[str]) -> bool:
        return any(fnmatchcase(name, pattern) for pattern in patterns)

    return [lin for lin in linears if hit(lin.name, targets) and not hit(lin.name, ignore)]


def layer_groups(
    linears: Sequence[Linear],
    size: int,
    layer_names: Sequence[str],
    keys: Mapping[str, object],
    where: str,
    problems: Problems,
) -> list[list[Linear]]:
    """Group the same matrix of up to `size` consecutive layers, in the order of the first.

    Layers with different `keys` are never grouped. Different shapes in a group are a problem.
    """
    if size == 1:
        return [[linear] for linear in linears]
    groups: list[list[Linear]] = []
    latest: dict[tuple[object, ...], list[Linear]] = {}
    for linear in linears:
        key = linear.name.removeprefix(layer_names[linear.layer]), keys.get(linear.name)
        group = latest.get(key)
        last = group[-1] if group and len(group) < size else None
        if last is not None and group is not None and last.layer + 1 == linear.layer:
            if (last.d_out, last.d_in) == (linear.d_out, linear.d_in):
                group.append(linear)
                continue
            problems.add(
                "unequal-shapes",
                f"{where}.layers_per_group",
                "layers that share a factor must have one shape, got "
                f"{last.name} [{last.d_out}, {last.d_in}] and {linear.name} [{linear.d_out}, "
                f"{linear.d_in}]; use a separate stage for each shape, or list one of them under "
                "'ignore'",
            )
        latest[key] = [linear]
        groups.append(latest[key])
    return groups


def _no_match(pattern: str, names: list[str]) -> str:
    leaves = list(dict.fromkeys(name.rpartition(".")[2] for name in names))
    close = get_close_matches(pattern.strip("*").rpartition(".")[2], leaves, n=1)
    hint = f"; did you mean '*.{close[0]}'?" if close else "."
    return (
        f"the pattern {pattern!r} matches no linear layer{hint} Names look like {names[0]}; "
        f"the last parts are {', '.join(leaves)}"
    )
