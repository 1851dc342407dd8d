"""The calibration windows as the compressed model sees them, beside the dense model's view."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress

import torch
from torch import Tensor, nn

from lrc.compressors.calibrate.layer_stream import LayerStream, apply
from lrc.compressors.calibrate.residual import find_writers, silenced
from lrc.compressors.calibrate.running_sums import Sums
from lrc.compressors.calibrate.states import Chain
from lrc.compressors.calibrate.statistics import batch_size
from lrc.compressors.io.journal import Journal
from lrc.compressors.models.architecture import Architecture
from lrc.compressors.models.weights import WeightReader
from lrc.compressors.solvers.error_compensation import PrefixMoments
from lrc.compressors.solvers.linalg import tensor_cores
from lrc.configs.errors import ModelError


class _Reached(Exception):
    """Ends a layer's forward at the linear whose input is wanted."""


class CompressedPrefix:
    """Inputs of linears behind layers that are compressed already, and of the same ones dense.

    Two chains of hidden states climb through the model together: one through the dense weights,
    one through those that `replace` has set. Within a layer, `measure` may be asked between
    replacements, in the order in which the linears are called.

    Parameters
    ----------
    tokens : Tensor, shape [n_windows, length]
    memory_limit_gib : float
        For both chains together; what is larger goes to disk.
    """

    def __init__(
        self,
        architecture: Architecture,
        reader: WeightReader,
        tokens: Tensor,
        journal: Journal,
        *,
        device: str,
        memory_limit_gib: float,
    ) -> None:
        self._architecture, self._device = architecture, device
        self._stream = LayerStream(architecture, reader, device=device, dtype=torch.float32)
        self._batch = batch_size(len(tokens), tokens.shape[1], device)
        self._replaced: dict[tuple[str, str], nn.Parameter] = {}
        self._writers: dict[tuple[object, ...], list[str]] = {}  # by kind of layer
        with self._stream.around_layers():
            self._calls = self._stream.trace(tokens[: self._batch])
            first = self._stream.embed(tokens[: self._batch])
            shape = (*tokens.shape, first.shape[-1])
            self._dense, self._prefix = (
                Chain(journal, name, shape, memory_limit_gib / 2, device).tensor
                for name in ("dense", "prefix")
            )
            for start in range(0, len(tokens), self._batch):
                rows = slice(start, start + self._batch)
                self._dense[rows] = self._stream.embed(tokens[rows])
            self._prefix.copy_(self._dense)

    def groups(self, layer: int) -> list[list[str]]:
        """Return the linears of a decoder layer that share an input, in the order of their use."""
        return self._calls[layer].groups

    def replace(self, name: str, W_hat: Tensor, bias: Tensor | None = None) -> None:
        """Let the prefix compute with ``W_hat`` [d_out, d_in] in place of a linear's weight.

        `bias` [d_out], if given, takes the place of its bias.
        """
        for leaf, tensor in (("weight", W_hat), ("bias", bias)):
            if tensor is not None:
                tensor = tensor.to(self._device, torch.float32)
                self._replaced[name, leaf] = nn.Parameter(tensor, requires_grad=False)

    @torch.no_grad()
    def measure(self, layer: int, names: Sequence[str], *, deficit: bool) -> PrefixMoments:
        """Return sums over the tokens of the input that some linears of a layer share.

        Parameters
        ----------
        names : sequence of str
            One of `groups`.
        deficit : bool
            Whether to measure the residual stream too.

        Raises
        ------
        ModelError
            If the inputs are not finite; names the linear.
        """
        leader, sums = names[0], Sums()
        with self._resident(layer) as module:
            writers = self._writers_of(layer, module) if deficit else []
            later = writers[writers.index(leader) :] if leader in writers else []
            for start in range(0, len(self._dense), self._batch):
                rows = slice(start, start + self._batch)
                x, stream = self._reach(layer, module, self._dense[rows], leader, later)
                with self._compressed():
                    behind, here = self._reach(layer, module, self._prefix[rows], leader, later)
                sums.add_square("H", behind)
                sums.add_product("cross", x, behind)
                if stream is not None and here is not None:
                    sums.add_product("deficit", (stream - here).flatten(0, -2), behind)
        if not all(bool(torch.isfinite(total).all()) for total in sums.values()):
            raise ModelError(
                f"model: the inputs of {leader} are not finite behind the compressed layers; "
                "raise 'keep', or leave out 'compensate'"
            )
        lacking = {leader: sums["deficit"]} if later else {}
        return PrefixMoments(sums["H"], sums["cross"], lacking)

    def _reach(
        self, layer: int, module: nn.Module, hidden: Tensor, leader: str, later: Sequence[str]
    ) -> tuple[Tensor, Tensor | None]:
        """Return a linear's input [n_tokens, d_in], and the stream without the `later` writers."""
        seen: list[Tensor] = []

        def see(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            seen.append(args[0].reshape(-1, args[0].shape[-1]))
            if not later:
                raise _Reached

        hook = self._linear(leader).register_forward_pre_hook(see)
        stream = None
        try:
            with suppress(_Reached), silenced(map(self._linear, later)):
                stream = apply(module, self._calls[layer], hidden.to(self._device))
        finally:
            hook.remove()
        assert seen, f"{leader} was called in the trace and is no more"
        return seen[0], stream

    def _writers_of(self, layer: int, module: nn.Module) -> list[str]:
        """Return the linears of a layer that write to the residual stream, in the order of use."""
        names = [name for group in self.groups(layer) for name in group]
        prefix = f"{self._architecture.layer_names[layer]}."
        kind = (type(module), *(name.removeprefix(prefix) for name in names))
        if kind not in self._writers:
            hidden = self._dense[: self._batch].to(self._device)
            found = find_writers(
                lambda: apply(module, self._calls[layer], hidden),
                [(name, self._linear(name)) for name in names],
            )
            self._writers[kind] = [name.removeprefix(prefix) for name in found]
        return [prefix + name for name in self._writers[kind]]

    def _linear(self, name: str) -> nn.Module:
        module: nn.Module = self._architecture.model.get_submodule(name)
        return module

    @torch.no_grad()
    def advance(self, layer: int) -> None:
        """Send both chains through a layer, and forget what was replaced in it."""
        call = self._calls[layer]
        with self._resident(layer) as module:
            for start in range(0, len(self._dense), self._batch):
                rows = slice(start, start + self._batch)
                self._dense[rows] = apply(module, call, self._dense[rows].to(self._device))
                with self._compressed():
                    self._prefix[rows] = apply(module, call, self._prefix[rows].to(self._device))
        self._replaced.clear()

    @contextmanager
    def _resident(self, layer: int) -> Iterator[nn.Module]:
        fast = tensor_cores() if self._device.startswith("cuda") else nullcontext()
        with fast, self._stream.layer(layer) as module:
            yield module

    @contextmanager
    def _compressed(self) -> Iterator[None]:
        """Compute with the replaced weights for a while."""
        owners = {key: self._architecture.model.get_submodule(key[0]) for key in self._replaced}
        dense = {key: owner._parameters[key[1]] for key, owner in owners.items()}
        try:
            for key, owner in owners.items():
                owner._parameters[key[1]] = self._replaced[key]
            yield
        finally:
            for key, owner in owners.items():
                owner._parameters[key[1]] = dense[key]
