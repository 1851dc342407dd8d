"""What every form of a product of low rank answers."""

from abc import abstractmethod

from torch import Tensor

from lrc.compressors.layers.form import Form, Sizes


class RankForm(Form):
    """A form that holds a product of low rank, ``W_hat = B @ A``."""

    SIZES = ("rank",)
    rank: int

    @classmethod
    def largest_step(cls, d_out: int, d_in: int) -> int:
        """Return the largest rank."""
        return min(d_out, d_in)

    @classmethod
    def sizes_at(cls, step: int, d_out: int, d_in: int, ratio: float = 2.0) -> Sizes:
        """Return the rank."""
        return {"rank": step}

    @staticmethod
    @abstractmethod
    def encode(B: Tensor, A: Tensor) -> dict[str, Tensor]:
        """Write ``W_hat = B @ A`` as the tensors of the file, but for a bias.

        Parameters
        ----------
        B : Tensor, shape [d_out, rank], float64
        A : Tensor, shape [rank, d_in], float64

        Returns
        -------
        dict of str to Tensor
            By the names of `shapes`. Those without a dtype there are unrounded: rounding them to
            the model's is for the caller.

        Raises
        ------
        ValueError
            If the form cannot hold this product.
        """
