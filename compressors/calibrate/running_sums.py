"""Running sums over tokens, by name."""

from torch import Tensor

from lrc.compressors.solvers.linalg import add_second_moment_


class Sums(dict[str, Tensor]):
    """Name -> sum; what has not been added to is not there."""

    def add(self, key: str, total: Tensor) -> None:
        """Add what some tokens sum up to."""
        self[key] = self[key] + total if key in self else total

    def add_square(self, key: str, x: Tensor) -> None:
        """Add the second moment [d, d] of tokens ``x`` [..., d], in place: it can be a GiB."""
        if key not in self:
            self[key] = x.new_zeros(x.shape[-1], x.shape[-1])
        add_second_moment_(self[key], x)

    def add_product(self, key: str, x: Tensor, y: Tensor) -> None:
        """Add ``x.T @ y`` of tokens ``x`` [n_tokens, d] and ``y`` [n_tokens, e], in place."""
        if key not in self:
            self[key] = x.new_zeros(x.shape[1], y.shape[1])
        self[key].addmm_(x.T, y)
