"""Forward and backward calibration pass through one decoder layer, for all windows.

The forward pass replaces hidden states by the layer's output and sums over the inputs of its
linears. The backward pass recomputes the layer from its checkpointed input, with autograd,
propagates the gradient at its output to its input, and sums over the gradients at the outputs of
its linears.
"""

from contextlib import nullcontext
from typing import Literal

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from lrc.compressors.calibrate.activation_cache import ActivationCheckpoints
from lrc.compressors.calibrate.layer_executor import (
    LayerCall,
    LayerExecutor,
    apply,
    batches,
    watch_outputs,
)
from lrc.compressors.calibrate.statistic_table import LinearBatch, LinearStatistics, Required
from lrc.configs.errors import ModelError

Labels = Literal["model", "sampled", "real"]
# Logits of this many tokens at once: with a vocabulary of 128k a GiB on a GPU is 2k tokens.
HEAD_TOKENS = {"cpu": 1024, "cuda": 4096}


@torch.no_grad()
def forward_layer(
    executor: LayerExecutor,
    index: int,
    call: LayerCall,
    hidden: Tensor,
    batch: int,
    required: Required,
) -> LinearStatistics:
    """Replace the hidden states [n_windows, length, d_model] by the layer's output, in place.

    Returns the sums for the linears in `required`. Inputs or hidden states that are not finite
    raise `ModelError`.
    """
    linears = {lin.name: lin for lin in executor.architecture.linears if lin.layer == index}
    statistics = LinearStatistics.forward(call.groups, linears, required)
    layer_name = executor.architecture.layer_names[index]

    def see(name: str, x: Tensor, y: Tensor) -> None:
        linear = executor.architecture.model.get_submodule(name)
        y = y if linear.bias is None else y - linear.bias
        statistics.add(name, LinearBatch(x, y, linear.weight))

    with (
        executor.layer(index) as layer,
        watch_outputs(layer, layer_name, statistics.watched, see),
    ):
        for rows in batches(len(hidden), batch):
            hidden[rows] = apply(layer, call, hidden[rows].to(executor.device))
    for name in statistics.not_finite:
        raise ModelError(
            f"model: the inputs of {name} are not finite on the calibration text; the weights "
            "before it overflow: check the source model"
        )
    if not bool(torch.isfinite(hidden).all()):
        raise ModelError(
            f"model: the output of {layer_name} is not finite on the calibration text; "
            "its weights are damaged or overflow: check the source model"
        )
    return statistics


def logit_gradient(
    logits: Tensor, tokens: Tensor, labels: Labels, generator: torch.Generator
) -> Tensor:
    """Return the gradient of every token's loss with respect to its logits.

    The curvature of a language model's loss is the Fisher matrix of its own predictions, with the
    second moment ``diag(p) - p p^T`` per token at the logits.

    Parameters
    ----------
    logits : Tensor, shape [n, length, vocabulary]
    tokens : Tensor, shape [n, length]
        Input tokens; the label of a position is the token after it.
    labels : {"model", "sampled", "real"}
        ``model``: ``sqrt(p) * z - p (sqrt(p) . z)`` with Gaussian z, a random combination of all
        labels with second moment ``diag(p) - p p^T``. ``sampled``: ``p - onehot(y)`` with y drawn
        from p, of the same second moment but with the heavier tails of single labels. ``real``:
        ``p - onehot(y)`` with y the token that follows, the empirical Fisher; the last position,
        whose label lies outside the window, gets 0.
    generator : torch.Generator
        On the device of `logits`.

    Returns
    -------
    Tensor, shape [n, length, vocabulary]
    """
    p = logits.float().softmax(dim=-1)
    if labels == "model":
        z = torch.randn(p.shape, generator=generator, device=p.device)
        drawn = p.sqrt() * z
        return drawn - p * drawn.sum(dim=-1, keepdim=True)
    if labels == "sampled":
        y = torch.multinomial(p.flatten(0, 1), 1, generator=generator).view(*p.shape[:2], 1)
        return p.scatter_add_(-1, y, torch.full_like(y, -1, dtype=p.dtype))
    y = tokens[:, 1:, None].to(p.device)  # [n, length - 1, 1]
    p[:, :-1].scatter_add_(-1, y, torch.full_like(y, -1, dtype=p.dtype))
    p[:, -1] = 0
    return p


def backward_head(
    executor: LayerExecutor,
    call: LayerCall,
    hidden: Tensor,
    tokens: Tensor,
    gradients: Tensor,
    *,
    labels: Labels,
    seed: int,
) -> None:
    """Fill `gradients` with those of the summed token losses at the last layer's output.

    `call` is that of the last layer, `hidden` [n_windows, length, d_model] its output for `tokens`
    [n_windows, length].
    """
    kind = "cuda" if executor.device.startswith("cuda") else "cpu"
    batch = max(1, HEAD_TOKENS[kind] // tokens.shape[1])
    generator = torch.Generator(executor.device)
    with executor.around_layers(head=True):
        for rows in batches(len(tokens), batch):
            generator.manual_seed(seed + rows.start)  # independent of the batches before
            leaf = hidden[rows].to(executor.device).requires_grad_()
            with torch.enable_grad():
                logits = executor.logits(leaf, tokens[rows], call)
            at_logits = logit_gradient(logits.detach(), tokens[rows], labels, generator)
            (gradients[rows],) = torch.autograd.grad(logits, leaf, at_logits.to(logits.dtype))


def backward_layer(
    executor: LayerExecutor,
    index: int,
    call: LayerCall,
    checkpoints: ActivationCheckpoints,
    gradients: Tensor,
    batch: int,
    required: Required,
) -> LinearStatistics:
    """Replace the gradients at a layer's output by those at its input, in place.

    Returns the sums for the linears in `required`. Gradients that are not finite raise
    `ModelError`.
    """
    linears = {lin.name: lin for lin in executor.architecture.linears if lin.layer == index}
    statistics = LinearStatistics.backward(linears, required)
    layer_name = executor.architecture.layer_names[index]

    def see(name: str, x: Tensor, y: Tensor) -> None:
        W, x = executor.architecture.model.get_submodule(name).weight, _by_window(x.detach(), leaf)

        def add(g: Tensor) -> None:
            statistics.add(name, LinearBatch(x, _by_window(g.detach(), leaf), W))

        y.register_hook(add)

    # The other attention kernels of a GPU sum their backward pass in no fixed order.
    on_gpu = executor.device.startswith("cuda")
    deterministic = sdpa_kernel(SDPBackend.MATH) if on_gpu else nullcontext()
    with (
        executor.layer(index) as layer,
        watch_outputs(layer, layer_name, statistics.watched, see),
        deterministic,
    ):
        for rows in batches(len(gradients), batch):
            leaf = checkpoints.read(index, rows, executor.device).requires_grad_()
            with torch.enable_grad():
                out = apply(layer, call, leaf)
            at_output = gradients[rows].to(executor.device)
            (gradients[rows],) = torch.autograd.grad(out, leaf, at_output)
    if statistics.not_finite or not bool(torch.isfinite(gradients).all()):
        raise ModelError(
            f"model: the gradients in {layer_name} are not finite on the calibration text; its "
            "weights are damaged or overflow: check the source model, or choose a method without "
            "gradients, such as svd-llm"
        )
    return statistics


def _by_window(x: Tensor, hidden: Tensor) -> Tensor:
    """Undo the flattening of all tokens into one dimension, as in OPT: [n, length, d]."""
    flat = x.ndim == 2 and len(x) == hidden.shape[0] * hidden.shape[1]
    return x.unflatten(0, hidden.shape[:2]) if flat else x
