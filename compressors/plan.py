"""What will be done to every matrix, as a value: printable, saved, and refused here if impossible.

A plan needs shapes, not weights. It counts every bit as the checkpoint will store it.
"""

from collections import Counter
from dataclasses import asdict, dataclass, field, replace
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any

from lrc.compressors.allocate import rank_for_budget
from lrc.compressors.decompose import METHODS
from lrc.compressors.layers import FORMS
from lrc.compressors.models.architecture import Architecture, Linear
from lrc.compressors.models.source import Source
from lrc.configs.errors import RecipeError
from lrc.configs.recipe import DecomposeBase, Recipe

PLAN_VERSION = 1


@dataclass(frozen=True)
class Matrix:
    """What is planned for one targeted weight, and, once it is done, what came of it.

    `form` is ``dense`` or one of `FORMS`; `bits` are those of the file, `source_bits` those of the
    matrix at the precision of the reference model. `note` says why a matrix stays dense; after
    execution `loss` is the predicted loss (share of weighted energy) and `fallback` what had to
    deviate from the plan.
    """

    name: str
    layer: int
    shape: tuple[int, int]
    stage: int
    method: str
    form: str
    rank: int | None
    bits: int
    source_bits: int
    note: str | None = None
    loss: float | None = None
    fallback: str | None = None

    def executed(self, *, rank: int | None, loss: float | None, fallback: str | None) -> "Matrix":
        """Return the record of what was really done; rank None means that it stayed dense."""
        bits_each = self.source_bits // (self.shape[0] * self.shape[1])
        if rank is None:
            return replace(
                self, form="dense", rank=None, bits=self.source_bits, fallback=fallback, loss=loss
            )
        bits = FORMS[self.form].stored_bits(*self.shape, rank, bits=bits_each)
        return replace(self, rank=rank, bits=bits, loss=loss, fallback=fallback)


@dataclass(frozen=True)
class Plan:
    """The plan of a run.

    `parameters` and `bytes` are those of the whole model, dense; `source_file_bytes` is the size
    of the weights as the source stores them, which is smaller where the source is quantized.
    """

    matrices: list[Matrix]
    parameters: int
    bytes: int
    source: str
    source_file_bytes: int | None
    source_quantized: bool
    dtype: str
    architecture: str
    version: int = PLAN_VERSION
    warnings: list[str] = field(default_factory=list)

    @property
    def source_bits(self) -> int:
        """Bits of the targeted matrices in the reference model."""
        return sum(m.source_bits for m in self.matrices)

    @property
    def bits(self) -> int:
        """Bits of the targeted matrices as they will be stored."""
        return sum(m.bits for m in self.matrices)

    @property
    def kept(self) -> float:
        """Stored bits of the targeted matrices over their bits in the reference model."""
        return self.bits / self.source_bits

    @property
    def compressed_parameters(self) -> int:
        """Parameters of the whole compressed model."""
        removed = 0
        for m in self.matrices:
            if m.rank is not None:
                d_out, d_in = m.shape
                removed += d_out * d_in - FORMS[m.form].parameters_stored(d_out, d_in, m.rank)
        return self.parameters - removed

    @property
    def compressed_bytes(self) -> int:
        """Bytes of the tensors of the whole compressed model."""
        return self.bytes - (self.source_bits - self.bits) // 8

    def modules(self) -> dict[str, dict[str, Any]]:
        """Return the module table of the checkpoint's config."""
        return {
            m.name: {"form": m.form, "rank": m.rank} for m in self.matrices if m.form != "dense"
        }

    def to_json(self) -> dict[str, Any]:
        """Return the plan as JSON values, totals included."""
        totals = {
            "kept": self.kept,
            "bits": self.bits,
            "source_bits": self.source_bits,
            "compressed_parameters": self.compressed_parameters,
            "compressed_bytes": self.compressed_bytes,
        }
        return asdict(self) | {"totals": totals}


def make_plan(recipe: Recipe, source: Source, architecture: Architecture) -> Plan:
    """Decide what happens to every linear.

    Raises
    ------
    RecipeError
        Every refusal at once: patterns that match nothing, a matrix claimed by two stages, ranks
        that do not exist, a plan that makes nothing smaller.
    """
    bits = _bits(source)
    problems: list[str] = []
    matrices: dict[str, Matrix] = {}
    for index, stage in enumerate(recipe.stages):
        options = stage.decompose
        where = f"stages[{index}].decompose"
        targeted = _targets(options, architecture.linears, where, problems)
        for linear in targeted:
            if linear.name in matrices:
                problems.append(
                    f"{where}.targets: {linear.name} is already compressed by "
                    f"stages[{matrices[linear.name].stage}]; list it under one of the two 'skip'"
                )
                continue
            matrices[linear.name] = _plan_matrix(options, linear, index, bits, where, problems)
    if not problems and not any(m.form != "dense" for m in matrices.values()):
        problems.append(
            "stages: every targeted matrix stays dense, so nothing would be smaller; lower 'keep'"
        )
    if problems:
        raise RecipeError(_without_repeats(problems))
    stored = architecture.stored_parameters()
    ordered = [matrices[lin.name] for lin in architecture.linears if lin.name in matrices]
    return Plan(
        matrices=ordered,
        parameters=sum(t.numel() for t in stored.values()),
        bytes=sum(t.numel() * t.element_size() for t in stored.values()),
        source=recipe.model.path,
        source_file_bytes=source.file_bytes,
        source_quantized=source.gguf is not None,
        dtype=recipe.model.dtype,
        architecture=type(architecture.model).__name__,
        warnings=_warnings(recipe, ordered),
    )


