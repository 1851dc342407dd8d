"""The Kullback-Leibler divergence between the predictions of two models, a few positions at a time.

Logits take far more memory than hidden states. They are computed from the output of the decoder for
`PIECE` positions at a time; gradients at that output are collected before the decoder's backward
pass. Gradients at the logits are computed by formulas, which read and write about half as many
bytes as automatic differentiation does.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import nll_loss, pad

from lrc.compressors.evaluate.agreement import kl_divergence, log_probabilities
from lrc.compressors.evaluate.logits import head_gives_logits
from lrc.compressors.heal.hidden_states import hidden_distance, recorded
from lrc.compressors.kernels.logit_divergence import fused_gradient

PIECE = {"cpu": 256, "cuda": 2048}
NO_LABEL = -100
"""Label of the last position of a window, whose next token is unknown."""
Kind = Literal["forward", "reverse", "both"]


class Losses(NamedTuple):
    """Means over the positions of a text, in nats."""

    divergence: float
    """Forward divergence of the compressed model from the dense one."""
    cross_entropy: float
    """Of the next tokens of the text; the last position of a window has none and counts as zero."""


def logit_gradient(
    dense: Tensor, compressed: Tensor, kind: Kind, *, labels: Tensor, weight: float = 0.0
) -> Tensor:
    """Return the gradient [n, vocabulary] of the sum of the losses, in float32 at least.

    With p of the dense model and q of the compressed one, the gradient of ``sum p (log p - log q)``
    at the logits of q is ``q - p``, that of the divergence d with p and q exchanged is
    ``q (log q - log p - d)``, and that of the cross entropy ``q`` minus one at the label.

    Parameters
    ----------
    dense, compressed : Tensor, shape [n, vocabulary]
        Logits.
    kind : {"forward", "reverse", "both"}
        ``sum p (log p - log q)``, with p and q exchanged, or the mean.
    labels : Tensor, shape [n]
        Next tokens, or `NO_LABEL`.
    weight : float
        Multiple of the cross entropy of `labels` that is added.
    """
    if kind == "forward":
        q = _probabilities(compressed)
        gradient = q - _probabilities(dense)
    else:
        log_p, log_q = log_probabilities(dense), log_probabilities(compressed)
        q, difference = log_q.exp(), log_q - log_p
        gradient = q * (difference - (q * difference).sum(-1, keepdim=True))
        if kind == "both":
            gradient = (gradient + q - log_p.exp()) / 2
    if weight:
        known = (labels != NO_LABEL)[:, None]
        words = torch.arange(q.shape[-1], device=q.device)
        # A comparison, since scattered additions are not deterministic on a GPU.
        gradient.addcmul_(q, known.to(q.dtype), value=weight)
        gradient.add_(words == labels[:, None], alpha=-weight)
    return gradient


def _probabilities(logits: Tensor) -> Tensor:
    return logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))


def next_tokens(windows: Tensor, device: torch.device) -> Tensor:
    """Return the next token [n * length] of every position of windows [n, length]."""
    return pad(windows.to(device)[:, 1:], (0, 1), value=NO_LABEL).flatten()


class Predictor:
    """A model in two steps: features of every position, and logits from features.

    Features are the output of the decoder. If the model does more than multiply them by its head,
    such as capping logits, they are the logits.

    Parameters
    ----------
    model : PreTrainedModel
    tokens : Tensor, shape [n, length]
        Any windows.
    dtype : torch.dtype
        In which a GPU multiplies.
    layers : sequence of nn.Module
        Layers of the model of which hidden states are compared.
    """

    def __init__(
        self, model: Any, tokens: Tensor, *, dtype: torch.dtype, layers: Sequence[nn.Module] = ()
    ) -> None:
        self._model, self._dtype, self.layers = model, dtype, layers
        self._device = next(model.get_input_embeddings().parameters()).device
        with torch.no_grad():
            split = head_gives_logits(model, tokens[0].to(self._device))
        self._head = model.get_output_embeddings() if split else None

    def precision(self) -> AbstractContextManager[object]:
        """Return the context to compute in: 16-bit products on a GPU.

        Where gradients are computed, float16 is replaced by bfloat16: the gradient of a logit is a
        difference of probabilities, most of which are zero in float16.
        """
        if self._device.type == "cpu" or self._dtype == torch.float32:
            return nullcontext()
        underflows = self._dtype == torch.float16 and torch.is_grad_enabled()
        return torch.autocast(self._device.type, torch.bfloat16 if underflows else self._dtype)

    def features(self, tokens: Tensor) -> Tensor:
        """Return the features [n_positions, d] of windows [n, length]."""
        ids = tokens.to(self._device)
        with self.precision():
            if self._head is None:
                out: Tensor = self._model(input_ids=ids, use_cache=False).logits
            else:
                out = self._model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        return out.flatten(0, 1)

    def logits(self, features: Tensor) -> Tensor:
        """Return logits [n, vocabulary] of features [n, d]."""
        if self._head is None:
            return features
        with self.precision():
            found: Tensor = self._head(features)
        return found

    def pieces(self, n_positions: int) -> Iterator[slice]:
        """Return slices of positions whose logits exist at the same time."""
        size = PIECE[self._device.type]
        return (slice(start, start + size) for start in range(0, n_positions, size))


@torch.no_grad()
def mean_losses(
    dense: Predictor,
    compressed: Predictor,
    windows: Tensor,
    *,
    together: int,
    counted: Tensor | None = None,
) -> Losses:
    """Return the means of the losses over positions of windows [n, length].

    Parameters
    ----------
    together : int
        Number of windows that are computed at once.
    counted : Tensor, shape [n, length], bool, optional
        Positions of which the mean is taken; all if left out.
    """
    if counted is None:
        counted = torch.ones_like(windows, dtype=torch.bool)
    divergence = entropy = 0.0
    for tokens, used in zip(windows.split(together), counted.split(together), strict=True):
        expected, found = dense.features(tokens), compressed.features(tokens)
        device = found.device
        labels, weights = next_tokens(tokens, device), used.flatten().to(device, torch.float32)
        for rows in compressed.pieces(len(found)):
            log_p = log_probabilities(dense.logits(expected[rows]))
            log_q = log_probabilities(compressed.logits(found[rows]))
            divergence += float(kl_divergence(log_p, log_q) @ weights[rows].to(log_q.dtype))
            nll = nll_loss(log_q, labels[rows], ignore_index=NO_LABEL, reduction="none")
            entropy += float(nll @ weights[rows].to(nll.dtype))
    positions = int(counted.sum())
    return Losses(divergence / positions, entropy / positions)


def add_gradients(
    dense: Predictor,
    compressed: Predictor,
    windows: Tensor,
    weights: Tensor,
    *,
    kind: Kind,
    hidden: float = 0.0,
    cross_entropy: float = 0.0,
) -> None:
    """Add the gradients of the weighted sum of the divergences at positions.

    Parameters
    ----------
    windows : Tensor, shape [n, length]
    weights : Tensor, shape [n, length]
        Of positions; for a mean, one divided by their number.
    hidden : float
        Multiple of `hidden_distance` that is added to the divergence.
    cross_entropy : float
        Multiple of the cross entropy of the next tokens of `windows` that is added; the last
        position of a window has none.
    """
    with torch.no_grad(), recorded(dense.layers) as expected_states:
        expected = dense.features(windows)
    with recorded(compressed.layers) as states:
        found = compressed.features(windows)
    labels = next_tokens(windows, found.device)
    weights = weights.flatten().to(found.device)
    gradient = torch.empty_like(found)
    for rows in compressed.pieces(len(found)):
        leaf = found[rows].detach().requires_grad_(True)
        own = compressed.logits(leaf)
        with torch.no_grad():
            at_logits = _gradient(
                dense.logits(expected[rows]), own.detach(), kind, labels[rows], cross_entropy
            )
        (at_features,) = torch.autograd.grad(own, leaf, at_logits.to(own.dtype))
        # Weights are applied to features, which are smaller.
        gradient[rows] = at_features * weights[rows, None]
    if not hidden:
        found.backward(gradient)
        return
    distance = hidden * (hidden_distance(expected_states, states) @ weights.float())
    torch.autograd.backward([found, distance], [gradient, torch.ones_like(distance)])


def _gradient(
    dense: Tensor, compressed: Tensor, kind: Kind, labels: Tensor, weight: float
) -> Tensor:
    """Return `logit_gradient`, by a kernel if there is one."""
    found = fused_gradient(
        dense,
        compressed,
        labels,
        forward=kind != "reverse",
        reverse=kind != "forward",
        weight=weight,
    )
    if found is not None:
        return found
    return logit_gradient(dense, compressed, kind, labels=labels, weight=weight)
