"""The way up: one decoder layer applied to every window, its linears' inputs summed up."""

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from lrc.compressors.calibrate.layer_stream import LayerCall, LayerStream, apply, watch_outputs
from lrc.compressors.calibrate.running_sums import Sums
from lrc.compressors.models.architecture import Architecture, Linear
from lrc.configs.errors import ModelError

Needs = Mapping[str, Collection[str]]
"""Name of a linear -> the fields of `Statistics` that its method asks for; ``whole_inputs`` beside
``inputs``, or ``whole_gradients`` beside ``gradients``, where an image through the weight will not
do."""


class InputSums:
    """Running sums over the tokens that the linears of one layer are given.

    Linears that are given the same tensor share them. The second moment of an input that is wider
    than all outputs made of it is taken through the weights, as that of the outputs.
    """

    def __init__(self, call: LayerCall, linears: Mapping[str, Linear], needs: Needs) -> None:
        self.leaders: dict[str, str] = {}
        """Linear -> the one whose sums it shares."""
        self.sums = Sums()
        self._whole: set[str] = set()
        self._images: set[str] = set()
        self._means: set[str] = set()
        self._magnitudes: set[str] = set()
        self.watched: list[str] = []
        for group in call.groups:
            wanted = [name for name in group if needs.get(name)]
            if not wanted:
                continue
            leader = group[0]
            self.leaders |= dict.fromkeys(wanted, leader)
            asked = {need for name in wanted for need in needs[name]}
            moments = [name for name in wanted if "inputs" in needs[name]]
            if moments:
                width = linears[leader].d_in
                through = sum(linears[name].d_out ** 2 for name in moments) < width**2
                tall = any(linears[name].d_out > width for name in moments)
                if through and not tall and "whole_inputs" not in asked:
                    self._images.update(moments)
                else:
                    self._whole.add(leader)
            if "input_mean" in asked:
                self._means.add(leader)
            if "input_magnitude" in asked:
                self._magnitudes.add(leader)
            self.watched += dict.fromkeys([leader, *moments])

    def see(self, name: str, x: Tensor, y: Tensor, bias: Tensor | None) -> None:
        """Add the tokens ``x`` [..., d_in] that a linear has made ``y`` of."""
        leader = self.leaders.get(name, name)
        x = x.reshape(-1, x.shape[-1])  # [n_tokens, d_in]
        if name in self._whole:
            self.sums.add_square(f"{name}.inputs", x)
        if name in self._images:
            self.sums.add_square(f"{name}.image", y if bias is None else y - bias)
        if name == leader and (name in self._whole or self._images & self._led_by(name)):
            self.sums.add(f"{name}.diagonal", x.square().sum(dim=0))
        if name in self._means:
            self.sums.add(f"{name}.input_mean", x.sum(dim=0))
        if name in self._magnitudes:
            self.sums.add(f"{name}.input_magnitude", x.abs().sum(dim=0))

    def _led_by(self, leader: str) -> set[str]:
        return {name for name, other in self.leaders.items() if other == leader}


@torch.no_grad()
def apply_layer(
    stream: LayerStream,
    architecture: Architecture,
    index: int,
    call: LayerCall,
    hidden: Tensor,
    batch: int,
    needs: Needs,
) -> InputSums:
    """Replace the hidden states [n_windows, length, d_model] by the layer's output, in place.

    Returns
    -------
    InputSums
        Of the linears that `needs` names.

    Raises
    ------
    ModelError
        If inputs or hidden states are not finite; names the layer.
    """
    linears = {lin.name: lin for lin in architecture.linears if lin.layer == index}
    sums = InputSums(call, linears, needs)
    layer_name = architecture.layer_names[index]

    def see(name: str, x: Tensor, y: Tensor) -> None:
        sums.see(name, x, y, architecture.model.get_submodule(name).bias)

    with stream.layer(index) as layer, watch_outputs(layer, layer_name, sums.watched, see):
        for start in range(0, len(hidden), batch):
            rows = slice(start, start + batch)
            hidden[rows] = apply(layer, call, hidden[rows].to(stream.device))
    for key, total in sums.sums.items():
        if not bool(torch.isfinite(total).all()):
            raise ModelError(
                f"model: the inputs of {key.rpartition('.')[0]} are not finite on the calibration "
                "text; the weights before it overflow: check the source model"
            )
    if not bool(torch.isfinite(hidden).all()):
        raise ModelError(
            f"model: the output of {layer_name} is not finite on the calibration text; "
            "its weights are damaged or overflow: check the source model"
        )
    return sums
