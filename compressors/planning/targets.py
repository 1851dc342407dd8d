"""Which matrices a stage of a recipe is about, in which form, and which of them share a factor."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase

from lrc.compressors.methods.base import CodedMethod
from lrc.compressors.methods.table import METHODS
from lrc.compressors.models.architecture import Architecture, Linear
from lrc.compressors.models.source import Source
from lrc.compressors.planning.plan import Matrix
from lrc.compressors.planning.weight_groups import Unit, ratios_of, units_of
from lrc.configs.decompose import DecomposeBase
from lrc.configs.decompose_methods import BasisSharing, LowRank, Mixed
from lrc.configs.recipe import Recipe


@dataclass(frozen=True)
class Stage:
    """A stage of the recipe, and what it targets; forms are as asked, ranks still unknown.

    `number` is its place in the recipe; `overrides` maps a matrix to the number of its override.
    """

    number: int
    where: str
    options: DecomposeBase
    matrices: list[Matrix]
    overrides: Mapping[str, int]

    @property
    def units(self) -> list[Unit]:
        """What gets one rank each; of several ratios the least, whose sizes cost least."""
        ratio = ratios_of(self.options)[0]
        return [unit.at_ratio(ratio) for unit in units_of(self.matrices)]


def find_stages(
    recipe: Recipe, source: Source, architecture: Architecture, problems: list[str]
) -> list[Stage]:
    """Find what every stage targets; a matrix belongs to the first that claims it."""
    bits = source.dtype.itemsize * 8
    stages: list[Stage] = []
    owner: dict[str, int] = {}
    for index, options in recipe.decompositions.items():
        where = f"stages[{index}].decompose"
        targeted = []
        extra = [(f"overrides[{i}].match", o.match) for i, o in enumerate(options.overrides)]
        for linear in targets(
            options.targets, options.ignore, architecture.linears, where, problems, extra
        ):
            if linear.name in owner:
                problems.append(
                    f"{where}.targets: {linear.name} is already compressed by "
                    f"stages[{owner[linear.name]}]; list it under one of the two 'ignore'"
                )
                continue
            owner[linear.name] = index
            targeted.append(linear)
        overrides = {
            linear.name: number
            for linear in targeted
            for number, override in reversed(list(enumerate(options.overrides)))
            if fnmatchcase(linear.name, override.match)  # the first that matches is set last
        }
        matrices = [_as_asked(options, linear, index, bits) for linear in targeted]
        size, layers = getattr(options, "layers_per_group", 1), architecture.layer_names
        if size > len(layers):
            smallest = 2 if isinstance(options, BasisSharing) else 1
            problems.append(
                f"{where}.layers_per_group: must be in [{smallest}, {len(layers)}], the number of "
                f"layers, got {size}; lower layers_per_group"
            )
        elif size > 1:
            matrices = _grouped(matrices, size, layers, overrides, where, problems)
        stages.append(Stage(index, where, options, matrices, overrides))
    return stages


def _as_asked(options: DecomposeBase, linear: Linear, stage: int, bits: int) -> Matrix:
    source_bits = linear.d_out * linear.d_in * bits
    pattern = getattr(options, "pattern", "unstructured")
    bias = None
    if METHODS[options.method].has_bias:
        bias = "replaced" if linear.bias else "added"
    return Matrix(
        name=linear.name,
        layer=linear.layer,
        shape=(linear.d_out, linear.d_in),
        stage=stage,
        method=options.method,
        form=_form_as_asked(options),
        sizes=None,
        bits=source_bits,
        source_bits=source_bits,
        pattern=None if pattern == "unstructured" else pattern,
        bias=bias,
    )


def _form_as_asked(options: DecomposeBase) -> str:
    """Return the form that a method starts from; an allocation may choose another one later."""
    method = METHODS[options.method]
    if isinstance(method, CodedMethod):
        return method.form
    if isinstance(options, LowRank):
        return options.storage
    plain = isinstance(options, BasisSharing) or (
        isinstance(options, Mixed) and "low_rank" in options.components
    )
    return "low_rank" if plain else "pivoted_low_rank"


def _grouped(
    matrices: list[Matrix],
    size: int,
    layer_names: list[str],
    overrides: Mapping[str, int],
    where: str,
    problems: list[str],
) -> list[Matrix]:
    """Let the same matrix of up to `size` consecutive layers share a factor; one stands alone.

    Refuses a group of unequal shapes.
    """
    alike: dict[tuple[object, ...], list[list[Matrix]]] = {}
    for m in matrices:
        name = m.name.removeprefix(layer_names[m.layer])
        groups = alike.setdefault((name, overrides.get(m.name)), [])
        before = groups[-1][-1] if groups and len(groups[-1]) < size else None
        if before is None or before.layer + 1 != m.layer:
            groups.append([m])
        elif before.shape == m.shape:
            groups[-1].append(m)
        else:
            groups.append([m])
            problems.append(
                f"{where}.layers_per_group: what shares must have one shape, got {before.name} "
                f"{list(before.shape)} and {m.name} {list(m.shape)}; give each shape a stage of "
                "its own, or list one of the two under 'ignore'"
            )
    owners = {
        m.name: group[0].name
        for groups in alike.values()
        for group in groups
        if len(group) > 1
        for m in group
    }

    def placed(m: Matrix) -> Matrix:
        owner = owners.get(m.name)
        return m if owner is None else m.shared(owner)

    return [placed(m) for m in matrices]


def targets(
    wanted: list[str],
    skip: list[str],
    linears: list[Linear],
    where: str,
    problems: list[str],
    others: Sequence[tuple[str, str]] = (),
) -> list[Linear]:
    """Return the linears that match a pattern of `wanted` and none of `skip`.

    Refuses a pattern that matches no linear, with `others` among them: their keys and themselves.
    """
    names = [linear.name for linear in linears]
    patterns = [("targets", p) for p in wanted] + [("ignore", p) for p in skip] + [*others]
    for key, pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            problems.append(_no_match(f"{where}.{key}", pattern, names))

    def hit(name: str, patterns: list[str]) -> bool:
        return any(fnmatchcase(name, pattern) for pattern in patterns)

    return [lin for lin in linears if hit(lin.name, wanted) and not hit(lin.name, skip)]


def _no_match(key: str, pattern: str, names: list[str]) -> str:
    leaves = list(dict.fromkeys(name.rpartition(".")[2] for name in names))
    close = get_close_matches(pattern.strip("*").rpartition(".")[2], leaves, n=1)
    hint = f"; did you mean '*.{close[0]}'?" if close else ""
    return (
        f"{key}: the pattern {pattern!r} matches no linear layer{hint} Names look like {names[0]}; "
        f"the last parts are {', '.join(leaves)}"
    )
