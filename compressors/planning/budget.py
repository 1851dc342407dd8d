"""What the matrices of a stage may cost together, and the sentences for budgets that cannot be."""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from math import ceil

from torch import Tensor

from lrc.compressors.layers import FORMS, Scheme, Sizes
from lrc.compressors.methods.base import RANK_FORMS
from lrc.compressors.methods.table import METHODS
from lrc.compressors.planning.candidates import schemes_of
from lrc.compressors.planning.plan import Matrix
from lrc.compressors.planning.quantization import WHOLE
from lrc.compressors.planning.rate_distortion import FORMS_OF, families_of
from lrc.compressors.planning.weight_groups import WORDS, Unit
from lrc.configs.decompose import DecomposeBase
from lrc.configs.size import parse_size

# Two neighbouring shards exceed the 2e9 bytes that `write_weights` aims at: so many hold one more.
SHARD_BYTES = 10**9


@dataclass(frozen=True)
class Whole:
    """The tensors of the whole model, as the file would hold them dense."""

    stored: Mapping[str, Tensor]
    outside: Sequence[Matrix] = ()
    """What will be integers of a known size, whatever the targeted matrices become."""

    @property
    def parameters(self) -> int:
        """Numbers in the model; tied ones once."""
        return sum(t.numel() for t in self.stored.values())

    @property
    def bytes(self) -> int:
        """Bytes of the tensors, without the headers of the files."""
        return sum(t.numel() * t.element_size() for t in self.stored.values())

    def header_bytes(self, targeted: Collection[Matrix], schemes: Collection[str] = ()) -> int:
        """Return an upper bound of what safetensors writes before the tensors of all files.

        Whatever sizes the targeted matrices get, and whether they stay dense or become integers of
        one of several schemes.
        """
        # Of every scheme the names are the same, but that an asymmetric one has zero points.
        packed = sorted(
            {"int8" if Scheme.read(s).symmetric else "int8-asymmetric" for s in schemes}
        )
        forms = {m.name: m for m in targeted}
        total = self.bytes

        def entry(name: str, dims: list[int]) -> int:
            facts = {"dtype": "BF16", "shape": dims, "data_offsets": [total, total]}
            return len(json.dumps({name: facts}, separators=(",", ":")).encode())

        def compressed(m: Matrix, name: str) -> int:
            form, widest = FORMS[name], max(m.shape)
            spec = {**form.sizes_at(1, *m.shape), "bias": m.bias == "added"}
            shapes = [
                form.stored(*m.shape, {**spec, "scheme": scheme}, bias=False)
                for scheme in (packed if name in WHOLE else [None, *packed])
            ]
            return max(
                sum(
                    entry(f"{m.name}.{leaf}", [widest] * len(shape))
                    for leaf, (shape, _) in leaves.items()
                )
                for leaves in shapes
            )

        header = sum(
            entry(f"{m.name}.{leaf}", [max(m.shape)] * len(shape))
            for m in self.outside
            for leaf, (shape, _) in FORMS[m.form]
            .stored(*m.shape, {"scheme": m.scheme}, bias=False)
            .items()
        )
        for name, tensor in self.stored.items():
            module, _, leaf = name.rpartition(".")
            dense = entry(name, list(tensor.shape))
            m = forms.get(module)
            if m is None or m.form == "dense":
                header += dense
            elif leaf == "bias":
                header += max(dense, entry(f"{module}.{FORMS[m.form].BIAS}", list(tensor.shape)))
            else:
                forms_of_it = [*_possible(m), *(["integers"] if packed else [])]
                header += max(dense, *(compressed(m, form) for form in forms_of_it))
        shards = total // SHARD_BYTES + 1
        # A length of 8 bytes, the metadata, and up to 7 spaces to a multiple of 8.
        return header + shards * (8 + entry("__metadata__", []) + 7)

    def budget_bits(
        self,
        size: str,
        targeted: Collection[Matrix],
        where: str,
        problems: list[str],
        schemes: Collection[str] = (),
    ) -> int:
        """Return the bits that are left for the targeted matrices in files of `size`.

        Refuses a size that the rest of the model exceeds alone, and one that no compression needs.
        """
        wanted = parse_size(size)
        dense = self.bytes + self.header_bytes([])
        rest = self.bytes - sum(m.source_bits for m in targeted) // 8
        rest += self.header_bytes(targeted, schemes)
        rest -= sum(m.source_bits - m.bits for m in self.outside) // 8
        if not rest < wanted < dense:
            problems.append(
                f"{where}.size: must be above {rest:,} bytes, which what is not targeted takes "
                f"alone, and below the {dense:,} of the dense model, got {size} ({wanted:,}); "
                f"{'raise size or target more' if wanted <= rest else 'lower size'}"
            )
        return (wanted - rest) * 8


