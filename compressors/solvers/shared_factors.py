"""One basis, or one dictionary, for the weights of several layers."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lrc.compressors.solvers.moments import Moment
from lrc.compressors.solvers.spectrum import Spectrum, spectrum


def shared_spectrum(weights: Sequence[Tensor], inputs: Moment, *, damp: float = 0.0) -> Spectrum:
    """Decompose weights of several layers with one right factor for all of them.

    Minimises ``sum_i ||(W_i - B_i @ A) L||_F^2`` with ``L @ L.T == H``, damped.

    Parameters
    ----------
    weights : sequence of Tensor, each of shape [d_out, d_in]
    inputs : Moment
        Sum over the layers of the second moments of their inputs. Needs `full`.
    damp : float
        Fraction of ``mean(diag(H))`` added to its diagonal.

    Returns
    -------
    Spectrum
        Of the weights stacked along their outputs, [n_layers * d_out, d_in]; `split` takes the B
        of a cut apart. A group of one is SVD-LLM.

    Raises
    ------
    ValueError
        If the shapes differ, or if `inputs` has only an image.

    Notes
    -----
    As in [1]_ every layer is weighted by the *sum* of the moments, not by its own. The papers'
    weights are transposed: their shared basis is our A, their coefficients are our B_i.

    References
    ----------
    .. [1] J. Wang et al., "Basis Sharing: Cross-Layer Parameter Sharing for Large Language Model
       Compression", ICLR 2025. https://arxiv.org/abs/2410.03765
    """
    shapes = {tuple(W.shape) for W in weights}
    if len(shapes) != 1:
        raise ValueError(f"a shared basis needs weights of one shape, got {sorted(shapes)}")
    # The image of one layer says nothing about the others: the stack sees the whole moment.
    whole = Moment.of(inputs.whole())
    return spectrum(torch.cat([W.double() for W in weights]), whole, damp=damp)


def split(B: Tensor, n_layers: int) -> list[Tensor]:
    """Take the left factor of a stack [n_layers * d_out, rank] apart, one [d_out, rank] a layer."""
    return [part.contiguous() for part in B.chunk(n_layers)]


def split_codes(parts: Mapping[str, Tensor], n_layers: int) -> list[dict[str, Tensor]]:
    """Take the codes of a stack apart: every layer has its own, and the dictionary of all.

    Parameters
    ----------
    parts : mapping of str to Tensor
        ``D`` [d_in, atoms]; ``S`` and ``mask`` [atoms, n_layers * d_out]: a dictionary learnt for
        weights stacked along their outputs, under the sum of the moments of their inputs.
    n_layers : int

    Returns
    -------
    list of dict
        One a layer, by the same names; S and mask are [atoms, d_out].

    Notes
    -----
    The variant of [1]_ with a dictionary common to several layers, which takes the mean of the
    moments: the same problem but for a constant. It is an approximation, as in `shared_spectrum`:
    exactly, every layer would have its own moment.

    References
    ----------
    .. [1] D. Makhov et al., "CoSpaDi", 2025. https://arxiv.org/abs/2509.22075
    """
    codes = zip(parts["S"].chunk(n_layers, 1), parts["mask"].chunk(n_layers, 1), strict=True)
    return [{"D": parts["D"], "S": S, "mask": mask} for S, mask in codes]
