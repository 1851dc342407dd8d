"""Second moments of the residual stream as it enters the norms, on the calibration text."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn

from lrc.compressors.calibrate.activation_cache import LIVE
from lrc.compressors.calibrate.layer_executor import apply
from lrc.compressors.calibrate.statistic_table import RunningSums
from lrc.compressors.models.architecture import Architecture
from lrc.compressors.slicing.families import Family, Norm
from lrc.compressors.slicing.layer_sweep import Ascent
from lrc.compressors.slicing.slice_method import Work
from lrc.compressors.solvers.linalg import tensor_cores
from lrc.configs.errors import ModelError


@torch.no_grad()
def stream_moment(work: Work, family: Family) -> Tensor:
    """Return the second moment [D, D] of the dense model's stream, as it enters the norms.

    Every token counts alike at every norm: it is divided by its root mean square. In float64.

    Raises
    ------
    ModelError
        If it is not finite; names the layer.
    """
    architecture, tokens = work.architecture, work.windows()
    n_layers = len(architecture.layers)
    norms = family.norms(architecture.model)
    fast = tensor_cores() if work.device.startswith("cuda") else nullcontext()
    sums = RunningSums()

    def see(x: Tensor) -> None:
        x = centred(x.reshape(-1, x.shape[-1]).float(), family)  # [n_tokens, D]
        scale = x.square().mean(-1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny).rsqrt()
        sums.add_square("stream", x * scale)

    with fast:
        up = Ascent.begin(work, tokens)
        states, width = up.states, up.states.shape[-1]
        total = torch.zeros(width, width, dtype=torch.float64)
        for index, call in enumerate(up.calls):
            name = architecture.layer_names[index]
            inside = [norm for norm in norms if norm.name.startswith(f"{name}.")]
            with up.stream.layer(index) as layer, _watched(architecture, inside, see):
                for rows in up.rows():
                    states[rows] = apply(layer, call, states[rows].to(work.device))
            if index == n_layers - 1:  # the norm before the head, which no layer holds
                for rows in up.rows():
                    see(states[rows].to(work.device))
            # A layer's sum is one of float32; that of all of them need not be.
            total += finite(sums.pop("stream").double().cpu(), name)
            work.on_step("slice", index + 1, n_layers)
    del states, up
    work.journal.forget(f"states{LIVE}")
    return total


def centred(x: Tensor, family: Family) -> Tensor:
    """Take the mean off where the norms of a family do."""
    return x - x.mean(-1, keepdim=True) if family.layer_norm else x


def finite(moment: Tensor, layer: str) -> Tensor:
    """Return a moment of the stream in a layer.

    Raises
    ------
    ModelError
        If it is not finite.
    """
    if not bool(torch.isfinite(moment).all()):
        raise ModelError(
            f"model: the residual stream is not finite in {layer} on the calibration text; its "
            "weights are damaged or overflow: check the source model"
        )
    return moment


@contextmanager
def _watched(
    architecture: Architecture, norms: list[Norm], see: Callable[[Tensor], None]
) -> Iterator[None]:
    """Show what some norms are given."""

    def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        see(args[0])

    modules = [architecture.model.get_submodule(norm.name) for norm in norms]
    hooks = [module.register_forward_pre_hook(hook) for module in modules]
    try:
        yield
    finally:
        for one in hooks:
            one.remove()
