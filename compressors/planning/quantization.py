"""What a plan says of integers: which matrices are rounded, by which stage, and what cannot be."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from math import gcd

from lrc.compressors.layers import FORMS, Scheme
from lrc.compressors.models.architecture import Architecture
from lrc.compressors.planning.plan import Matrix
from lrc.compressors.planning.targets import targets
from lrc.configs.decompose import DecomposeBase
from lrc.configs.quantize import Quantize
from lrc.configs.recipe import Recipe

WHOLE = ("integers", "integers_plus_low_rank", "group_sparse")
"""Forms of a weight that nothing but rounding was done to."""
LEAST_GROUP = 8
"""Of 16-bit scales, what is advised: smaller groups spend more bits on scales than two a number."""


def plan_rounding(
    recipe: Recipe,
    architecture: Architecture,
    number_bits: int,
    decided: Mapping[str, Matrix],
    problems: list[str],
) -> dict[str, Matrix]:
    """Let every stage that rounds take what it targets: as other stages leave it, or dense.

    Parameters
    ----------
    number_bits : int
        Of one number of the reference model.
    decided : mapping of str to Matrix
        What earlier stages do, by name.
    """
    matrices = dict(decided)
    for index, options in recipe.quantizations.items():
        where = f"stages[{index}].quantize"
        if not options.rounds_linears:
            continue
        taken: list[Matrix] = []
        for linear in targets(
            options.targets, options.ignore, architecture.linears, where, problems
        ):
            bits = linear.d_out * linear.d_in * number_bits
            fresh = Matrix(
                name=linear.name,
                layer=linear.layer,
                shape=(linear.d_out, linear.d_in),
                stage=index,
                method=options.method,
                form="dense",
                sizes=None,
                bits=bits,
                source_bits=bits,
            )
            matrix = matrices.get(linear.name, fresh)
            earlier = _rounds(matrix, recipe)
            if earlier is not None:
                problems.append(
                    f"{where}.targets: {linear.name} is already rounded by stages[{earlier}]; list "
                    "it under one of the two 'ignore', or leave out 'schemes' there, if it has any"
                )
                continue
            taken.append(matrix)
        before = len(problems)
        if not taken and not problems:
            problems.append(
                f"{where}.targets: must leave at least one linear to round, got none that 'ignore' "
                "does not list; change 'targets' or 'ignore', or remove the stage"
            )
        _refuse_branch(where, options, taken, problems)
        _refuse_factored(where, options, taken, problems)
        refuse_groups(f"{where}.group_size", options, taken, problems)
        if options.compensate is not None:
            _refuse_shared(f"{where}.compensate", taken, problems)
        if len(problems) > before:
            matrices |= {m.name: replace(m, rounded=index) for m in taken}
            continue
        done = [rounded(m, options, index) for m in taken]
        _refuse_growth(where, options, taken, done, problems)
        matrices |= {m.name: m for m in done}
    return matrices


def _rounds(matrix: Matrix, recipe: Recipe) -> int | None:
    """Return the stage that makes integers of a matrix, or may choose to; None if none does."""
    if matrix.rounded is None and matrix.pending:
        return matrix.stage if getattr(recipe.works[matrix.stage], "schemes", []) else None
    return matrix.rounded


def rounded(matrix: Matrix, options: Quantize, stage: int) -> Matrix:
    """Return a matrix as a stage rounds it; what is pending keeps its share of what is left."""
    if matrix.pending:
        scheme, number = Scheme.read(options.scheme), matrix.number_bits
        scales = number + (0 if scheme.symmetric else scheme.bits)
        share = (scheme.bits + scales / (scheme.group_size or matrix.shape[1])) / number
        bits = int(matrix.bits * share)
        return replace(matrix, scheme=options.scheme, rounded=stage, bits=bits)
    if options.sparsity is not None:
        return matrix.group_sparse(options.scheme, stage, options.sparsity)
    if matrix.sizes is None:
        branch = 0 if options.low_rank_correction is None else options.low_rank_correction.rank
        return matrix.integers(options.scheme, stage, branch)
    return replace(matrix, scheme=options.scheme, rounded=stage).at(matrix.sizes)


def unrounded(matrix: Matrix) -> Matrix:
    """Return a matrix as it is before a later stage rounds it: an allocation decides on that."""
    if matrix.rounded is None or matrix.rounded == matrix.stage:
        return matrix
    if matrix.form in WHOLE:
        return matrix.dense()
    bare = replace(matrix, scheme=None, rounded=None)
    return bare if bare.sizes is None else bare.at(bare.sizes)


def _refuse_branch(
    where: str, options: Quantize, matrices: Collection[Matrix], problems: list[str]
) -> None:
    """Refuse a branch as large as what it stands beside."""
    if options.low_rank_correction is None or not matrices:
        return
    rank, narrowest = options.low_rank_correction.rank, min(matrices, key=lambda m: min(m.shape))
    if rank >= min(narrowest.shape):
        problems.append(
            f"{where}.low_rank_correction.rank: must be below {min(narrowest.shape)}, the smaller "
            f"side of {narrowest.name} {list(narrowest.shape)}, got {rank}; lower it, or list such "
            "layers under 'ignore'"
        )


def _refuse_shared(where: str, matrices: Collection[Matrix], problems: list[str]) -> None:
    """Refuse to refit what shares a factor, which is solved for several layers at once."""
    shared = next((m for m in matrices if m.group not in (None, m.name)), None)
    if shared is not None:
        problems.append(
            f"{where}: must be left out where layers share a factor, got {shared.name}, which "
            f"shares that of {shared.group}; leave compensate out, or list such layers under "
            "'ignore'"
        )


def _refuse_growth(
    where: str,
    options: Quantize,
    before: Collection[Matrix],
    after: Collection[Matrix],
    problems: list[str],
) -> None:
    """Refuse integers that take as much, with their scales and branches, as what they replace."""
    for old, new in zip(before, after, strict=True):
        if new.bits < old.bits:
            continue
        key, remedy = "bits", "lower it"
        if options.low_rank_correction is not None:
            key, remedy = "low_rank_correction.rank", "lower it"
        elif options.group_size is not None:
            key, remedy = "group_size", "raise it"
        got = options.bits if key == "bits" else options.group_size
        got = options.low_rank_correction.rank if options.low_rank_correction is not None else got
        problems.append(
            f"{where}.{key}: must make {old.name} {list(old.shape)} smaller than the "
            f"{old.bits // 8:,} bytes that it takes, got {got}, which makes {new.bits // 8:,} of "
            f"them; {remedy}, or list the layer under 'ignore'"
        )


def _refuse_factored(
    where: str, options: Quantize, matrices: Collection[Matrix], problems: list[str]
) -> None:
    """Refuse to remove groups of what is no whole weight any more."""
    taken = [m for m in matrices if m.factored]
    if options.sparsity is None or not taken:
        return
    first, count = taken[0], len(taken)
    problems.append(
        f"{where}.method: {options.method} removes groups of linears that no earlier stage "
        f"factors, got {first.name}{f' and {count - 1} more' if count > 1 else ''} of "
        f"stages[{first.stage}]; list them under 'ignore', or round them with method: gptq"
    )


def refuse_groups(
    where: str, options: Quantize, matrices: Collection[Matrix], problems: list[str]
) -> None:
    """Refuse a group size that does not divide the rows of what it groups, naming all of it."""
    group = options.group_size
    if group is None:
        return
    rows = {m.name: [width for width in _rows(m) if width % group] for m in matrices}
    wrong = {name: widths for name, widths in rows.items() if widths}
    if not wrong:
        return
    common = gcd(*(width for m in matrices for width in _rows(m)))
    largest = max((n for n in range(1, min(common, group) + 1) if common % n == 0), default=1)
    remedy = f"set group_size: {largest}, which divides all"
    if all(m.sizes is not None for m in matrices if m.name in wrong):
        remedy = "make their ranks multiples of it"
    elif largest < LEAST_GROUP:
        remedy = "leave group_size out, for one scale a row"
    problems.append(
        f"{where}: must divide the rows that it cuts into groups, got {group} for {_named(wrong)}; "
        f"{remedy}, or list these layers under 'ignore'"
    )


def refuse_before_rounding(
    where: str, options: DecomposeBase, recipe: Recipe, problems: list[str]
) -> None:
    """Refuse options of a decomposition that cannot stand before a stage that rounds."""
    groups = [each.group_size for each in recipe.quantizations.values() if each.group_size]
    if groups and "pivoted_low_rank+sparse" in getattr(options, "components", []):
        problems.append(
            f"{where}.components: pivoted_low_rank+sparse has ranks that groups of {groups[0]} do "
            "not divide, got a 'quantize' with a group_size after it; remove this component or "
            "group_size"
        )
    rounds = any(each.rounds_linears for each in recipe.quantizations.values())
    if options.size is not None and rounds:
        problems.append(
            f"{where}.size: counts the bytes of files that no stage rounds, got a 'quantize' "
            "behind it; give 'keep', before rounding, or let method: mixed choose 'schemes' within "
            "the size"
        )


def refuse_schemes(
    where: str, schemes: list[str], matrices: list[Matrix], problems: list[str]
) -> None:
    """Refuse schemes that no matrix of a stage can have."""
    for number, scheme in enumerate(schemes):
        if matrices and not any(fits(scheme, m) for m in matrices):
            widths = ", ".join(str(width) for width in sorted({m.shape[1] for m in matrices}))
            problems.append(
                f"{where}[{number}]: must have groups that divide the inputs of a targeted matrix, "
                f"{widths}, got {scheme}; change the size behind -g, or remove the scheme"
            )


def explained(problems: list[str], recipe: Recipe) -> list[str]:
    """Say, of problems with the multiple of ranks, that groups of later stages are behind it."""
    groups = sorted({each.group_size or 1 for each in recipe.quantizations.values()} - {1})
    if not groups:
        return problems
    named = " and ".join(map(str, groups))
    why = f" (ranks are multiples of the group_size of 'quantize' too, {named}: lower that first)"
    return [each + (why if "rank_multiple" in each else "") for each in problems]


def fits(scheme: str, matrix: Matrix) -> bool:
    """Say whether the groups of a scheme divide the inputs of a matrix."""
    group = Scheme.read(scheme).group_size
    return group is None or matrix.shape[1] % group == 0


def _rows(matrix: Matrix) -> list[int]:
    """Return the lengths of the rows that groups would divide, where they are known."""
    d_out, d_in = matrix.shape
    if matrix.form == "dense" or matrix.sizes is None:
        return [d_in]
    shapes = FORMS[matrix.form].shapes(d_out, d_in, matrix.sizes, bias=False)
    weights = [shape for leaf, (shape, _) in shapes.items() if leaf.endswith(".weight")]
    return [shape[-1] for shape in weights]


def _named(wrong: Mapping[str, list[int]]) -> str:
    """Name matrices, those that differ in the number of their layer only by what they share."""
    alike: dict[tuple[str, tuple[int, ...]], list[str]] = {}
    for full, widths in wrong.items():
        parts = ["*" if part.isdigit() else part for part in full.split(".")]
        alike.setdefault((".".join(parts), tuple(widths)), []).append(full)
    return "; ".join(
        f"{group[0] if len(group) == 1 else name} "
        f"({f'{len(group)} layers, ' if len(group) > 1 else ''}rows of {_list(widths)})"
        for (name, widths), group in alike.items()
    )


def _list(widths: Iterable[int]) -> str:
    return " and ".join(str(width) for width in dict.fromkeys(widths))
