"""What will be done to every matrix, as a value: printable, saved, edited, given back.

It counts every bit as the checkpoint will store it. `planning` makes it from shapes, `ranks` fills
in what only statistics can tell, `execute` returns it as it was carried out.
"""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from lrc.compressors.layers import FORMS, MEMBERS, Scheme, Sizes

PLAN_VERSION = 1


@dataclass(frozen=True)
class Matrix:
    """What is planned for one targeted weight, and, once it is done, what came of it."""

    name: str
    layer: int
    shape: tuple[int, int]
    stage: int
    method: str
    form: str
    """``dense`` or one of `FORMS`."""
    sizes: Sizes | None
    """Those of the form, such as ``{"rank": 12}``; None if dense or not chosen yet."""
    bits: int
    """Of the file; of a pending matrix its even share of the budget."""
    source_bits: int
    """At the precision of the reference model."""
    pending: str | None = None
    """The allocation that will choose the rank, until it has."""
    pattern: str | None = None
    """``2:4`` where two of every four consecutive entries are kept; None if any may be."""
    scheme: str | None = None
    """How its numbers are stored as integers, such as ``int4-g64``; None if they are not."""
    rounded: int | None = None
    """The stage that makes integers of its numbers; that of the form, where one stage does both."""
    group: str | None = None
    """Name of the first of the matrices that share one factor; None if it stands alone."""
    bias: str | None = None
    """Whether the bias that the method makes is ``added`` to a layer that had none or
    ``replaced``; None if the method makes none."""
    note: str | None = None
    """Why the matrix stays dense."""
    loss: float | None = None
    """Predicted: share of the weighted energy that is lost."""
    predicted_nats: float | None = None
    """Predicted rise of the mean loss of a token, where the method can tell."""
    refit: bool = False
    """Whether it was fitted to the inputs that the compressed layers before it produce."""
    fallback: str | None = None
    """What had to deviate from the plan."""

    @property
    def factored(self) -> bool:
        """Whether it gets another form than dense, as far as is known by now."""
        return self.sizes is not None or self.pending is not None

    @property
    def rank(self) -> int | None:
        """The rank, of a form that has one."""
        return None if self.sizes is None else self.sizes.get("rank")

    @property
    def written(self) -> str:
        """The sizes as a table shows them; empty if there are none."""
        return "" if self.sizes is None else FORMS[self.form].written(*self.shape, self.sizes)

    @property
    def number_bits(self) -> int:
        """Bits of one number of the reference model."""
        return self.source_bits // (self.shape[0] * self.shape[1])

    def stored_bits(self, sizes: Sizes) -> int:
        """Count the bits of its form with `sizes`, with those of a bias that the layer had not."""
        added = self.shape[0] * self.number_bits if self.bias == "added" else 0
        form, bits = FORMS[self.form], self.number_bits
        return form.stored_bits(*self.shape, bits=bits, scheme=self.scheme, **sizes) + added

    def at(self, sizes: Sizes | int, **changes: Any) -> "Matrix":
        """Return the same matrix with these sizes, or this rank; `changes` are other fields."""
        sizes = {"rank": sizes} if isinstance(sizes, int) else dict(sizes)
        changed = replace(self, sizes=sizes, pending=None, **changes)
        return replace(changed, bits=changed.stored_bits(sizes))

    def undecided(self, allocation: str, share: float) -> "Matrix":
        """Return the same matrix with a rank that an allocation is going to choose."""
        return replace(self, pending=allocation, bits=int(share * self.source_bits))

    def integers(self, scheme: str, stage: int, branch: int = 0) -> "Matrix":
        """Return the same matrix, dense, as integers of a stage; `branch` is a rank beside them."""
        form = "integers_plus_low_rank" if branch else "integers"
        bare = replace(self.dense(), form=form, scheme=scheme, rounded=stage)
        return bare.at({"rank": branch} if branch else {})

    def group_sparse(self, scheme: str, stage: int, sparsity: float) -> "Matrix":
        """Return the same matrix, dense, as integers of a stage less a share of their groups."""
        groups = self.shape[0] * Scheme.read(scheme).groups(self.shape[1])
        kept = max(groups - int(sparsity * groups), 1)
        bare = replace(self.dense(), form="group_sparse", scheme=scheme, rounded=stage)
        return bare.at({"groups": kept})

    def shared(self, owner: str) -> "Matrix":
        """Return the same matrix as one of those that use the first factor of `owner`."""
        form = self.form if self.name == owner else MEMBERS[self.form]
        return replace(self, form=form, group=owner)

    def dense(self, **changes: Any) -> "Matrix":
        """Return the same matrix left dense; `changes` are other fields."""
        return replace(
            self,
            form="dense",
            sizes=None,
            bits=self.source_bits,
            pending=None,
            pattern=None,
            group=None,
            bias=None,
            scheme=None,
            rounded=None,
            **changes,
        )


@dataclass(frozen=True)
class SliceRecord:
    """The result of a slicing stage: the model before and after."""

    stage: int
    method: str
    parameters: tuple[int, int]
    bytes: tuple[int, int]
    """Of the tensors of the whole model."""
    config: dict[str, list[Any]]
    """Changed config key -> its values before and after."""
    facts: dict[str, Any] = field(default_factory=dict)
    """What the method chose when it was applied."""


