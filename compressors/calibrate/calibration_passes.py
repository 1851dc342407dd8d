"""Forward and backward calibration pass through one decoder layer, for all windows.

The forward pass replaces hidden states by the layer's output and sums over the inputs of its
linears. The backward pass recomputes the layer from its checkpointed input, with autograd,
propagates the gradient at its output to its input, and sums over the gradients at the outputs of
its linears.
"""

from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lrc.compressors.calibrate.calibration_context import Labels, check_finite
from lrc.compressors.calibrate.layer_calls import watch
from lrc.compressors.calibrate.layer_executor import LayerExecutor
from lrc.compressors.calibrate.statistic_table import LinearBatch, LinearStatistics, Required
from lrc.compressors.corpus.pairs import IGNORED, Pairs
from lrc.compressors.io.device_copies import copy_, on_device
from lrc.compressors.io.freed_memory import drop_shared_pages
from lrc.compressors.layers.experts import Expert
from lrc.compressors.models.model_kinds import problem_type
from lrc.compressors.solvers.moments import token_weights
from lrc.configs.size import GIB

HEAD_TOKENS = {"cpu": 512, "cuda": 2048}
"""Tokens whose logits exist at once, at most."""
HEAD_TENSORS = 8
"""Tensors of the size of these logits that exist at once while their gradient is taken."""
HEAD_BYTES = 4 * GIB
"""Of these tensors: with a vocabulary of 128k, they are those of 1k tokens."""


