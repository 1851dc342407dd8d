"""Second moments of the residual stream as it enters the norms, on the calibration text."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn

from lrc.compressors.calibrate.states import LIVE
from lrc.compressors.calibrate.stream import apply
from lrc.compressors.calibrate.sums import Sums
from lrc.compressors.linalg import tensor_cores
from lrc.compressors.models.architecture import Architecture
from lrc.compressors.slicing.ascent import Ascent
from lrc.compressors.slicing.families import Family, Norm
from lrc.compressors.slicing.method import Work
from lrc.configs.errors import ModelError


@torch.no_grad()
def stream_moments(work: Work, family: Family) -> Iterator[tuple[str, Tensor]]:
    """Yield a norm's name and the second moment [D, D] of what enters it, in their order.

    Every token counts alike: it is divided by its root mean square, the mean taken off first where
    the norm does so. The norm before the head comes last. In float64.

    Raises
    ------
    ModelError
        If one is not finite; names the layer.
    """
    architecture, tokens = work.architecture, work.windows()
    n_layers = len(architecture.layers)
    norms = family.norms(architecture.model)
    fast = tensor_cores() if work.device.startswith("cuda") else nullcontext()
    sums = Sums()

    def see(name: str, x: Tensor) -> None:
        x = x.reshape(-1, x.shape[-1]).float()  # [n_tokens, D]
        x = x - x.mean(-1, keepdim=True) if family.layer_norm else x
        scale = x.square().mean(-1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny).rsqrt()
        sums.add_square(name, x * scale)

    with fast:
        up = Ascent.begin(work, tokens)
        states = up.states
        for index, call in enumerate(up.calls):
            name = architecture.layer_names[index]
            due = [norm for norm in norms if norm.name.startswith(f"{name}.")]
            with up.stream.layer(index) as layer, _watched(architecture, due, see):
                for rows in up.rows():
                    states[rows] = apply(layer, call, states[rows].to(work.device))
            if index == n_layers - 1:  # the norm before the head, which no layer holds
                due.append(norms[-1])
                for rows in up.rows():
                    see(norms[-1].name, states[rows].to(work.device))
            for norm in due:
                moment = sums.pop(norm.name).double().cpu()
                if not bool(torch.isfinite(moment).all()):
                    raise ModelError(
                        f"model: the residual stream is not finite in {name} on the calibration "
                        "text; its weights are damaged or overflow: check the source model"
                    )
                yield norm.name, moment
            work.on_step("slice", index + 1, n_layers)
    del states, up
    work.journal.forget(f"states{LIVE}")


@contextmanager
def _watched(
    architecture: Architecture, norms: list[Norm], see: Callable[[str, Tensor], None]
) -> Iterator[None]:
    """Show what some norms are given."""

    def hook_for(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _, args: see(name, args[0])

    hooks = [
        architecture.model.get_submodule(norm.name).register_forward_pre_hook(hook_for(norm.name))
        for norm in norms
    ]
    try:
        yield
    finally:
        for one in hooks:
            one.remove()