def _plan_matrix(
    options: DecomposeBase,
    linear: Linear,
    stage: int,
    bits: int,
    where: str,
    problems: list[str],
) -> Matrix:
    d_out, d_in = linear.d_out, linear.d_in
    dense = Matrix(
        name=linear.name,
        layer=linear.layer,
        shape=(d_out, d_in),
        stage=stage,
        method=options.method,
        form="dense",
        rank=None,
        bits=d_out * d_in * bits,
        source_bits=d_out * d_in * bits,
    )
    keep, rank = options.keep, None
    for number, override in enumerate(options.overrides):
        if fnmatchcase(linear.name, override.match):
            keep, rank = override.keep or 1.0, override.rank
            if rank is not None and rank > min(d_out, d_in):
                problems.append(
                    f"{where}.overrides[{number}].rank: must be in [1, {min(d_out, d_in)}] for "
                    f"{linear.name} [{d_out}, {d_in}], got {rank}; lower rank or list the layer "
                    "under 'skip'"
                )
                return dense
            break
    if rank is None:
        if keep == 1:
            return replace(dense, note="keep is 1")
        rank = rank_for_budget(d_out, d_in, keep, bits=bits)
        if rank == 0:
            return replace(dense, note=f"too small: rank 1 needs more than {keep:.0%} of its bits")
    stored = FORMS["low_rank"].stored_bits(d_out, d_in, rank, bits=bits)
    if stored >= dense.bits:
        note = f"factors of rank {rank} would be larger than the matrix"
        return replace(dense, note=note)
    return replace(dense, form="low_rank", rank=rank, bits=stored)


def _targets(
    options: DecomposeBase, linears: list[Linear], where: str, problems: list[str]
) -> list[Linear]:
    names = [linear.name for linear in linears]
    patterns = [(f"{where}.targets", p) for p in options.targets]
    patterns += [(f"{where}.skip", p) for p in options.skip]
    patterns += [
        (f"{where}.overrides[{i}].match", o.match) for i, o in enumerate(options.overrides)
    ]
    for key, pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            problems.append(_no_match(key, pattern, names))

    def hit(name: str, patterns: list[str]) -> bool:
        return any(fnmatchcase(name, pattern) for pattern in patterns)

    return [
        lin for lin in linears if hit(lin.name, options.targets) and not hit(lin.name, options.skip)
    ]


def _no_match(key: str, pattern: str, names: list[str]) -> str:
    leaves = list(dict.fromkeys(name.rpartition(".")[2] for name in names))
    close = get_close_matches(pattern.strip("*").rpartition(".")[2], leaves, n=1)
    hint = f"; did you mean '*.{close[0]}'?" if close else ""
    return (
        f"{key}: the pattern {pattern!r} matches no linear layer{hint} Names look like {names[0]}; "
        f"the last parts are {', '.join(leaves)}"
    )


def _bits(source: Source) -> int:
    return source.dtype.itemsize * 8


def _warnings(recipe: Recipe, matrices: list[Matrix]) -> list[str]:
    """Name what will work but should be known: widths with too few tokens to be estimated well."""
    tokens = recipe.calibration.samples * recipe.calibration.length
    measured = [m.shape[1] for m in matrices if METHODS[m.method].needs_inputs]
    narrow = Counter(width for width in measured if tokens < 4 * width)
    return [
        f"calibration: {tokens} tokens are few for {count} matrices of input width {width}; "
        f"{4 * width} or more are advised"
        for width, count in sorted(narrow.items())
    ]


def _without_repeats(problems: list[str]) -> list[str]:
    """Keep the first of problems that differ only in the layer, and count the rest."""
    kept: dict[str, list[str]] = {}
    for problem in problems:
        kept.setdefault(problem.split(":", 1)[0], []).append(problem)
    return [
        group[0] + (f" (and {len(group) - 1} more of this kind)" if len(group) > 1 else "")
        for group in kept.values()
    ]
