"""Compress one group of weights: solve, encode the components, cast or quantize them."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from lrc.compressors.compress.group import (
    CompressedGroup,
    WeightGroup,
    component_tensors,
    joined,
    left_dense,
)
from lrc.compressors.compress.quantize_parts import (
    QuantizedParts,
    nearest_parts,
    quantize_parts,
    quantize_whole,
)
from lrc.compressors.io.device_copies import to_host
from lrc.compressors.io.finite import all_finite
from lrc.compressors.layers import COMPONENTS, WeightConfig, reconstruct
from lrc.compressors.layers.pivot_rows import NoPivotRows
from lrc.compressors.methods.base import FixedSizeMethod, Method
from lrc.compressors.methods.group_statistics import combined, has_zero_statistics, missing_reason
from lrc.compressors.methods.table import METHODS, LowRankMethod
from lrc.compressors.planning.measures import BITS
from lrc.compressors.planning.sizes import SizeSteps
from lrc.compressors.planning.tasks import LayerResult, LayerTask
from lrc.compressors.solvers.linalg import weighted_error
from lrc.compressors.solvers.quantization_grid import ScaleOverflow
from lrc.compressors.solvers.quantized_matrix import QuantizedMatrix
from lrc.compressors.solvers.shared_factors import shared_spectrum, split, split_codes
from lrc.compressors.solvers.spectrum import Factors, Spectrum
from lrc.configs.errors import ModelError

WHOLE_TYPES = ("dense", "block_sparse")
"""First component of weights that are quantized without decomposition."""
Encoded = list[list[dict[str, Tensor]]]
"""For every member, the tensors of every component."""


def compress_group(group: WeightGroup) -> CompressedGroup:
    """Compress the weights of a task as its configuration says.

    Returns
    -------
    CompressedGroup
        With dense weights and the reason as `fallback` where the components cannot be computed or
        stored; these weights are quantized if the task is.
    """
    task = group.task
    if task.config.components[0].type in WHOLE_TYPES:
        return quantized_weights(group, task.config)
    found = _decomposed(group)
    args = task.config.quantization
    if found.result.config.compressed or args is None:
        return found
    config = SizeSteps(task, "dense", args).config(1)
    return quantized_weights(group, replace(config, bias=False), found.result.fallback)


def refit_dense(
    task: LayerTask, V: Tensor, dtype: torch.dtype, fallback: str | None
) -> CompressedGroup:
    """Store the refit weight `V` [d_out, d_in] of a task that stays dense."""
    config = WeightConfig(task.shape)
    rounded = to_host(V.to(dtype))
    if not all_finite(rounded):
        reason = joined(fallback, f"the refit weight overflows {dtype}; kept as in the source")
        return CompressedGroup(task, LayerResult(config, fallback=reason))
    result = LayerResult(config, refit=True, fallback=fallback)
    return CompressedGroup(task, result, {f"{task.name}.weight": rounded})


def _decomposed(group: WeightGroup) -> CompressedGroup:
    """Compute the planned components; dense where that fails."""
    task, method = group.task, METHODS[group.task.method]
    if reason := missing_reason(group.statistics, method.statistics):
        return left_dense(task, reason)
    part = method.parts[task.config.at_budget(-1).types]
    if isinstance(part, FixedSizeMethod):
        return _fixed_size(group, part)
    assert isinstance(part, LowRankMethod)
    return _low_rank(group, part)


def _fixed_size(group: WeightGroup, method: FixedSizeMethod) -> CompressedGroup:
    """Solve at the planned sizes."""
    task, config = group.task, group.task.config
    found = method.solve(
        torch.cat([*group.weights]),
        combined(group.statistics),
        config.sizes,
        **method.select(task.options),
    )
    parts: list[tuple[Mapping[str, Tensor], ...]] = [found.parts]
    if len(task.weights) > 1:
        parts = [(each,) for each in split_codes(found.parts[0], len(task.weights))]
    encoded: Encoded = [
        [COMPONENTS[c.type].encode(**p) for c, p in zip(config.components, member, strict=True)]
        for member in parts
    ]
    nats = _predicted(group, method, found.squared_error)
    return _stored(
        group, LayerResult(config, found.relative_error, nats, fallback=found.fallback), encoded
    )


def _low_rank(group: WeightGroup, method: LowRankMethod) -> CompressedGroup:
    """Truncate the spectrum at the planned rank."""
    options = method.select(group.task.options)
    if len(group.weights) > 1:
        inputs = combined(group.statistics).inputs
        assert inputs is not None
        curve = shared_spectrum(group.weights, inputs, **options)
    else:
        curve = method.solve(group.weights[0], group.statistics[0], **options)
    config, factors, encoded, note = _encoded(group.task, curve, group.dtype)
    if config is None:
        return left_dense(group.task, note)
    nats = _predicted(group, method, curve.tail_energy(factors.rank))
    result = LayerResult(config, factors.relative_error, nats, fallback=note)
    return _stored(group, result, encoded, curve.mean)


def _predicted(group: WeightGroup, method: Method, squared_error: float) -> float | None:
    """Return the predicted increase of the loss; None if it cannot be predicted."""
    n_tokens = group.statistics[0].n_tokens
    if n_tokens == 0 or has_zero_statistics(group.statistics):
        return None
    return method.predicted_increase(squared_error, n_tokens)


def _encoded(
    task: LayerTask, curve: Spectrum, dtype: torch.dtype
) -> tuple[WeightConfig | None, Factors, Encoded, str | None]:
    """Truncate at the planned rank and encode; as two plain factors if that is not possible.

    Plain factors of the same rank are larger: the rank is lowered to the planned size.
    """
    component, *others = task.config.components
    args = component.quantization
    group_size = 1 if args is None else args.row_multiple
    rank = component.sizes["rank"]
    if others:
        return _refined(task, curve, dtype)
    factors = _padded(curve.truncate(rank), group_size)

    def encode(kind: str) -> Encoded:
        parts = split(factors.B, len(task.weights))
        return [[COMPONENTS[kind].encode(B=B, A=factors.A)] for B in parts]

    try:
        encoded = encode(component.type)
        config = replace(task.config, components=(component.with_rank(factors.rank),))
        return config, factors, encoded, factors.fallback
    except NoPivotRows as error:
        reason, fraction = str(error), task.bits_of(task.config) / task.dense_bits
    plain = SizeSteps(task, "low_rank", args)
    rank = plain.within(fraction, BITS, multiple=group_size)
    if rank == 0:
        return None, factors, [], joined(factors.fallback, f"{reason}; stays dense")
    factors = _padded(curve.truncate(rank), group_size)
    note = joined(factors.fallback, f"stored as low_rank of rank {factors.rank}: {reason}")
    return plain.config(factors.rank), factors, encode("low_rank"), note


def _refined(
    task: LayerTask, curve: Spectrum, dtype: torch.dtype
) -> tuple[WeightConfig, Factors, Encoded, str | None]:
    """Encode the first singular vectors as pivot rows, and the next ones as integers.

    Without pivot rows, two plain factors take at each budget as much as planned.
    """
    base, refinement = task.config.components
    args, planned = refinement.quantization, base.sizes["rank"]
    assert args is not None
    factors = curve.truncate(planned + refinement.sizes["rank"])
    rank = min(planned, factors.rank)
    try:
        encoded = [COMPONENTS[base.type].encode(B=factors.B[:, :rank], A=factors.A[:rank])]
    except NoPivotRows as error:
        plain = SizeSteps(task, "low_rank")
        costs = [task.bits_of(task.config.at_budget(i)) for i in range(len(refinement.ranks))]
        ranks = [max(plain.within(cost / task.dense_bits, BITS), 1) for cost in costs]
        factors = curve.truncate(ranks[0])
        note = joined(factors.fallback, f"stored as low_rank of rank {factors.rank}: {error}")
        (component,) = plain.config(ranks[0]).components
        component = replace(component, ranks=tuple(ranks)).with_rank(factors.rank)
        config = replace(task.config, components=(component,))
        return config, factors, [[COMPONENTS["low_rank"].encode(B=factors.B, A=factors.A)]], note
    components = [base.with_rank(rank)]
    if factors.rank > rank:
        components.append(refinement.with_rank(factors.rank - rank))
        rest = {"a.weight": factors.A[rank:], "b.weight": factors.B[:, rank:]}
        encoded.append(nearest_parts(rest, args, dtype))
    config = replace(task.config, components=tuple(components))
    return config, factors, [encoded], factors.fallback


def _padded(factors: Factors, multiple: int) -> Factors:
    """Pad a rank that was lowered to a multiple of the group size, with zeros."""
    missing = -factors.rank % multiple
    if not missing:
        return factors
    pad = torch.nn.functional.pad
    B, A = pad(factors.B, (0, missing)), pad(factors.A, (0, 0, 0, missing))
    return replace(factors, B=B, A=A)


def _stored(
    group: WeightGroup, result: LayerResult, encoded: Encoded, mean: Tensor | None = None
) -> CompressedGroup:
    """Cast or quantize the components of every member; dense where a number overflows."""
    config, fallback = result.config, result.fallback
    tensors: dict[str, Tensor] = {}
    try:
        for member, weight in enumerate(group.task.weights):
            own = group.task.config_of(weight, config)
            found = (
                QuantizedParts(_cast(encoded[member], group.dtype))
                if config.quantization is None or config.elastic
                else quantize_parts(group, member, own, encoded[member])
            )
            fallback = joined(fallback, found.fallback)
            for leaf, tensor in component_tensors(own, found.tensors).items():
                tensors[f"{weight.name}.{leaf}"] = tensor
    except ScaleOverflow as error:
        return left_dense(group.task, str(error))
    compressed = CompressedGroup(group.task, replace(result, fallback=fallback), tensors)
    if mean is not None:
        tensors[f"{group.task.name}.bias"] = _bias(group, compressed, mean)
    if not all(all_finite(t) for t in tensors.values() if t.is_floating_point()):
        return left_dense(group.task, f"components overflow {group.dtype}; stays dense")
    return replace(compressed, tensors={name: to_host(t) for name, t in tensors.items()})


def _cast(parts: list[dict[str, Tensor]], dtype: torch.dtype) -> list[dict[str, Tensor]]:
    return [
        {name: t.to(dtype) if t.is_floating_point() else t for name, t in part.items()}
        for part in parts
    ]


def _bias(group: WeightGroup, compressed: CompressedGroup, mean: Tensor) -> Tensor:
    """Return the bias that gives the mean input its dense output, for the stored factors."""
    W_hat = compressed.weight(group.task.name).double()
    delta = (group.weights[0].double() - W_hat) @ mean.double()  # [d_out]
    whole = delta if group.bias is None else group.bias.double() + delta
    return whole.to(group.dtype)


def quantized_weights(
    group: WeightGroup,
    config: WeightConfig,
    fallback: str | None = None,
    solved: QuantizedMatrix | None = None,
) -> CompressedGroup:
    """Quantize whole weights, as planned or because their components cannot be stored.

    `solved` is the only weight of the group if it is quantized already.

    Raises
    ------
    ModelError
        If the scales of a weight overflow the dtype of the file.
    """
    task = group.task
    tensors: dict[str, Tensor] = {}
    error = total = 0.0
    for member, (weight, W) in enumerate(zip(task.weights, group.weights, strict=True)):
        try:
            found = quantize_whole(group, member, config, solved)
        except ScaleOverflow as overflow:
            raise ModelError(
                f"{weight.name} {list(task.shape)}: cannot be quantized to {config.quantization}: "
                f"{overflow}; use model.dtype: bfloat16, or list the layer under 'ignore'",
                code="scale-overflow",
            ) from overflow
        fallback = joined(fallback, found.fallback)
        stored = component_tensors(config, found.tensors)
        H = group.input_moment(member)
        error += weighted_error(W, reconstruct(config, stored.__getitem__), H)
        total += weighted_error(W, 0 * W, H)
        tensors |= {f"{weight.name}.{leaf}": to_host(t) for leaf, t in stored.items()}
    result = LayerResult(config, min(error / (total or 1.0), 1.0), fallback=fallback)
    return CompressedGroup(task, result, tensors)
