"""The way down: gradients of the token losses, one decoder layer at a time.

A layer is computed again from its input on the tape, this time with a graph, and sends the gradient
at its output to its input. On the way every targeted linear's output gradients are summed up.
"""

from collections.abc import Mapping
from contextlib import nullcontext

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from lrc.compressors.calibrate.inputs import Needs
from lrc.compressors.calibrate.labels import Labels, logit_gradient
from lrc.compressors.calibrate.layer_stream import LayerCall, LayerStream, apply, watch_outputs
from lrc.compressors.calibrate.running_sums import Sums
from lrc.compressors.calibrate.states import Chain, Tape
from lrc.compressors.models.architecture import Architecture
from lrc.configs.errors import ModelError

GRADIENT_NEEDS = frozenset({"gradients", "row_fisher"})
# Logits of this many tokens at once: with a vocabulary of 128k a GiB on a GPU is 2k tokens.
HEAD_TOKENS = {"cpu": 1024, "cuda": 4096}


class GradientSums:
    """Running sums over the output gradients of the linears of one layer.

    The second moment at an output that is wider than its input is taken through the weight, as that
    of the gradients at the input.
    """

    def __init__(self, needs: Needs) -> None:
        self._needs = needs
        self.sums = Sums()
        self.watched = sorted(name for name, asked in needs.items() if GRADIENT_NEEDS & set(asked))

    def see(self, name: str, x: Tensor, g: Tensor, W: Tensor) -> None:
        """Add the gradients ``g`` [n, length, d_out] at the output for ``x`` [n, length, d_in]."""
        asked = self._needs[name]
        tokens = g.reshape(-1, g.shape[-1])  # [n_tokens, d_out]
        if "gradients" in asked:
            tall = W.shape[0] > W.shape[1] and "whole_gradients" not in asked
            key, seen = (f"{name}.image", tokens @ W) if tall else (f"{name}.gradients", tokens)
            self.sums.add_square(key, seen)
            self.sums.add(f"{name}.diagonal", tokens.square().sum(dim=0))
        if "row_fisher" in asked:
            for one, of in zip(g, x, strict=True):  # a window is a sample
                self.sums.add(f"{name}.row_fisher", (one.T @ of).square().sum(dim=1))


def start_at_logits(
    stream: LayerStream,
    call: LayerCall,
    hidden: Tensor,
    tokens: Tensor,
    gradients: Tensor,
    *,
    labels: Labels,
    seed: int,
) -> None:
    """Fill `gradients` with those of the summed token losses at the last layer's output.

    Parameters
    ----------
    call : LayerCall
        Of the last layer.
    hidden, gradients : Tensor, shape [n_windows, length, d_model]
        Output of the last layer; what is filled.
    tokens : Tensor, shape [n_windows, length]
    """
    kind = "cuda" if stream.device.startswith("cuda") else "cpu"
    batch = max(1, HEAD_TOKENS[kind] // tokens.shape[1])
    generator = torch.Generator(stream.device)
    with stream.around_layers(head=True):
        for start in range(0, len(tokens), batch):
            rows = slice(start, start + batch)
            generator.manual_seed(seed + start)  # a batch is the same whatever came before it
            leaf = hidden[rows].to(stream.device).requires_grad_()
            with torch.enable_grad():
                logits = stream.logits(leaf, tokens[rows], call)
            at_logits = logit_gradient(logits.detach(), tokens[rows], labels, generator)
            (gradients[rows],) = torch.autograd.grad(logits, leaf, at_logits.to(logits.dtype))


def descend_layer(
    stream: LayerStream,
    architecture: Architecture,
    index: int,
    call: LayerCall,
    tape: Tape,
    gradients: Chain,
    batch: int,
    needs: Needs,
) -> Mapping[str, Tensor]:
    """Replace the gradients at a layer's output by those at its input, in place.

    Returns
    -------
    mapping
        Sums over the gradients of the linears that `needs` names.

    Raises
    ------
    ModelError
        If gradients are not finite; names the layer.
    """
    sums = GradientSums(needs)
    layer_name = architecture.layer_names[index]

    def see(name: str, x: Tensor, y: Tensor) -> None:
        W = architecture.model.get_submodule(name).weight
        x = x.detach()

        def add(g: Tensor) -> None:
            sums.see(name, x, g.detach(), W)

        y.register_hook(add)

    # The other kernels of a GPU add up their backward pass in whatever order threads arrive.
    on_gpu = stream.device.startswith("cuda")
    exact = sdpa_kernel(SDPBackend.MATH) if on_gpu else nullcontext()
    with stream.layer(index) as layer, watch_outputs(layer, layer_name, sums.watched, see), exact:
        for start in range(0, len(gradients.tensor), batch):
            rows = slice(start, start + batch)
            leaf = tape.read(index, rows, stream.device).requires_grad_()
            with torch.enable_grad():
                out = apply(layer, call, leaf)
            (passed,) = torch.autograd.grad(out, leaf, gradients.tensor[rows].to(stream.device))
            gradients.tensor[rows] = passed
    finite = all(bool(torch.isfinite(total).all()) for total in sums.sums.values())
    if not finite or not bool(torch.isfinite(gradients.tensor).all()):
        raise ModelError(
            f"model: the gradients in {layer_name} are not finite on the calibration text; its "
            "weights are damaged or overflow: check the source model, or take a method without "
            "gradients, such as svd-llm"
        )
    return sums.sums
