"""A matrix as a chain of cores: a matrix product operator, or tensor train."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from lrc.compressors.layers.chain_shape import ChainShape, largest_bond
from lrc.compressors.layers.component import Component, ComponentConfig, is_plain, multiply
from lrc.compressors.layers.quantization_args import TensorSpec, TensorSpecs
from lrc.compressors.layers.recomputed import product
from lrc.compressors.layers.tiles import is_certain


class TensorTrain(Component):
    """A chain of two to four cores, with the outputs and inputs factored among them [1]_, [2]_.

    Entry ``(i_1 ... i_N, j_1 ... j_N)`` of the matrix is the product of the matrices
    ``core_k[:, i_k, j_k, :]``, whose inner dimensions are the bond dimensions: `bond`, or less
    where less is enough for every matrix. The first factor of a dimension is its slowest index. The
    pattern states the factors, see `ChainShape`. Two cores are a sum of `bond` Kronecker products.

    Few rows are multiplied by one core after the other, in the cheaper of the two directions. For
    many rows it is cheaper to multiply the cores out to the matrix.

    References
    ----------
    .. [1] A. Tomut et al., "CompactifAI: Extreme Compression of Large Language Models using
       Quantum-Inspired Tensor Networks", 2024. https://arxiv.org/abs/2401.14109
    .. [2] A. Novikov et al., "Tensorizing Neural Networks", NeurIPS 2015.
       https://arxiv.org/abs/1509.06569
    """

    TYPE = "tensor_train"
    SIZES = ("bond",)

    def __init__(self, shape: tuple[int, int], config: ComponentConfig, **where: Any) -> None:
        super().__init__(shape, config, **where)
        self.chain = _chain_of(*shape, config)

    @classmethod
    def allows(cls, pattern: str | None) -> bool:
        """Return whether there is a pattern; which ones are possible depends on the shape."""
        return pattern is not None

    @classmethod
    def tensors(cls, d_out: int, d_in: int, config: ComponentConfig) -> TensorSpecs:
        """Return ``core1.weight`` and so on.

        Core [a, m, n, b] is stored as a matrix [m b, a n], which maps inputs and the bond before
        the core to outputs and the bond after it.
        """
        return {
            f"core{k}.weight": TensorSpec([m * b, a * n], role="matrix")
            for k, (a, m, n, b) in enumerate(_chain_of(d_out, d_in, config).cores, start=1)
        }

    @classmethod
    def largest_step(cls, d_out: int, d_in: int, *, pattern: str | None = None) -> int:
        """Return the bond dimension at which every matrix is such a chain."""
        return largest_bond(d_out, d_in, pattern)

    @classmethod
    def multiply_adds(cls, d_out: int, d_in: int, config: ComponentConfig) -> int:
        """Return those of the cheaper direction."""
        chain = _chain_of(d_out, d_in, config)
        return min(chain.from_first, chain.from_last)

    @staticmethod
    def encode(**parts: Tensor) -> dict[str, Tensor]:
        """Return the matrices of the cores ``core1``, ``core2`` and so on [a, m, n, b]."""
        return {
            f"{name}.weight": core.permute(1, 3, 0, 2).flatten(2).flatten(0, 1).contiguous()
            for name, core in parts.items()
        }

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x`` [..., d_in] to [..., d_out] with the fewest multiply-adds."""
        chain, tokens = self.chain, x.numel() // self.d_in
        first, last = chain.from_first, chain.from_last
        dense = chain.whole + tokens * self.d_out * self.d_in
        # Adapters and hooks for offloaded weights only act when the module is called.
        plain = all(is_plain(core) for core in self.children())
        if plain and is_certain(tokens * min(first, last) > dense):
            return product(x, self._dense, self)
        contract = self._from_last if plain and last < first else self._from_first
        return contract(x, tokens).reshape(*x.shape[:-1], self.d_out)

    def _from_first(self, x: Tensor, tokens: int) -> Tensor:
        """Multiply by the first core, then by the others."""
        rows, left = tokens, self.d_in
        for core, (a, m, n, b) in zip(self.children(), self.chain.cores, strict=True):
            left //= n
            p = x.reshape(rows, a * n, left).transpose(1, 2).flatten(0, 1)  # [rows * left, a * n]
            p = multiply(core, p)  # [rows * left, m * b]
            x = p.view(rows, left, m, b).permute(0, 2, 3, 1)  # [rows, m, b, left]
            rows *= m
        return x

    def _from_last(self, x: Tensor, tokens: int) -> Tensor:
        """Multiply by the last core, then by the others."""
        rows, right = tokens * self.d_in, 1
        for core, (a, m, n, b) in zip(self._cores()[::-1], self.chain.cores[::-1], strict=True):
            rows //= n
            p = x.reshape(rows, n * b, right).transpose(1, 2).flatten(0, 1)
            p = nn.functional.linear(p, core.reshape(a * m, n * b))  # [rows * right, a * m]
            x = p.view(rows, right, a * m).transpose(1, 2)
            right *= m
        return x

    def matrix(self) -> Tensor:
        """Return the matrix [d_out, d_in] in float32."""
        return multiply_out([core.float() for core in self._cores()])

    def _dense(self) -> Tensor:
        return multiply_out(self._cores())

    def _cores(self) -> list[Tensor]:
        """Return the cores [a, m, n, b]."""
        found = []
        for child, (a, m, n, b) in zip(self.children(), self.chain.cores, strict=True):
            weight: Any = child.weight
            found.append(weight.reshape(m, b, a, n).permute(2, 0, 3, 1))
        return found


def multiply_out(cores: Sequence[Tensor]) -> Tensor:
    """Return the matrix of a chain of cores [a, m, n, b] from bond 1 to bond 1."""
    (_, rows, columns, b), *others = (core.shape for core in cores)
    found = cores[0].reshape(-1, b)  # [rows * columns, b]
    for core, (_, m, n, b) in zip(cores[1:], others, strict=True):
        found = found @ core.reshape(-1, m * n * b)  # [rows * columns, m * n * b]
        found = found.view(rows, columns, m, n, b).transpose(1, 2).reshape(-1, b)
        rows, columns = rows * m, columns * n
    return found.view(rows, columns)


def _chain_of(d_out: int, d_in: int, config: ComponentConfig) -> ChainShape:
    return ChainShape.of(d_out, d_in, config.pattern, config.sizes["bond"])
