"""The Kullback-Leibler divergence between the predictions of two models, a few positions at a time.

Logits take far more memory than hidden states. They are computed from the output of the decoder for
`PIECE` positions at a time; gradients at that output are added up before the decoder's backward
pass.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad

from lrc.compressors.evaluate.agreement import kl_divergence, log_probabilities
from lrc.compressors.evaluate.logits import head_gives_logits
from lrc.compressors.heal.hidden_states import hidden_distance, recorded

PIECE = {"cpu": 256, "cuda": 2048}
NO_LABEL = -100
"""Label of the last position of a window, whose next token is unknown."""
Kind = Literal["forward", "reverse", "both"]


def divergence(dense: Tensor, compressed: Tensor, kind: Kind) -> Tensor:
    """Return the sum over positions of the divergence of predictions, in nats.

    Parameters
    ----------
    dense, compressed : Tensor, shape [n, vocabulary]
        Logits.
    kind : {"forward", "reverse", "both"}
        ``sum p (log p - log q)`` with p of the dense model, with p and q exchanged, or the mean.
    """
    log_p, log_q = log_probabilities(dense), log_probabilities(compressed)
    forward = kl_divergence(log_p, log_q).sum()
    if kind == "forward":
        return forward
    reverse = kl_divergence(log_q, log_p).sum()
    return reverse if kind == "reverse" else (forward + reverse) / 2


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
        """Return the context to compute in: 16-bit products of float32 weights on a GPU.

        Where gradients are computed, float16 is replaced by bfloat16: the gradient of a logit is a
        difference of probabilities divided by the number of positions, zero in float16.
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
def mean_divergence(
    dense: Predictor, compressed: Predictor, windows: Tensor, *, together: int
) -> float:
    """Return the forward divergence per position on windows [n, length], in nats."""
    total = 0.0
    for tokens in windows.split(together):
        expected, found = dense.features(tokens), compressed.features(tokens)
        for rows in compressed.pieces(len(found)):
            logits = dense.logits(expected[rows]), compressed.logits(found[rows])
            total += float(divergence(*logits, "forward"))
    return total / windows.numel()


def add_gradients(
    dense: Predictor,
    compressed: Predictor,
    windows: Tensor,
    *,
    kind: Kind,
    positions: int,
    hidden: float = 0.0,
    labels: float = 0.0,
) -> None:
    """Add the gradients of the divergence on windows [n, length], divided by `positions`.

    Parameters
    ----------
    hidden : float
        Multiple of `hidden_distance` that is added to the divergence.
    labels : float
        Multiple of the cross entropy of the next tokens of `windows` that is added; the last
        position of a window has none.
    """
    with torch.no_grad(), recorded(dense.layers) as expected_states:
        expected = dense.features(windows)
    with recorded(compressed.layers) as states:
        found = compressed.features(windows)
    leaf = found.detach().requires_grad_(True)
    if labels:
        following = pad(windows[:, 1:], (0, 1), value=NO_LABEL).flatten().to(found.device)
    for rows in compressed.pieces(len(found)):
        with torch.no_grad():
            logits = dense.logits(expected[rows])
        own = compressed.logits(leaf[rows])
        loss = divergence(logits, own, kind)
        if labels:
            entropy = cross_entropy(
                own.float(), following[rows], ignore_index=NO_LABEL, reduction="sum"
            )
            loss = loss + labels * entropy
        (loss / positions).backward()
    if not hidden:
        found.backward(leaf.grad)
        return
    distance = hidden * hidden_distance(expected_states, states) / positions
    torch.autograd.backward([found, distance], [leaf.grad, torch.ones_like(distance)])
