"""Sequential calibration: inputs of a layer after the layers before it have been compressed.

This module also finds out which linear layers write to the residual stream, without a table of
model families. A linear is a writer if replacing its output by zeros changes the output of its
decoder layer by exactly that output. If a norm or a multiplier follows, as in some architectures,
the change differs, and the linear is not a writer.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from lrc.compressors.calibrate.activation_cache import ActivationCache, copy_states
from lrc.compressors.calibrate.calibration_context import CalibrationContext, check_finite
from lrc.compressors.calibrate.encoder_decoder_executor import executor_of
from lrc.compressors.calibrate.expert_inputs import (
    add_moments_,
    by_matrix,
    experts_of,
    read_inputs,
)
from lrc.compressors.calibrate.layer_executor import ForwardEnded
from lrc.compressors.calibrate.statistic_table import RunningSums
from lrc.compressors.distributed.processes import OrderedSum
from lrc.compressors.io.freed_memory import drop_shared_pages
from lrc.compressors.solvers.error_compensation import PrefixMoments
from lrc.compressors.solvers.linalg import tensor_cores
from lrc.compressors.solvers.moments import token_weights

REMEDY = "raise 'keep', or leave out 'compensate'"
EXPERT_BYTES = 2**29
"""Moments of experts that are summed in one pass over the calibration windows."""
TOLERANCE = 1e-2  # relative; more than rounding causes, and less than a multiplier causes


class SequentialCalibration:
    """Hidden states of the dense model and of the partly compressed one, layer by layer.

    `insert` sets a compressed weight, `measure` sums moments of the inputs of a linear in both
    models, and `advance` goes on to the next layer. Within a layer, call `measure` and `insert` in
    the order in which the linears are used.

    While the inputs of experts are measured, the compressed model uses the experts and weights that
    the router of the dense model has selected, so that both have the same tokens.
    """

    def __init__(self, context: CalibrationContext) -> None:
        half = replace(context, memory_limit_gib=context.memory_limit_gib / 2)
        self._device = context.device
        self._executor = executor_of(half, in_turn=True)
        self.n_tokens = self._executor.n_tokens
        self._replaced: dict[tuple[str, str], nn.Parameter] = {}
        self._writers: dict[tuple[object, ...], list[str]] = {}  # by kind of layer
        self._of_experts: dict[tuple[str, bool, bool], PrefixMoments] = {}
        self._dense = self._executor.embedded("dense")
        self._compressed = ActivationCache(half, "compressed", self._executor.shape).tensor
        copy_states(self._compressed, self._dense)

    def groups(self, layer: int) -> list[list[str]]:
        """Return the linears of a decoder layer that share an input, in order; see `by_matrix`."""
        return by_matrix(self._executor.architecture.model, self._executor.calls[layer].groups)

    def insert(self, name: str, W_hat: Tensor, bias: Tensor | None = None) -> None:
        """Use ``W_hat`` [d_out, d_in], and `bias` [d_out] if given, in the compressed model."""
        for leaf, tensor in (("weight", W_hat), ("bias", bias)):
            if tensor is not None:
                tensor = tensor.to(self._device, torch.float32)
                self._replaced[name, leaf] = nn.Parameter(tensor, requires_grad=False)

    @torch.no_grad()
    def measure(
        self,
        layer: int,
        names: Sequence[str],
        *,
        deficit: bool,
        capped: bool = False,
        gated: bool = False,
    ) -> PrefixMoments:
        """Return second moments of the input that the linears `names`, one of `groups`, share.

        With `deficit`, the moments of the difference between the residual streams are included if
        the first linear writes to the stream. With `capped`, tokens are weighted by `token_weights`
        of the inputs in the compressed model, and with `gated` those of an expert by the router.
        Raises a `ModelError` that names the linear if the inputs are not finite.
        """
        executor, leader = self._executor, names[0]
        if self._experts_of(leader):
            key = leader, capped, gated
            if key not in self._of_experts:
                self._of_experts = self._measured_experts(layer, leader, capped, gated)
            return self._of_experts.pop(key)
        ordered = OrderedSum(executor.context.processes, executor.n_batches)
        with self._loaded(layer) as module:
            writers = self._residual_writers(layer, module) if deficit else []
            # Without the output of the leader and of later writers, the output of the layer is the
            # residual stream to which the leader adds its output.
            zeroed = writers[writers.index(leader) :] if leader in writers else []
            for rows in executor.batches:
                sums = RunningSums()
                x, stream = self._input(layer, self._dense, rows, leader, zeroed)
                with self._using_replaced():
                    x_hat, stream_hat = self._input(layer, self._compressed, rows, leader, zeroed)
                if capped:
                    weights = token_weights(x_hat, executor.window or len(x_hat)).sqrt()
                    x, x_hat = weights * x, weights * x_hat
                drop_shared_pages(self._dense[rows])
                drop_shared_pages(self._compressed[rows])
                sums.add_square("H", x_hat)
                sums.add_product("cross", x, x_hat)
                if stream is not None and stream_hat is not None:
                    missing = (stream - stream_hat).flatten(0, -2)
                    sums.add_product("deficit", weights * missing if capped else missing, x_hat)
                ordered.add_(sums)
        found = ordered.total()
        for total in found.values():
            check_finite(
                total,
                f"the inputs of {leader} after the compressed layers",
                REMEDY,
            )
        deficits = {leader: found["deficit"]} if zeroed else {}
        return PrefixMoments(found["H"], found["cross"], deficits)

    def _measured_experts(
        self, layer: int, leader: str, capped: bool, gated: bool
    ) -> dict[tuple[str, bool, bool], PrefixMoments]:
        """Return the moments of the input of one matrix of an expert, and of the experts after it.

        Of as many as have `EXPERT_BYTES` of moments.
        """
        executor, leaf = self._executor, leader.rpartition(".")[2]
        names = [group[0] for group in self.groups(layer) if group[0].rpartition(".")[2] == leaf]
        d_in = executor.linears(layer)[leader].d_in
        most = max(1, EXPERT_BYTES // (2 * d_in**2 * executor.dtype.itemsize))
        start = names.index(leader)
        names = names[start : start + most]
        ordered = OrderedSum(executor.context.processes, executor.n_batches)
        window = executor.window
        add_ = partial(add_moments_, d_in=d_in, window=window, capped=capped, gated=gated)
        with self._loaded(layer):
            for rows in executor.batches:
                dense = read_inputs(executor, layer, self._dense[rows], names)
                with self._using_replaced():
                    now = read_inputs(
                        executor, layer, self._compressed[rows], names, dense.selected
                    )
                drop_shared_pages(self._dense[rows])
                drop_shared_pages(self._compressed[rows])
                sums = RunningSums()
                for name in names:
                    add_(sums, name, dense, now)
                ordered.add_(sums)
        found, measured = ordered.total(), {}
        for name in names:
            H, cross, n_tokens = (found[f"{name}.{key}"] for key in ("H", "cross", "n"))
            for total in (H, cross):
                check_finite(total, f"the inputs of {name} after the compressed layers", REMEDY)
            measured[name, capped, gated] = PrefixMoments(H, cross, {}, int(n_tokens))
        return measured

    def _input(
        self, layer: int, states: Tensor, rows: slice, leader: str, zeroed: Sequence[str]
    ) -> tuple[Tensor, Tensor | None]:
        """Return the input [n_tokens, d_in] of the linear `leader`, and the output of the layer.

        Both without padding, for a batch of the states. The outputs of the linears `zeroed` are
        replaced by zeros. Without any, the layer is left after the input has been seen, and its
        output is None.
        """
        seen: list[Tensor] = []

        def see(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = self._executor.without_padding(args[0], rows)
            seen.append(x.reshape(-1, x.shape[-1]))
            if not zeroed:
                raise ForwardEnded

        stream = None
        with (
            self._linear(leader).register_forward_pre_hook(see),
            suppress(ForwardEnded),
            silenced(map(self._linear, zeroed)),
        ):
            stream = self._executor.stream(layer, states[rows], rows=rows)
            stream = self._executor.without_padding(stream, rows)
        assert seen, f"{leader} was called when the layer was recorded, but not now"
        return seen[0], stream

    def _residual_writers(self, layer: int, module: nn.Module) -> list[str]:
        """Return the linears of a layer that write to the residual stream, in order of use.

        The experts of a layer count as one: only their sum is as long as the stream.
        """
        names = [name for group in self.groups(layer) for name in group]
        names = list(dict.fromkeys(self._experts_of(name) or name for name in names))
        prefix = f"{self._executor.architecture.layer_names[layer]}."
        kind = (type(module), *(name.removeprefix(prefix) for name in names))
        if kind not in self._writers:
            found, processes = list[str](), self._executor.context.processes
            if processes.first:
                rows = self._executor.batches[0]
                found = find_writers(
                    lambda: self._executor.stream(layer, self._dense[rows], rows=rows),
                    [(name, self._linear(name)) for name in names],
                )
            found = processes.agree(found)
            self._writers[kind] = [name.removeprefix(prefix) for name in found]
        return [prefix + name for name in self._writers[kind]]

    def _experts_of(self, linear: str) -> str | None:
        return experts_of(self._executor.architecture.model, linear)

    def _linear(self, name: str) -> nn.Module:
        module: nn.Module = self._executor.architecture.model.get_submodule(name)
        return module

    def advance(self, layer: int) -> None:
        """Apply a layer to the states of both models, and discard its replaced weights."""
        with self._loaded(layer):
            self._executor.advance_(layer, self._dense)
            with self._using_replaced():
                self._executor.advance_(layer, self._compressed)
        self._replaced.clear()

    @contextmanager
    def _loaded(self, layer: int) -> Iterator[nn.Module]:
        with tensor_cores(self._device), self._executor.layer(layer) as module:
            yield module

    @contextmanager
    def _using_replaced(self) -> Iterator[None]:
        """Compute with the replaced weights inside the context."""
        owners = {key: self._linear(key[0]) for key in self._replaced}
        dense = {key: owner._parameters[key[1]] for key, owner in owners.items()}
        try:
            for key, owner in owners.items():
                owner._parameters[key[1]] = self._replaced[key]
            yield
        finally:
            for key, owner in owners.items():
                owner._parameters[key[1]] = dense[key]


@torch.no_grad()
def find_writers(
    forward: Callable[[], Tensor], linears: Sequence[tuple[str, nn.Module]]
) -> list[str]:
    """Return which of a layer's linears add their output to the hidden states unchanged.

    `linears` are in order of use; `forward` applies the layer to some tokens.
    """
    found: dict[str, nn.Module] = {}
    # From last to first: without the outputs of later writers, an output reaches the end of the
    # layer only through the residual connection.
    for name, linear in reversed(linears):
        outputs: list[Tensor] = []

        def see(_: nn.Module, __: object, y: Tensor, seen: list[Tensor] = outputs) -> None:
            seen.append(y)

        with linear.register_forward_hook(see, prepend=True), silenced(found.values()):
            whole = forward()
        if len(outputs) != 1 or outputs[0].numel() != whole.numel() or not bool(outputs[0].any()):
            continue
        y = outputs[0].reshape(whole.shape)  # some flatten all tokens into one dimension
        with silenced([linear, *found.values()]):
            unexplained = whole - forward() - y
        if float(unexplained.norm()) <= TOLERANCE * float(y.norm()):
            found[name] = linear
    return [name for name, _ in linears if name in found]


def silenced(linears: Iterable[nn.Module]) -> ExitStack:
    """Let linears return zeros within the context; the model's own hooks still run after."""
    hooks = ExitStack()
    for linear in linears:
        hook = linear.register_forward_hook(lambda _, __, y: torch.zeros_like(y), prepend=True)
        hooks.enter_context(hook)
    return hooks
