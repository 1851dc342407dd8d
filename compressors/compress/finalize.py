"""How what a method has found of a unit ends up in the file: rounded, to floats or to integers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lrc.compressors.compress.quantize_parts import Integers, Rounding, round_parts
from lrc.compressors.io.machine import to_host
from lrc.compressors.layers import FORMS, Sharing
from lrc.compressors.planning.plan import Matrix
from lrc.compressors.planning.weight_groups import Unit
from lrc.compressors.solvers.linalg import damped, weighted_error
from lrc.compressors.solvers.moments import Statistics
from lrc.compressors.solvers.quantization_grid import ScaleOverflow
from lrc.configs.errors import ModelError


@dataclass(frozen=True)
class Done:
    """What came of a unit, and its tensors by the names that the checkpoint gives them."""

    unit: Unit
    tensors: dict[str, Tensor]


@dataclass(frozen=True)
class Ending:
    """What is known of the weights of a unit, and what the file is to hold of them."""

    weights: Sequence[Tensor]
    known: Sequence[Statistics]
    dtype: torch.dtype
    how: Rounding | None
    seed: int
    gradient_damp: float | None = None
    """Of the mean diagonal, added to the gradients' moments; None if errors are not weighed by
    them."""

    def moment(self, member: int) -> Tensor | None:
        """Return the second moment of the inputs, if it is known whole."""
        inputs = self.known[member].inputs
        seen = inputs is not None and inputs.full is not None and not inputs.empty
        return inputs.whole() if inputs is not None and seen else None

    def output_moment(self, member: int) -> Tensor | None:
        """Return the damped second moment of the output gradients, if it is known whole."""
        if self.gradient_damp is None:
            return None
        seen = self.known[member].gradients
        if seen is None or seen.full is None or seen.empty:
            return None
        return damped(seen.whole(), self.gradient_damp)

    def store(self, unit: Unit, encoded: list[dict[str, Tensor]]) -> tuple[Unit, dict[str, Tensor]]:
        """Round the parts of every member, by their names within the module.

        Raises
        ------
        ScaleOverflow
            If no scales of the file's precision can stand for one.
        """
        stored: dict[str, Tensor] = {}
        notes = []
        for number, (m, parts) in enumerate(zip(unit.members, encoded, strict=True)):
            if self.how is None or m.scheme is None:
                found = Integers(rounded_to(parts, self.dtype))
            else:
                W, H, G = self.weights[number], self.moment(number), self.output_moment(number)
                found = round_parts(m, W, parts, H, self.how, dtype=self.dtype, seed=self.seed, G=G)
            stored |= {f"{m.name}.{leaf}": tensor for leaf, tensor in found.tensors.items()}
            notes.append(found.fallback)
        note = joined(*dict.fromkeys(notes))
        if note:
            unit = unit.at(unit.sizes or {}, fallback=joined(unit.first.fallback, note))
        return unit, stored

    def integers(self, unit: Unit, fallback: str | None = None) -> Done:
        """Round whole weights, planned so or for want of a form: `fallback` has the reason.

        Raises
        ------
        ModelError
            If no scales of the file's precision can stand for a weight.
        """
        assert unit.sizes is not None
        unit = unit.at(unit.sizes, fallback=fallback)
        try:
            unit, tensors = self.store(unit, [{} for _ in unit.members])
        except ScaleOverflow as error:
            raise ModelError(
                f"{unit.first.name} {list(unit.first.shape)}: cannot be rounded to "
                f"{unit.first.scheme}: {error}; take model.dtype: bfloat16, or list the layer "
                "under 'skip'"
            ) from error
        losses = []
        for number, (each, W) in enumerate(zip(unit.members, self.weights, strict=True)):
            W_hat = product(each, tensors.__getitem__)
            H = self.moment(number)
            losses.append(weighted_error(W, W_hat, H) / (weighted_error(W, 0 * W, H) or 1.0))
        members = zip(unit.members, losses, strict=True)
        unit = Unit(tuple(each.at(each.sizes or {}, loss=min(loss, 1.0)) for each, loss in members))
        return Done(unit, {name: to_host(t) for name, t in tensors.items()})


def product(matrix: Matrix, read: Callable[[str], Tensor]) -> Tensor:
    """Return the weight [d_out, d_in] that the stored tensors of a matrix stand for.

    Parameters
    ----------
    matrix : Matrix
        As executed: factored, or refitted and dense.
    read : callable
        Returns a stored tensor by its name in the checkpoint.
    """
    if matrix.form == "dense":
        return read(f"{matrix.name}.weight")
    assert matrix.sizes is not None
    d_out, d_in = matrix.shape
    form = FORMS[matrix.form]
    spec = {**matrix.sizes, "scheme": matrix.scheme}
    leaves = form.stored(d_out, d_in, spec, bias=False)
    tensors = {leaf: read(f"{matrix.name}.{leaf}") for leaf in leaves}
    like = tensors[next(leaf for leaf, (_, kind) in leaves.items() if kind is None)]
    module = form(
        d_in,
        d_out,
        bias=False,
        scheme=matrix.scheme,
        device=like.device,
        dtype=like.dtype,
        **matrix.sizes,
    )
    module.load_state_dict(tensors)
    if isinstance(module, Sharing):
        borrowed = module.borrowed(d_out, d_in, spec)
        module.share_factor({leaf: read(f"{matrix.group}.{leaf}") for leaf in borrowed})
    with torch.no_grad():
        return module.product()


def rounded_to(tensors: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Return tensors with what is no integer at a precision."""
    return {name: t.to(dtype) if t.is_floating_point() else t for name, t in tensors.items()}


def joined(*notes: str | None) -> str | None:
    """Return what there is of several notes as one."""
    return "; ".join(filter(None, notes)) or None
