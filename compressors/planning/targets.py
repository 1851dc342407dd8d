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
    *,
    n_experts: int = 1,
) -> list[list[Linear]]:
    """Group the same matrix of up to `size` consecutive layers, in the order of the first.

    With `n_experts` above 1, the same matrix of so many consecutive experts of one layer instead.
    Layers with different `keys` are never grouped. Different shapes in a group are a problem.
    """
    groups: list[list[Linear]] = []
    latest: dict[tuple[object, ...], list[Linear]] = {}
    for linear in linears:
        within = n_experts > 1 and linear.expert is not None
        most = n_experts if within else size
        name = linear.name.removeprefix(layer_names[linear.layer])
        stack = layer_names[linear.layer].rpartition(".")[0]  # encoder or decoder
        key: tuple[object, ...] = name, stack, keys.get(linear.name)
        if within:
            experts, leaf = name.rpartition(f".{linear.expert}.")[::2]
            key = experts, leaf, linear.layer, keys.get(linear.name)
        group = latest.get(key)
        last = group[-1] if group and len(group) < most else None
        if last is not None and group is not None and _follows(linear, last, within=within):
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


def _follows(linear: Linear, last: Linear, *, within: bool) -> bool:
    """Return whether a linear belongs to the next expert of the layer, or to the next layer."""
    if within and linear.expert is not None and last.expert is not None:
        return last.expert + 1 == linear.expert
    return last.layer + 1 == linear.layer


def _no_match(pattern: str, names: list[str]) -> str:
    leaves = list(dict.fromkeys(name.rpartition(".")[2] for name in names))
    close = get_close_matches(pattern.strip("*").rpartition(".")[2], leaves, n=1)
    hint = f"; did you mean '*.{close[0]}'?" if close else "."
    return (
        f"the pattern {pattern!r} matches no linear layer{hint} Names look like {names[0]}; "
        f"the last parts are {', '.join(leaves)}"
    )