def even_share(budget: int, units: list[Unit], options: DecomposeBase) -> float:
    """Return the share that, given to every unit alike, spends a budget of bits.

    What is too small for the share stays dense, and the others share what that leaves.
    """
    left, others = budget, units
    while others:
        share = left / sum(unit.source_bits for unit in others)
        if share <= 0:
            return 0.0
        rank_at = {
            id(u): u.step_within(share, "bits", multiple=options.rank_multiple) for u in others
        }
        dense = [u for u in others if rank_at[id(u)] == 0]
        if not dense:
            return share
        left -= sum(u.source_bits for u in dense)
        others = [u for u in others if rank_at[id(u)]]
    return 0.0


def _possible(m: Matrix) -> list[str]:
    """Return the forms that an allocation may still give to a matrix."""
    method = METHODS[m.method]
    return [m.form] if len(method.parts) == 1 else method.forms


def cheapest(units: list[Unit], options: DecomposeBase) -> int:
    """Return the least that units can cost under the floors of a stage."""
    return sum(_cheapest(u, options) for u in units)


def _cheapest(unit: Unit, options: DecomposeBase) -> int:
    measure, floor = options.measure, options.min_keep
    costs = [unit.dense_cost(measure)]
    for scheme in schemes_of(unit, options):
        there = unit.in_scheme(scheme)
        multiple = there.rank_multiple(options)
        if {*RANK_FORMS} & {*getattr(options, "components", RANK_FORMS)}:
            costs.append(there.cheapest(measure, multiple=multiple, min_keep=floor))
        fixed = _smallest(unit, options, grouped=there.group > 1)
        fixed += [] if scheme is None else [("integers", {})]
        for form, sizes in fixed:
            cost = there.in_form(form).cost(sizes, measure)
            costs += [cost] if cost >= floor * unit.dense_cost(measure) else []
    return min(costs)


def _smallest(unit: Unit, options: DecomposeBase, *, grouped: bool) -> list[tuple[str, Sizes]]:
    """List the smallest sizes that `mixed` looks at in forms without a spectrum."""
    ranked = [*RANK_FORMS, "dense"]
    asked = [name for name in getattr(options, "components", []) if name not in ranked]
    return [
        (form, run[-1])
        for name in asked
        if not (grouped and name == "pivoted_low_rank+sparse")
        for form in FORMS_OF[name]
        for _, run in families_of(unit, form, options)
        if run
    ]


def unreachable(
    where: str, options: DecomposeBase, units: list[Unit], budget: int, smallest: int
) -> str:
    """Say that a stage cannot keep as little as it is asked to, and what would help.

    Parameters
    ----------
    where : str
        The stage's place in the recipe.
    options : DecomposeBase
    units : list of Unit
        All of the stage.
    budget, smallest : int
        What the pending ones among them may cost, and what they cost at least.
    """
    total = sum(u.dense_cost(options.measure) for u in units)
    remedies = []
    if options.rank_multiple > 1:
        remedies.append(f"lower 'rank_multiple' ({options.rank_multiple})")
    if options.min_keep > 0:
        remedies.append(f"lower 'min_keep' ({options.min_keep:g})")
    if options.max_loss < 1:
        remedies.append(f"raise 'max_loss' ({options.max_loss:g})")
    if options.overrides:
        remedies.append("lower the budgets of 'overrides'")
    if options.size is not None:
        needed = parse_size(options.size) + ceil((smallest - budget) / 8)
        key, least, got = "size", f"{needed:,} bytes", options.size
    else:
        assert options.keep is not None
        share = (int(options.keep * total) + smallest - budget) / total
        key, got = "keep", f"{options.keep:g}"
        least = f"{ceil(share * 1e4) / 1e4:g} of the {WORDS[options.measure]}"
    fixed = " beside what the overrides fix" if options.overrides else ""
    return (
        f"{where}.{key}: must be at least {least}, which the cheapest choice takes{fixed}"
        f", got {got}; {', '.join([f'raise {key}', *remedies])}"
    )
