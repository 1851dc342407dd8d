"""One unit of a plan: weights and what calibration knows in, records and stored tensors out."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lrc.compressors.decompose import (
    METHODS,
    CodedMethod,
    Factors,
    LowRankMethod,
    Spectrum,
    Statistics,
    shared_spectrum,
    split,
    split_codes,
)
from lrc.compressors.layers import FORMS, RankForm, Sharing
from lrc.compressors.memory import to_host
from lrc.compressors.planning.curves import (
    arguments,
    seen_nothing,
    summed_inputs,
    together,
    unknown,
)
from lrc.compressors.planning.plan import Matrix
from lrc.compressors.planning.units import Unit
from lrc.configs.decompose import DecomposeBase


@dataclass(frozen=True)
class Done:
    """What came of a unit, and its tensors by the names that the checkpoint gives them."""

    unit: Unit
    tensors: dict[str, Tensor]


def factor(
    unit: Unit,
    options: DecomposeBase,
    weights: Sequence[Tensor],
    known: Sequence[Statistics],
    *,
    dtype: torch.dtype,
    bias: Tensor | None = None,
    seed: int = 0,
) -> Done:
    """Factor the weights of a unit at its planned rank, and round to the model's precision.

    Parameters
    ----------
    unit : Unit
        With a rank.
    options : DecomposeBase
        Of its stage.
    weights : sequence of Tensor, each of shape [d_out, d_in]
        One a member.
    known : sequence of Statistics
        One a member, on the device of the weights.
    dtype : torch.dtype
        Of the model.
    bias : Tensor, shape [d_out], optional
        That of the dense layer, for a method that changes it.
    seed : int
        Of the random choices of a method that makes any.

    Returns
    -------
    Done
        Dense, with the reason as `fallback`, where the factors cannot be had or stored.
    """
    note = unknown(known, options)
    if note is not None:
        return Done(unit.dense(fallback=note), {})
    method = METHODS[options.method].for_form(unit.first.form)
    if isinstance(method, CodedMethod):
        own = arguments(options, method, seed)
        return _coded(unit, own, method, weights, known, dtype)
    curve = _curve(options, weights, known)
    unit, factors, tensors = _encoded(unit, curve, options)
    if unit.sizes is None:
        return Done(unit, {})
    tensors = _rounded(tensors, dtype)
    if curve.mean is not None:
        tensors |= _bias(unit.first, weights[0], tensors, curve.mean, bias, dtype)
    if not all(bool(torch.isfinite(t).all()) for t in tensors.values()):
        return Done(unit.dense(fallback=f"factors overflow {dtype}; stays dense"), {})
    tensors = {name: to_host(t) for name, t in tensors.items()}
    tail, n_tokens = curve.tail_energy(factors.rank), known[0].n_tokens
    counts = n_tokens > 0 and not seen_nothing(known)  # else the energies are no losses
    nats = METHODS[options.method].nats_per_token(tail, n_tokens) if counts else None
    return Done(unit.at(factors.rank, loss=factors.loss, predicted_nats=nats), tensors)


def _coded(
    unit: Unit,
    own: Mapping[str, Any],
    method: CodedMethod,
    weights: Sequence[Tensor],
    known: Sequence[Statistics],
    dtype: torch.dtype,
) -> Done:
    """Solve a unit at its sizes, for a method that gives no spectrum."""
    assert unit.sizes is not None
    n_tokens = known[0].n_tokens
    found = method.solve(torch.cat([*weights]), together(known), unit.sizes, **own)
    several = len(unit.members) > 1
    each = split_codes(found.parts, len(unit.members)) if several else [found.parts]
    encoded = {
        f"{m.name}.{leaf}": tensor
        for m, parts in zip(unit.members, each, strict=True)
        for leaf, tensor in FORMS[m.form].encode(**parts).items()
    }
    tensors = _rounded(encoded, dtype)
    if not all(bool(torch.isfinite(t).all()) for t in tensors.values()):
        return Done(unit.dense(fallback=f"values overflow {dtype}; stays dense"), {})
    counts = n_tokens > 0 and not seen_nothing(known)
    nats = method.nats_per_token(found.energy, n_tokens) if counts else None
    done = unit.at(unit.sizes, loss=found.loss, predicted_nats=nats, fallback=found.fallback)
    return Done(done, {name: to_host(t) for name, t in tensors.items()})


def refitted(matrix: Matrix, V: Tensor, dtype: torch.dtype, note: str | None = None) -> Done:
    """Store the refitted weight of a matrix that stays dense; `note` becomes its fallback."""
    rounded = to_host(V.to(dtype))
    if not bool(torch.isfinite(rounded).all()):
        note = _joined(note, f"the refitted weight overflows {dtype}; stays as it was")
        return Done(Unit((replace(matrix, fallback=note),)), {})
    record = replace(matrix, refit=True, fallback=note)
    return Done(Unit((record,)), {f"{matrix.name}.weight": rounded})


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
    leaves = form.shapes(d_out, d_in, matrix.sizes, bias=False)
    tensors = {leaf: read(f"{matrix.name}.{leaf}") for leaf in leaves}
    like = tensors[next(leaf for leaf, (_, kind) in leaves.items() if kind is None)]
    module = form(d_in, d_out, bias=False, device=like.device, dtype=like.dtype, **matrix.sizes)
    module.load_state_dict(tensors)
    if isinstance(module, Sharing):
        module.share_factor(read(f"{matrix.group}.a.weight"))
    with torch.no_grad():
        return module.product()


def _curve(
    options: DecomposeBase, weights: Sequence[Tensor], known: Sequence[Statistics]
) -> Spectrum:
    method = METHODS[options.method].for_form("low_rank")
    assert isinstance(method, LowRankMethod)
    if len(weights) > 1:
        return shared_spectrum(weights, summed_inputs(known), **arguments(options, method))
    return method.solve(weights[0], known[0], **arguments(options, method))


def _encoded(
    unit: Unit, curve: Spectrum, options: DecomposeBase
) -> tuple[Unit, Factors, dict[str, Tensor]]:
    """Cut at the planned rank and write the cut in the planned form; or in two plain factors.

    Plain factors of the same rank are larger: the rank is lowered to what the plan has bits for.
    """
    assert unit.first.rank is not None
    factors = curve.truncate(unit.first.rank)
    try:
        tensors = _encode(unit, factors)
        return unit.at(factors.rank, fallback=factors.fallback), factors, tensors
    except ValueError as error:
        reason, share = str(error), unit.bits({"rank": unit.first.rank}) / unit.source_bits
    plain = Unit(tuple(replace(m, form="low_rank") for m in unit.members))
    rank = plain.step_within(share, "bits", multiple=options.rank_multiple)
    if rank == 0:
        note = _joined(factors.fallback, f"{reason}; stays dense")
        return unit.dense(fallback=note), factors, {}
    factors = curve.truncate(rank)
    note = _joined(factors.fallback, f"stored as low_rank of rank {factors.rank}: {reason}")
    return plain.at(factors.rank, fallback=note), factors, _encode(plain, factors)


def _encode(unit: Unit, factors: Factors) -> dict[str, Tensor]:
    parts = split(factors.B, len(unit.members))
    return {
        f"{m.name}.{leaf}": tensor
        for m, B in zip(unit.members, parts, strict=True)
        for leaf, tensor in _rank_form(m.form).encode(B, factors.A).items()
    }


def _rank_form(name: str) -> type[RankForm]:
    form = FORMS[name]
    assert issubclass(form, RankForm)
    return form


def _rounded(tensors: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: t.to(dtype) if t.is_floating_point() else t for name, t in tensors.items()}


def _bias(
    matrix: Matrix,
    W: Tensor,
    tensors: dict[str, Tensor],
    mean: Tensor,
    dense: Tensor | None,
    dtype: torch.dtype,
) -> dict[str, Tensor]:
    """Return the bias that gives the mean input its dense output, behind the rounded factors."""
    W_hat = product(matrix, tensors.__getitem__).double()
    delta = (W.double() - W_hat) @ mean.double()  # [d_out]
    whole = delta if dense is None else dense.double() + delta
    return {f"{matrix.name}.{FORMS[matrix.form].BIAS}": whole.to(dtype)}


def _joined(*notes: str | None) -> str:
    return "; ".join(filter(None, notes))
