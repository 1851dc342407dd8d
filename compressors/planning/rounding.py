"""What a plan says of integers: which matrices are rounded, by which stage, and what cannot be."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from math import gcd

from lrc.compressors.layers import FORMS, Scheme
from lrc.compressors.models.architecture import Architecture
from lrc.compressors.planning.plan import Matrix
from lrc.compressors.planning.targets import targets
from lrc.configs.quantize import Quantize
from lrc.configs.recipe import Recipe

WHOLE = ("integers", "integers_plus_low_rank", "group_sparse")
"""Forms of a weight that nothing but rounding was done to."""


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
        taken: list[str] = []
        for linear in targets(options.targets, options.skip, architecture.linears, where, problems):
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
            if matrix.rounded is not None:
                problems.append(
                    f"{where}.targets: {linear.name} is already rounded by "
                    f"stages[{matrix.rounded}]; list it under one of the two 'skip'"
                )
                continue
            matrices[linear.name] = replace(matrix, rounded=index)  # refused below if it cannot be
            taken.append(linear.name)
        _refuse_branch(where, options, [matrices[n] for n in taken], problems)
        _refuse_factored(where, options, [matrices[n] for n in taken], problems)
        refuse_groups(f"{where}.group_size", options, [matrices[n] for n in taken], problems)
        if not problems:
            for name in taken:
                matrices[name] = rounded(replace(matrices[name], rounded=None), options, index)
    return matrices


def rounded(matrix: Matrix, options: Quantize, stage: int) -> Matrix:
    """Return a matrix as a stage rounds it; what is pending keeps its share of what is left."""
    if matrix.pending:
        share = Scheme.read(options.scheme).bits / matrix.number_bits
        bits = int(matrix.bits * share)
        return replace(matrix, scheme=options.scheme, rounded=stage, bits=bits)
    if options.sparsity is not None:
        return matrix.group_sparse(options.scheme, stage, options.sparsity)
    if matrix.sizes is None:
        branch = 0 if options.branch is None else options.branch.rank
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
    if options.branch is None or not matrices:
        return
    rank, narrowest = options.branch.rank, min(matrices, key=lambda m: min(m.shape))
    if rank >= min(narrowest.shape):
        problems.append(
            f"{where}.branch.rank: must be below {min(narrowest.shape)}, the smaller side of "
            f"{narrowest.name} {list(narrowest.shape)}, got {rank}; lower it, or list such layers "
            "under 'skip'"
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
        f"stages[{first.stage}]; list them under 'skip', or round them with method: gptq"
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
    fits = max((n for n in range(1, min(common, group) + 1) if common % n == 0), default=1)
    named = _named(wrong)
    problems.append(
        f"{where}: must divide the rows that it cuts into groups, got {group} for {named}; set "
        f"group_size: {fits}, which divides all, or list these layers under 'skip'"
    )


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
