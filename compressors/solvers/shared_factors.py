"""One basis, or one dictionary, shared by the weights of several layers."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lrc.compressors.solvers.moments import Moment
from lrc.compressors.solvers.spectrum import Spectrum, spectrum


def shared_spectrum(weights: Sequence[Tensor], inputs: Moment, *, damp: float = 0.0) -> Spectrum:
    """Decompose the weights of several layers with a common right factor.

    Minimizes ``sum_i ||(W_i - B_i @ A) L||_F^2`` with ``L @ L.T == H``, damped. The result is the
    spectrum of the weights stacked along their outputs, see `split`. With one weight the method is
    SVD-LLM.

    The weights are [d_out, d_in]. `inputs` is the sum over the layers of the second moments H of
    their inputs; ``damp * mean(diag(H))`` is added to its diagonal.

    Raises
    ------
    ValueError
        If the shapes differ, or if `inputs` has no `full`.

    Notes
    -----
    As in Basis Sharing (https://arxiv.org/abs/2410.03765) every layer is weighted by the *sum* of
    the moments, not by its own. The paper's weights are transposed: its shared basis is A here.
    """
    shapes = {tuple(W.shape) for W in weights}
    if len(shapes) != 1:
        raise ValueError(f"a shared basis needs weights of one shape, got {sorted(shapes)}")
    # An image is that of a single layer: the stack needs the full moment.
    full = Moment.of(inputs.whole())
    return spectrum(torch.cat([W.double() for W in weights]), full, damp=damp)


def split(B: Tensor, n_layers: int) -> list[Tensor]:
    """Split the left factor [n_layers * d_out, rank] of a stack into one per layer."""
    return [part.contiguous() for part in B.chunk(n_layers)]


def split_codes(parts: Mapping[str, Tensor], n_layers: int) -> list[dict[str, Tensor]]:
    """Split the codes ``S`` and ``mask`` [atoms, n_layers * d_out] of a stack, with a common ``D``.

    The dictionary [d_in, atoms] is learned for weights stacked along their outputs, under the sum
    of the moments of their inputs. The shared variant of CoSpaDi (https://arxiv.org/abs/2509.22075)
    takes their mean, which differs by a constant factor.
    """
    codes = zip(parts["S"].chunk(n_layers, 1), parts["mask"].chunk(n_layers, 1), strict=True)
    return [{"D": parts["D"], "S": S, "mask": mask} for S, mask in codes]
