"""The gradient of a token's loss at the logits: where output-gradient moments start from.

The curvature of a language model's loss is the Fisher matrix of its own predictions. Its second
moment at the logits is ``diag(p) - p p^T`` a token; every function here returns random vectors (or
one that is not random) whose second moment is that, or stands for it.
"""

from typing import Literal

import torch
from torch import Tensor

Labels = Literal["model", "sampled", "real"]


def logit_gradient(
    logits: Tensor, tokens: Tensor, labels: Labels, generator: torch.Generator
) -> Tensor:
    """Return the gradient of every token's loss with respect to its logits.

    Parameters
    ----------
    logits : Tensor, shape [n, length, vocabulary]
    tokens : Tensor, shape [n, length]
        What was read; the label of a position is the token after it.
    labels : {"model", "sampled", "real"}
        ``model``: ``sqrt(p) * z - p (sqrt(p) . z)`` with Gaussian z, a draw from all labels at
        once, of second moment ``diag(p) - p p^T``. ``sampled``: ``p - onehot(y)`` with y drawn
        from p, of the same second moment but with the heavier tails of single labels. ``real``:
        ``p - onehot(y)`` with y the token that follows, the empirical Fisher; the last position,
        whose label lies outside the window, has none and gets 0.
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
