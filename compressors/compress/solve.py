"""One unit of a plan: weights and what calibration knows in, records and stored tensors out."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lrc.compressors.compress.finalize import Done, Ending, joined, product
from lrc.compressors.compress.quantize_parts import Rounding
from lrc.compressors.io.machine import to_host
from lrc.compressors.layers import FORMS, RankForm
from lrc.compressors.methods.base import CodedMethod
from lrc.compressors.methods.table import METHODS, LowRankMethod
from lrc.compressors.planning.plan import Matrix
from lrc.compressors.planning.quantization import WHOLE
from lrc.compressors.planning.rate_distortion import (
    arguments,
    seen_nothing,
    summed_inputs,
    together,
    unknown,
)
from lrc.compressors.planning.weight_groups import Unit
from lrc.compressors.solvers.moments import Statistics
from lrc.compressors.solvers.quantization_grid import ScaleOverflow
from lrc.compressors.solvers.shared_factors import shared_spectrum, split, split_codes
from lrc.compressors.solvers.spectrum import Factors, Spectrum
from lrc.configs.decompose import DecomposeBase
from lrc.configs.quantize import Quantize


def factor(
    unit: Unit,
    options: DecomposeBase | Quantize,
    weights: Sequence[Tensor],
    known: Sequence[Statistics],
    *,
    dtype: torch.dtype,
    bias: Tensor | None = None,
    rounding: Rounding | None = None,
    seed: int = 0,
) -> Done:
    """Factor the weights of a unit at its planned sizes, and round to what the file holds.

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
    rounding : Rounding, optional
        How integers are found, of a unit with a scheme.
    seed : int
        Of the random choices of a method that makes any.

    Returns
    -------
    Done
        Dense, with the reason as `fallback`, where the factors cannot be had or stored; as
        integers, where it has a scheme.
    """
    weighed = "gradients" in METHODS[options.method].for_form(unit.first.form).needs
    gradient_damp = getattr(options, "gradient_damp", 0.0) if weighed else None
    end = Ending(weights, known, dtype, rounding, seed, gradient_damp)
    if unit.first.form in WHOLE:
        return end.integers(unit)
    done = _solved(unit, options, end, bias)
    if unit.first.scheme is None or done.unit.sizes is not None:
        return done
    scheme, stage = unit.first.scheme, unit.first.rounded
    assert stage is not None
    notes = [each.fallback for each in done.unit.members]
    whole = Unit(tuple(each.integers(scheme, stage) for each in unit.members))
    return end.integers(whole, fallback=joined(*dict.fromkeys(notes)))


def _solved(
    unit: Unit, options: DecomposeBase | Quantize, end: Ending, bias: Tensor | None
) -> Done:
    """Find the planned form of a unit; dense where that cannot be had."""
    assert isinstance(options, DecomposeBase)
    weights, known, dtype = end.weights, end.known, end.dtype
    note = unknown(known, options)
    if note is not None:
        return Done(unit.dense(fallback=note), {})
    method = METHODS[options.method].for_form(unit.first.form)
    if isinstance(method, CodedMethod):
        own = arguments(options, method, end.seed)
        return _coded(unit, own, method, end)
    curve = _curve(options, weights, known)
    unit, factors, encoded = _encoded(unit, curve, options)
    if unit.sizes is None:
        return Done(unit, {})
    try:
        unit, tensors = end.store(unit, encoded)
    except ScaleOverflow as error:
        return Done(unit.dense(fallback=str(error)), {})
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
    end: Ending,
) -> Done:
    """Solve a unit at its sizes, for a method that gives no spectrum."""
    assert unit.sizes is not None
    weights, known, dtype = end.weights, end.known, end.dtype
    n_tokens = known[0].n_tokens
    found = method.solve(torch.cat([*weights]), together(known), unit.sizes, **own)
    several = len(unit.members) > 1
    each = split_codes(found.parts, len(unit.members)) if several else [found.parts]
    encoded = [FORMS[m.form].encode(**p) for m, p in zip(unit.members, each, strict=True)]
    try:
        unit, tensors = end.store(unit, encoded)
    except ScaleOverflow as error:
        return Done(unit.dense(fallback=str(error)), {})
    if not all(bool(torch.isfinite(t).all()) for t in tensors.values()):
        return Done(unit.dense(fallback=f"values overflow {dtype}; stays dense"), {})
    counts = n_tokens > 0 and not seen_nothing(known)
    nats = method.nats_per_token(found.energy, n_tokens) if counts else None
    fallback = joined(found.fallback, unit.first.fallback)
    assert unit.sizes is not None
    done = unit.at(unit.sizes, loss=found.loss, predicted_nats=nats, fallback=fallback)
    return Done(done, {name: to_host(t) for name, t in tensors.items()})


def refitted(matrix: Matrix, V: Tensor, dtype: torch.dtype, note: str | None = None) -> Done:
    """Store the refitted weight of a matrix that stays dense; `note` becomes its fallback."""
    rounded = to_host(V.to(dtype))
    if not bool(torch.isfinite(rounded).all()):
        note = joined(note, f"the refitted weight overflows {dtype}; stays as it was")
        return Done(Unit((replace(matrix, fallback=note),)), {})
    record = replace(matrix, refit=True, fallback=note)
    return Done(Unit((record,)), {f"{matrix.name}.weight": rounded})


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
) -> tuple[Unit, Factors, list[dict[str, Tensor]]]:
    """Cut at the planned rank and write the cut in the planned form; or in two plain factors.

    Plain factors of the same rank are larger: the rank is lowered to what the plan has bits for.
    """
    assert unit.first.rank is not None
    factors = _whole_groups(curve.truncate(unit.first.rank), unit.group)
    try:
        tensors = _encode(unit, factors)
        return unit.at(factors.rank, fallback=factors.fallback), factors, tensors
    except ValueError as error:
        reason, share = str(error), unit.bits({"rank": unit.first.rank}) / unit.source_bits
    plain = Unit(tuple(replace(m, form="low_rank") for m in unit.members))
    rank = plain.step_within(share, "bits", multiple=unit.rank_multiple(options))
    if rank == 0:
        note = joined(factors.fallback, f"{reason}; stays dense")
        return unit.dense(fallback=note), factors, []
    factors = _whole_groups(curve.truncate(rank), unit.group)
    note = joined(factors.fallback, f"stored as low_rank of rank {factors.rank}: {reason}")
    return plain.at(factors.rank, fallback=note), factors, _encode(plain, factors)


def _whole_groups(factors: Factors, group: int) -> Factors:
    """Fill a rank that had to be lowered up to a multiple of a group, with zeros."""
    missing = -factors.rank % group
    if not missing:
        return factors
    pad = torch.nn.functional.pad
    B, A = pad(factors.B, (0, missing)), pad(factors.A, (0, 0, 0, missing))
    return replace(factors, B=B, A=A)


def _encode(unit: Unit, factors: Factors) -> list[dict[str, Tensor]]:
    parts = split(factors.B, len(unit.members))
    members = zip(unit.members, parts, strict=True)
    return [_rank_form(m.form).encode(B, factors.A) for m, B in members]


def _rank_form(name: str) -> type[RankForm]:
    form = FORMS[name]
    assert issubclass(form, RankForm)
    return form


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
