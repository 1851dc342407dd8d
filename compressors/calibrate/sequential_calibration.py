"""Sequential calibration: inputs of a layer after the layers before it have been compressed."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from typing import NamedTuple

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
from lrc.compressors.calibrate.residual_writers import (
    Writers,
    kept_output,
    silenced,
    writers_of,
)
from lrc.compressors.calibrate.statistic_table import RunningSums
from lrc.compressors.distributed.processes import OrderedSum
from lrc.compressors.io.device_copies import copy_, on_device
from lrc.compressors.io.freed_memory import drop_shared_pages
from lrc.compressors.solvers.error_compensation import PrefixMoments
from lrc.compressors.solvers.linalg import tensor_cores
from lrc.compressors.solvers.moments import token_weights

REMEDY = "raise 'keep', or leave out 'compensate'"
EXPERT_BYTES = 2**29
"""Moments of experts that are summed in one pass over the calibration windows."""


class Seen(NamedTuple):
    """What is seen of a decoder layer in one batch, see `SequentialCalibration._input`."""

    x: Tensor
    """Input [n_tokens, d_in] of a linear."""
    stream: Tensor | None
    """Residual stream [n_tokens, d_model] to which the linear adds its output, if it does."""
    output: Tensor | None
    """Output of the layer [n, length, d_model]."""


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
        self._writers: dict[tuple[object, ...], Writers] = {}  # by kind of layer
        self._dense_done = -1
        """Index of the last layer that was applied to the states of the dense model."""
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
        last: bool = False,
    ) -> PrefixMoments:
        """Return second moments of the input that the linears `names`, one of `groups`, share.

        With `deficit`, the moments of the difference between the residual streams are included if
        the first linear writes to the stream. With `capped`, tokens are weighted by `token_weights`
        of the inputs in the compressed model, and with `gated` those of an expert by the router.
        With `last`, nothing else of this layer will be measured, so that the states of the dense
        model may advance meanwhile. Raises a `ModelError` that names the linear if the inputs are
        not finite.
        """
        executor, leader = self._executor, names[0]
        if self._experts_of(leader):
            key = leader, capped, gated
            if key not in self._of_experts:
                self._of_experts = self._measured_experts(layer, leader, capped, gated)
            return self._of_experts.pop(key)
        ordered = OrderedSum(executor.context.processes, executor.n_batches)
        with self._loaded(layer, again=True) as module:
            writers = self._residual_writers(layer, module) if deficit else Writers([])
            look = partial(self._input, layer, leader=leader, writers=writers)
            finish = (
                last
                and writers.last_is_added
                and writers.names[-1] == leader
                and executor.columns(layer) == slice(None)
            )
            for rows in executor.batches:
                sums = RunningSums()
                x, stream, output = look(self._dense, rows, output=finish)
                with self._using_replaced():
                    x_hat, stream_hat, _ = look(self._compressed, rows)
                if capped:
                    weights = token_weights(x_hat, executor.window or len(x_hat)).sqrt()
                    x, x_hat = weights * x, weights * x_hat
                sums.add_square("H", x_hat)
                sums.add_product("cross", x, x_hat)
                if stream is not None and stream_hat is not None:
                    missing = stream - stream_hat
                    sums.add_product("deficit", weights * missing if capped else missing, x_hat)
                ordered.add_(sums)
                if output is not None:  # inputs can be views of the states
                    copy_(self._dense[rows], output)
                drop_shared_pages(self._dense[rows])
                drop_shared_pages(self._compressed[rows])
            if finish:
                self._dense_done = layer
        found = ordered.total()
        for total in found.values():
            check_finite(
                total,
                f"the inputs of {leader} after the compressed layers",
                REMEDY,
            )
        deficits = {leader: found["deficit"]} if "deficit" in found else {}
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
        with self._loaded(layer, again=True):
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
        self,
        layer: int,
        states: Tensor,
        rows: slice,
        *,
        leader: str,
        writers: Writers,
        output: bool = False,
    ) -> Seen:
        """Apply a layer to a batch of the states, and return what the linear `leader` receives.

        If the leader is one of the `writers`, the residual stream is returned too, and with
        `output`, which is only for the last of them, the output of the layer. The layer stops at
        the leader where the rest of it is not needed. Input and residual stream have no padding.
        """
        executor, seen, added = self._executor, list[Tensor](), list[Tensor]()
        # Without the output of the leader and of later writers, the output of the layer is the
        # residual stream to which the leader adds its output.
        zeroed = writers.from_on(leader)
        first = len(zeroed) == len(writers.names)
        at_input = first and writers.add_to_input and not output
        end = at_input or not zeroed

        def see(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = executor.without_padding(args[0], rows)
            seen.append(x.reshape(-1, x.shape[-1]))
            if end:
                raise ForwardEnded

        stream, linear = None, self._linear(leader)
        with (
            linear.register_forward_pre_hook(see),
            suppress(ForwardEnded),
            silenced(map(self._linear, zeroed)),
            kept_output(linear, added),
        ):
            stream = executor.stream(layer, states[rows], rows=rows)
        assert seen, f"{leader} was called when the layer was recorded, but not now"
        if at_input:
            stream = self._own(layer, states, rows)
        if stream is None:
            return Seen(seen[0], None, None)
        whole = stream + added[0].reshape(stream.shape) if output else None
        return Seen(seen[0], executor.without_padding(stream, rows).flatten(0, -2), whole)

    def _residual_writers(self, layer: int, module: nn.Module) -> Writers:
        """Return the linears of a layer that write to the residual stream.

        The experts of a layer count as one: only their sum is as long as the stream.
        """
        names = [name for group in self.groups(layer) for name in group]
        names = list(dict.fromkeys(self._experts_of(name) or name for name in names))
        prefix = f"{self._executor.architecture.layer_names[layer]}."
        kind = (type(module), *(name.removeprefix(prefix) for name in names))
        if kind not in self._writers:
            found, processes = Writers([]), self._executor.context.processes
            if processes.first:
                linears = {name: self._linear(name) for name in names}
                rows = self._executor.batches[0]
                found = writers_of(
                    lambda: self._executor.stream(layer, self._dense[rows], rows=rows),
                    linears,
                    self._own(layer, self._dense, rows),
                )
            found = processes.agree(found)
            short = [name.removeprefix(prefix) for name in found.names]
            self._writers[kind] = replace(found, names=short)
        known = self._writers[kind]
        return replace(known, names=[prefix + name for name in known.names])

    def _own(self, layer: int, states: Tensor, rows: slice) -> Tensor:
        """Return a batch of the states that a layer receives, on the device."""
        own = states[rows, self._executor.columns(layer)]
        return on_device(own, self._device, self._executor.dtype)

    def _experts_of(self, linear: str) -> str | None:
        return experts_of(self._executor.architecture.model, linear)

    def _linear(self, name: str) -> nn.Module:
        module: nn.Module = self._executor.architecture.model.get_submodule(name)
        return module

    def advance(self, layer: int) -> None:
        """Apply a layer to the states of both models, and discard its replaced weights."""
        with self._loaded(layer):
            if self._dense_done < layer:
                self._executor.advance_(layer, self._dense)
            with self._using_replaced():
                self._executor.advance_(layer, self._compressed)
        self._replaced.clear()

    @contextmanager
    def _loaded(self, layer: int, *, again: bool = False) -> Iterator[nn.Module]:
        """Load a layer; for `again`, see `ResidentModules.layer`."""
        with tensor_cores(self._device), self._executor.layer(layer, again=again) as module:
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