@dataclass(frozen=True)
class Plan:
    """The plan of a run.

    `parameters` and `bytes` are those of the whole model, dense, as the slicing stages leave it;
    `source_file_bytes` is the size of the weights as the source stores them, which is smaller where
    the source is quantized.
    `budgets` holds for every stage what its pending matrices may cost together, in the stage's
    measure; None where every rank is known. `given` are the texts of plan files, by stage.
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
    budgets: list[int | None] = field(default_factory=list)
    given: dict[int, str] = field(default_factory=dict)
    slices: list[SliceRecord] = field(default_factory=list)
    outside: list[Matrix] = field(default_factory=list)
    """Embedding and head, where they are rounded to integers."""

    @property
    def dense_parameters(self) -> int:
        """Numbers in the model as it came."""
        return self.slices[0].parameters[0] if self.slices else self.parameters

    @property
    def dense_bytes(self) -> int:
        """Bytes of the tensors of the model as it came."""
        return self.slices[0].bytes[0] if self.slices else self.bytes

    @property
    def targeted(self) -> list[Matrix]:
        """All matrices that something is planned for, those outside the layers last."""
        return [*self.matrices, *self.outside]

    @property
    def source_bits(self) -> int:
        """Bits of the targeted matrices in the reference model."""
        return sum(m.source_bits for m in self.targeted)

    @property
    def bits(self) -> int:
        """Bits of the targeted matrices as they will be stored."""
        return sum(m.bits for m in self.targeted)

    @property
    def kept(self) -> float:
        """Stored bits of the targeted matrices over their bits before them; 1 of none."""
        return self.bits / self.source_bits if self.targeted else 1.0

    @property
    def compressed_parameters(self) -> int:
        """Parameters of the whole compressed model; an estimate while ranks are pending."""
        removed = 0
        for m in self.targeted:
            d_out, d_in = m.shape
            if m.sizes is not None:
                added = d_out if m.bias == "added" else 0
                removed += d_out * d_in - added
                form = FORMS[m.form]
                removed -= form.parameters_stored(*m.shape, scheme=m.scheme, **m.sizes)
            elif m.pending:
                stored = m.number_bits if m.scheme is None else Scheme.read(m.scheme).bits
                removed += d_out * d_in - m.bits // stored
        return self.parameters - removed

    @property
    def compressed_bytes(self) -> int:
        """Bytes of the tensors of the whole compressed model."""
        return self.bytes - (self.source_bits - self.bits) // 8

    def homes(self) -> dict[str, int]:
        """Return for every matrix the layer whose file holds its tensors: its group's first."""
        layers = {m.name: m.layer for m in self.targeted}
        return {m.name: layers[m.group or m.name] for m in self.targeted}

    def with_matrices(self, changed: Iterable[Matrix]) -> "Plan":
        """Return the plan with some of its matrices replaced, by name."""
        by_name = {m.name: m for m in changed}
        matrices, outside = (
            [by_name.get(m.name, m) for m in each] for each in (self.matrices, self.outside)
        )
        return replace(self, matrices=matrices, outside=outside)

    def modules(self) -> dict[str, dict[str, Any]]:
        """Return the module table of the checkpoint's config."""
        table: dict[str, dict[str, Any]] = {}
        for m in self.targeted:
            if m.sizes is None:
                continue
            table[m.name] = {"form": m.form, **m.sizes, **FORMS[m.form].extra(*m.shape)}
            if m.bias is not None:
                table[m.name]["bias"] = True
            if m.pattern is not None:
                table[m.name]["pattern"] = m.pattern
            if m.scheme is not None:
                table[m.name] |= {"scheme": m.scheme, "shape": [*m.shape]}
            if m.group not in (None, m.name):
                table[m.name]["shares"] = m.group
        return table

    def to_json(self) -> dict[str, Any]:
        """Return the plan as JSON values, totals included; of given plans the hashes."""
        totals = {
            "kept": self.kept,
            "bits": self.bits,
            "source_bits": self.source_bits,
            "dense_parameters": self.dense_parameters,
            "dense_bytes": self.dense_bytes,
            "compressed_parameters": self.compressed_parameters,
            "compressed_bytes": self.compressed_bytes,
        }
        records = {
            "matrices": [record_of(m) for m in self.matrices],
            "outside": [record_of(m) for m in self.outside],
        }
        facts = asdict(self) | records | {"given": self.given_hashes()}
        return facts | {"totals": totals}

    def given_hashes(self) -> dict[str, str]:
        """Return the SHA-256 of the plan file of every stage that was given one."""
        return {
            str(stage): hashlib.sha256(text.encode()).hexdigest()
            for stage, text in self.given.items()
        }


def record_of(matrix: Matrix) -> dict[str, Any]:
    """Return a matrix as JSON values; its sizes stand beside the form, as people write them."""
    record: dict[str, Any] = {}
    for key, value in asdict(matrix).items():
        if key == "sizes":
            value = {"rank": None} if value is None else value
        record |= value if key == "sizes" else {key: value}
    return record


def read_matrices(records: Iterable[Mapping[str, Any]]) -> list[Matrix]:
    """Read back matrices that `record_of` has turned into JSON values."""
    return [_matrix(dict(record)) for record in records]


def _matrix(record: dict[str, Any]) -> Matrix:
    names = FORMS[record["form"]].SIZES if record["form"] in FORMS else ()
    found = {name: record.pop(name) for name in {*names, "rank"} if name in record}
    sizes = None if None in found.values() or record["form"] == "dense" else found
    return Matrix(**{**record, "shape": tuple(record["shape"]), "sizes": sizes})