def head_tokens(device_type: str, vocabulary: int) -> int:
    """Return the number of tokens whose logits exist at once while their gradient is taken."""
    return max(1, min(HEAD_TOKENS[device_type], HEAD_BYTES // (4 * HEAD_TENSORS * vocabulary)))


def forward_layer(
    executor: LayerExecutor, index: int, hidden: Tensor, required: Sequence[Required]
) -> tuple[list[dict[str, Tensor]], Counter[str]]:
    """Replace the hidden states [n_windows, length, d_model] by the layer's output, in place.

    Returns the sums for the linears in each entry of `required`, and the number of tokens that
    every linear received; of all processes in the last one only. Inputs or hidden states that are
    not finite raise `ModelError`.
    """
    linears, groups = executor.linears(index), executor.calls[index].groups
    parts = [LinearStatistics.forward(groups, linears, each) for each in required]
    statistics = LinearStatistics.union(parts)
    model = executor.architecture.model

    def see(name: str, x: Tensor, y: Tensor) -> None:
        linear = model.get_submodule(name)
        y = y if linear.bias is None else y - linear.bias
        x, y = executor.without_padding(x, present[0]), executor.without_padding(y, present[0])
        if name in statistics.capped:
            x = x.reshape(-1, x.shape[-1])
            x = x * token_weights(x, executor.window or len(x)).sqrt()
        expert = name.rpartition(".")[0]
        if name in statistics.gated and expert in gates:
            x, y = x * gates[expert], y * gates[expert]
        statistics.add(name, LinearBatch(x, y, linear.weight))

    gates: dict[str, Tensor] = {}  # of the present batch
    present: list[slice] = []
    with (
        executor.layer(index) as layer,
        watch_gates(executor.architecture.layer_names[index], layer, gates),
        watch(model, statistics.watched, see),
        executor.context.processes.continued(statistics.sums, statistics.n_tokens),
    ):
        for rows in executor.batches:
            present[:] = [rows]
            executor.advance_batch_(index, hidden, rows)
    for key, total in statistics.sums.items():
        check_finite(total, f"the inputs of {key.rpartition('.')[0]}")
    for rows in executor.batches:
        check_finite(hidden[rows], f"the output of {executor.architecture.layer_names[index]}")
        drop_shared_pages(hidden[rows])
    return [part.of(statistics.sums) for part in parts], statistics.n_tokens


def watch_gates(name: str, layer: nn.Module, gates: dict[str, Tensor]) -> ExitStack:
    """Keep the weights [n_tokens, 1] by which the router scales each expert, within the context.

    By the full name of the expert; `name` is that of the layer.
    """
    hooks = ExitStack()
    for expert, module in layer.named_modules(prefix=name):
        if isinstance(module, Expert):
            hook = partial(lambda expert, _, args: gates.__setitem__(expert, args[1]), expert)
            hooks.enter_context(module.register_forward_pre_hook(hook))
    return hooks


def logit_gradient(
    logits: Tensor, tokens: Tensor | None, labels: Labels, generator: torch.Generator
) -> Tensor:
    """Return the gradient [n, length, vocabulary] of every token's loss with respect to its logits.

    The Hessian of the loss with respect to the logits of a token is ``diag(p) - p p^T``, where p is
    the predicted distribution. It is also the second moment of the gradients if labels are drawn
    from p (Fisher information).

    Parameters
    ----------
    logits : Tensor, shape [n, length, vocabulary]
    tokens : Tensor, shape [n, length], optional
        Input tokens, for ``real``; the label of a position is the token after it.
    labels : {"model", "sampled", "real"}
        ``model``: ``sqrt(p) * z - p (sqrt(p) . z)`` with Gaussian z, a random combination of all
        labels with second moment ``diag(p) - p p^T``. ``sampled``: ``p - onehot(y)`` with y drawn
        from p, of the same second moment but with the heavier tails of single labels. ``real``:
        ``p - onehot(y)`` with y the token that follows, the empirical Fisher; the last position,
        whose label lies outside the window, gets 0.
    generator : torch.Generator
        On the device of `logits`.
    """
    p = logits.float().softmax(dim=-1)
    if labels == "model":
        z = torch.randn(p.shape, generator=generator, device=p.device)
        drawn = z.mul_(p.sqrt())  # in place: logits are the largest tensors of a run
        return drawn.sub_(p.mul_(drawn.sum(dim=-1, keepdim=True)))
    if labels == "sampled":
        y = torch.multinomial(p.flatten(0, 1), 1, generator=generator).view(*p.shape[:2], 1)
        return p.scatter_add_(-1, y, torch.full_like(y, -1, dtype=p.dtype))
    assert tokens is not None
    y = tokens[:, 1:, None].to(p.device)  # [n, length - 1, 1]
    p[:, :-1].scatter_add_(-1, y, torch.full_like(y, -1, dtype=p.dtype))
    p[:, -1] = 0
    return p


def targets_count(counted: Tensor) -> Tensor:
    """Return 1 for every position whose label counts in the loss, else 0; [n, length, 1].

    `counted` [n, length] is True for tokens that count. The label of a position is the token after
    it; the last one, whose label lies outside the window, counts if its own token does.
    """
    return torch.cat([counted[:, 1:], counted[:, -1:]], dim=1).float()[..., None]


def label_gradient(
    logits: Tensor, labels: Tensor, drawn: Labels, generator: torch.Generator
) -> Tensor:
    """Return the gradient [n, length, vocabulary] of the loss of every label in an encoder-decoder.

    Parameters
    ----------
    logits : Tensor, shape [n, length, vocabulary]
    labels : Tensor, shape [n, length]
        Tokens of the target, each at the position that predicts it. The gradient is 0 where it is
        `IGNORED`.
    drawn : {"model", "sampled", "real"}
        As in `logit_gradient`; for ``real``, `labels`.
    generator : torch.Generator
        On the device of `logits`.
    """
    counted = (labels != IGNORED).to(logits.device)
    if drawn == "real":
        found, y = logits.float().softmax(dim=-1), labels.clamp(min=0)[..., None].to(logits.device)
        found.scatter_add_(-1, y, torch.full_like(y, -1, dtype=found.dtype))
    else:
        found = logit_gradient(logits, None, drawn, generator)
    return found.mul_(counted[..., None])


def output_gradient(
    outputs: Tensor, labels: Tensor | None, problem: str, drawn: Labels, generator: torch.Generator
) -> Tensor:
    """Return the gradient [n, n_outputs] of the loss of every text with respect to its outputs.

    Parameters
    ----------
    outputs : Tensor, shape [n, n_outputs]
        Of an encoder.
    labels : Tensor, shape [n], optional
        Classes, for ``real``.
    problem : str
        ``single_label_classification`` has the cross entropy as its loss, see `logit_gradient`, and
        ``multi_label_classification`` one for each output. All others have half the squared error
        to the outputs of the dense model, whose Hessian is the identity: for embeddings of length
        1, that is the cosine distance.
    drawn : {"model", "sampled", "real"}
        As in `logit_gradient`; of the other losses, always ``model``.
    generator : torch.Generator
        On the device of `outputs`.
    """
    if problem == "single_label_classification":
        if drawn != "real":
            return logit_gradient(outputs[:, None], labels, drawn, generator)[:, 0]
        assert labels is not None
        p, y = outputs.float().softmax(dim=-1), labels[:, None].to(outputs.device)
        return p.scatter_add_(-1, y, torch.full_like(y, -1, dtype=p.dtype))
    z = torch.randn(outputs.shape, generator=generator, device=outputs.device)
    if problem == "multi_label_classification":
        p = outputs.float().sigmoid()
        return (p * (1 - p)).sqrt() * z
    return z


def backward_head(executor: LayerExecutor, hidden: Tensor, gradients: Tensor) -> None:
    """Fill `gradients` with those of the summed losses at the last layer's output.

    `hidden` [n_windows, length, d_model] is that output for all windows. The losses are those of
    tokens, or of the texts of an encoder. Of an encoder-decoder model, gradients at the states of
    the source are 0: they reach the outputs through the decoder only.
    """
    context, tokens, sentences = executor.context, executor.tokens, executor.sentences
    generator, counted = torch.Generator(context.device), context.counted()
    problem = problem_type(context.architecture.model.config, context.architecture.kind)
    vocabulary = int(getattr(context.architecture.model.config.get_text_config(), "vocab_size", 1))
    with executor.around_layers(head=True):
        for rows in executor.pieces(head_tokens(context.device_type, vocabulary)):
            # Independent of the batches before.
            generator.manual_seed(context.seed + executor.numbers[rows.start])
            leaf = on_device(hidden[rows], context.device).requires_grad_()
            with torch.enable_grad():
                if sentences is None:
                    out = executor.logits(leaf, tokens[rows])
                else:
                    out = executor.outputs(leaf, rows)
            if sentences is None:
                at_out = logit_gradient(out.detach(), tokens[rows], context.labels, generator)
                if counted is not None:
                    at_out.mul_(targets_count(counted[executor.numbers[rows]]).to(at_out.device))
            elif isinstance(sentences, Pairs):
                targets = sentences[rows].labels
                at_out = label_gradient(out.detach(), targets, context.labels, generator)
            else:
                labels = sentences[rows].labels
                at_out = output_gradient(out.detach(), labels, problem, context.labels, generator)
            (gradient,) = torch.autograd.grad(out, leaf, at_out.to(out.dtype))
            copy_(gradients[rows], gradient)
            del gradient, leaf, out, at_out  # before the next logits are computed
            drop_shared_pages(hidden[rows])
            drop_shared_pages(gradients[rows])


def backward_layer(
    executor: LayerExecutor,
    index: int,
    states: Tensor,
    gradients: Tensor,
    required: Sequence[Required],
) -> list[dict[str, Tensor]]:
    """Replace the gradients at a layer's output by those at its input, in place.

    `states` and `gradients` are [n_windows, length, d_model], the states at the layer's input.
    Returns the sums for the linears in each entry of `required`, of all processes in the last one
    only. Gradients that are not finite raise `ModelError`.
    """
    parts = [LinearStatistics.backward(executor.linears(index), each) for each in required]
    statistics = LinearStatistics.union(parts)
    model, context = executor.architecture.model, executor.context

    def see(name: str, x: Tensor, y: Tensor) -> None:
        W, x = model.get_submodule(name).weight, _by_window(x.detach(), leaf)

        def add(g: Tensor) -> None:
            statistics.add(name, LinearBatch(x, _by_window(g.detach(), leaf), W))

        y.register_hook(add)

    # The other attention kernels of a GPU sum their backward pass in no fixed order.
    on_gpu = context.device_type == "cuda"
    deterministic = sdpa_kernel(SDPBackend.MATH) if on_gpu else nullcontext()
    with (
        executor.layer(index),
        watch(model, statistics.watched, see),
        deterministic,
        context.processes.continued(statistics.sums, statistics.n_tokens),
    ):
        for rows in executor.batches:
            leaf = on_device(states[rows], context.device, torch.float32).requires_grad_()
            with torch.enable_grad():
                out = executor.apply(index, leaf, rows=rows)
            at_output = on_device(gradients[rows], context.device)
            (gradient,) = torch.autograd.grad(out, leaf, at_output)
            copy_(gradients[rows], gradient)
            # And the graph, whose hooks keep the inputs of all linears.
            del out, at_output, gradient
            drop_shared_pages(states[rows])
            drop_shared_pages(gradients[rows])
    at_inputs = (gradients[rows] for rows in executor.batches)
    for total in (*statistics.sums.values(), *at_inputs):
        check_finite(
            total,
            f"the gradients in {executor.architecture.layer_names[index]}",
            "its weights are damaged or overflow: check the source model, or choose a method "
            "without gradients, such as svd-llm",
        )
    return [part.of(statistics.sums) for part in parts]


def _by_window(x: Tensor, hidden: Tensor) -> Tensor:
    """Undo the flattening of all tokens into one dimension, as in OPT: [n, length, d].

    The tokens of an expert, whose windows are not known here, count as one: [1, n_tokens, d].
    """
    if x.ndim != 2:
        return x
    n, length = hidden.shape[:2]
    return x.unflatten(0, (n, length)) if len(x) == n * length else x[None]
