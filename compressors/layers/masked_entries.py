"""Components that store single entries of a matrix at the places of a mask or of indices."""

from abc import abstractmethod

from torch import Tensor, nn

from lrc.compressors.layers.masked_weight import MaskedWeight


class MaskedEntries(MaskedWeight):
    """A component whose tensor ``values`` has entries of a matrix [d_out, columns].

    How many of them are stored is fixed; `support` says within what.
    """

    @property
    @abstractmethod
    def support(self) -> tuple[int, int]:
        """Of how many consecutive entries, row by row, how many are stored."""

    @abstractmethod
    def entries(self) -> Tensor:
        """Return the matrix [d_out, columns] with its zeros."""

    def encode_entries(self, entries: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """Return the tensors that store the entries [d_out, columns] at the places of a mask."""
        return self.encode(W_hat=entries, mask=mask)

    def multiply_entries(self, x: Tensor, entries: Tensor) -> Tensor:
        """Map ``x`` [..., d_in] to [..., d_out] with other entries than those that are stored."""
        return nn.functional.linear(x, entries)

    def largest(self, entries: Tensor) -> Tensor:
        """Return the mask of the largest magnitudes: as many in every group as are stored.

        Of equal ones, the first are taken.
        """
        group, count = self.support
        sizes = entries.abs().view(-1, group)
        threshold = sizes.sort(dim=1, descending=True).values[:, count - 1 : count]
        above, equal = sizes > threshold, sizes == threshold
        missing = count - above.sum(dim=1, keepdim=True)
        mask = above | (equal & (equal.cumsum(dim=1) <= missing))
        return mask.view(entries.shape)
