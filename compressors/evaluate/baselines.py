"""The same matrices made smaller by plain means: what a result has to be better than.

Plain is what needs no calibration: integers, rounded to nearest, or the largest entries of every
row. An alternative is made of the dense model in memory, one matrix at a time. Its bytes are
counted as a file would hold it.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lrc.compressors.evaluate.compare import Block, check_same, perplexity_entry
from lrc.compressors.io.machine import OnStep
from lrc.compressors.layers.scheme import Scheme
from lrc.compressors.layers.sparse import Sparse
from lrc.compressors.models.architecture import Architecture
from lrc.compressors.solvers.round_to_nearest import rtn
from lrc.configs.errors import ModelError
from lrc.configs.recipe import Evaluate

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SPARSE = "sparse"
HALVINGS = 40  # of the interval in which a share is looked for: finer than one entry of any row


@dataclass(frozen=True)
class Targets:
    """What a run makes smaller, and the bytes of the whole model before and after."""

    shapes: Mapping[str, tuple[int, int]]
    """Linear -> [d_out, d_in] of its weight."""
    dtype: torch.dtype
    """Of the dense model as it is stored."""
    dense_bytes: int
    compressed_bytes: int

    @classmethod
    def of(cls, plan: Mapping[str, Any], dense: Architecture, dtype: torch.dtype) -> "Targets":
        """Read them off an executed plan; slices touch every linear of the `dense` model."""
        if plan.get("slices"):
            shapes = {linear.name: (linear.d_out, linear.d_in) for linear in dense.linears}
        else:
            shapes = {m["name"]: (m["shape"][0], m["shape"][1]) for m in plan["matrices"]}
        for m in plan.get("outside", []):  # a slice may have made it narrower, or untied a head
            stored = dense.tied.get(f"{m['name']}.weight", f"{m['name']}.weight")
            d_out, d_in = dense.model.get_parameter(stored).shape
            shapes[stored.removesuffix(".weight")] = d_out, d_in
        totals = plan["totals"]
        return cls(shapes, dtype, totals["dense_bytes"], totals["compressed_bytes"])

    @property
    def source_bits(self) -> int:
        """Bits of the matrices in the dense model."""
        return sum(self.dtype.itemsize * 8 * m * n for m, n in self.shapes.values())

    @property
    def left_bits(self) -> int:
        """Bits that are left for them in a model of as many bytes as the result."""
        return self.source_bits - 8 * (self.dense_bytes - self.compressed_bytes)


@dataclass(frozen=True)
class Alternative:
    """What becomes of every matrix, and what that takes."""

    name: str
    how: str
    """How the matrices are made, for the reader of a report."""
    forms: Mapping[str, Scheme | int]
    """Linear -> its scheme, or the entries that are kept of every row."""
    bits: int
    """Of the matrices."""
    targets: Targets

    @property
    def bytes(self) -> int:
        """Bytes of the tensors of the whole model."""
        return self.targets.dense_bytes - (self.targets.source_bits - self.bits) // 8

    @property
    def kept(self) -> float:
        """Bits of the matrices over those in the dense model."""
        return self.bits / self.targets.source_bits

    def make_(self, model: Any, on_matrix: Callable[[int, int], None]) -> None:
        """Change the weights of a dense model; `on_matrix` hears (done, total) and may raise."""
        for done, (name, form) in enumerate(self.forms.items(), 1):
            weight = model.get_submodule(name).weight
            with torch.no_grad():
                weight.copy_(_made(weight, form, self.targets.dtype))
            on_matrix(done, len(self.forms))


def plan_alternative(written: str, targets: Targets) -> Alternative:
    """Decide what becomes of every matrix.

    Parameters
    ----------
    written : str
        A scheme, or ``sparse``, as the recipe writes it.
    targets : Targets
    """
    return _sparse(targets) if written == SPARSE else _rounded(Scheme.read(written), targets)


def _rounded(scheme: Scheme, targets: Targets) -> Alternative:
    forms: dict[str, Scheme | int] = {}
    bits = 0
    undivided: Counter[int] = Counter()
    for name, shape in targets.shapes.items():
        own = scheme
        if scheme.group_size is not None and shape[1] % scheme.group_size:
            own = Scheme(scheme.bits, symmetric=scheme.symmetric)
            undivided[shape[1]] += 1
        forms[name] = own
        leaves = own.matrix("weight", list(shape)).values()
        bits += sum(8 * prod(size) * (kind or targets.dtype).itemsize for size, kind in leaves)
    how = "rounded to nearest, the largest number of every scale at the end of its range"
    if undivided:
        rows = ", ".join(str(width) for width in sorted(undivided))
        how += (
            f"; one scale a row in {undivided.total()} of {len(forms)} matrices, whose rows of "
            f"{rows} numbers no groups of {scheme.group_size} fill"
        )
    return Alternative(str(scheme), how, forms, bits, targets)


def _sparse(targets: Targets) -> Alternative:
    """Keep the same share of every row, the largest that needs no more bytes than the result."""
    low, high = 0.0, 1.0
    if _sparse_bits(targets, _entries(targets, high)) <= targets.left_bits:
        low = high
    for _ in range(HALVINGS):
        share = (low + high) / 2
        fits = _sparse_bits(targets, _entries(targets, share)) <= targets.left_bits
        low, high = (share, high) if fits else (low, share)
    entries = _entries(targets, low)
    kept = sum(entries[name] * m for name, (m, _) in targets.shapes.items())
    share = 100 * kept / sum(m * n for m, n in targets.shapes.values())
    how = f"the largest {share:.1f} % of the entries of every row, and a mask of one bit an entry"
    return Alternative("sparse, magnitude", how, entries, _sparse_bits(targets, entries), targets)


def _entries(targets: Targets, share: float) -> dict[str, int]:
    """Return linear -> entries of a row; at least one, which may be more than the result takes."""
    return {name: max(1, int(share * n)) for name, (_, n) in targets.shapes.items()}


def _sparse_bits(targets: Targets, entries: Mapping[str, int]) -> int:
    bits = targets.dtype.itemsize * 8
    return sum(
        Sparse.stored_bits(m, n, bits=bits, nonzeros=m * entries[name])
        for name, (m, n) in targets.shapes.items()
    )


def _made(weight: Tensor, form: Scheme | int, dtype: torch.dtype) -> Tensor:
    """Return what a weight [d_out, d_in] becomes; `dtype` is that of scales in the file."""
    if isinstance(form, Scheme):
        return rtn(weight, form, dtype=dtype).weight()
    largest = weight.abs().topk(form, dim=1, sorted=False).indices  # [d_out, form]
    return torch.zeros_like(weight).scatter_(1, largest, weight.gather(1, largest))


def measure(
    alternative: Alternative,
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    evaluate: Evaluate,
    on_step: OnStep,
) -> dict[str, Block | None]:
    """Make an alternative of a dense model, whose weights change, and take its perplexities.

    A run whose own result is sound does not fail where an alternative is not.

    Returns
    -------
    dict
        Name of the text -> as of `evaluate_model`; None where the model is no longer finite, or
        where no scales of the file's precision can stand for its weights.
    """
    found: dict[str, Block | None] = {spec.name: None for spec in evaluate.perplexity}
    try:
        alternative.make_(model, lambda done, total: on_step("weights", done, total))
    except ValueError:
        return found
    for spec in evaluate.perplexity:
        with suppress(ModelError):
            found[spec.name] = perplexity_entry(model, tokenizer, spec, on_step)
    return found


def record(
    alternative: Alternative, scores: Mapping[str, Block | None], perplexity: Block
) -> Block:
    """Write an alternative as the report holds it.

    Parameters
    ----------
    alternative : Alternative
    scores : mapping
        Of `measure`.
    perplexity : dict
        The perplexities of the result, of `compare`.

    Raises
    ------
    DataError
        If the two were not scored on the same text.
    """
    for name, entry in scores.items():
        check_same(f"perplexity.{name}", entry, perplexity[name], what=alternative.name)
    return {
        "name": alternative.name,
        "how": alternative.how,
        "bytes": alternative.bytes,
        "kept": alternative.kept,
        "perplexity": {
            name: None if entry is None else entry["perplexity"] for name, entry in scores.items()
        },
    }
