"""A matrix as a dictionary of atoms and sparse coefficients."""

import torch
from torch import Tensor, nn

from lrc.compressors.kernels import needs_gradients, run_or_restore
from lrc.compressors.kernels.masked import FREE, expand
from lrc.compressors.layers.bitmask import mask_problems, pack_bits, packed_width
from lrc.compressors.layers.component import (
    ComponentConfig,
    SharedFactorComponent,
    Sizes,
    is_plain,
)
from lrc.compressors.layers.masked_entries import MaskedEntries
from lrc.compressors.layers.quantization_args import TensorSpec, TensorSpecs
from lrc.compressors.layers.tiles import is_certain


class Dictionary(MaskedEntries, SharedFactorComponent):
    """The transpose of ``D @ S`` with `nonzeros` coefficients for every output.

    ``a`` stores the dictionary ``D^T`` [atoms, d_in], which the layers of a group can share [1]_.
    ``values`` [d_out, nonzeros] are the coefficients in ascending order of the atoms. Their
    positions are a bit mask or a list of 16-bit indices, whichever is smaller. With pattern 2:4
    every four consecutive atoms have two coefficients; the mask is then smaller.

    References
    ----------
    .. [1] D. Makhov et al., "CoSpaDi: Compressing LLMs via Calibration-Guided Sparse Dictionary
       Learning", 2025. https://arxiv.org/abs/2509.22075
    """

    TYPE = "dictionary"
    SIZES = ("atoms", "nonzeros")
    PATTERNS = ("2:4",)
    SHARED_SIZE = "atoms"

    @classmethod
    def tensors(cls, d_out: int, d_in: int, config: ComponentConfig) -> TensorSpecs:
        """Return ``a.weight`` (unless shared), ``values``, and ``mask`` or ``index``."""
        atoms, nonzeros = config.sizes["atoms"], config.sizes["nonzeros"]
        if nonzeros > atoms:
            raise ValueError(
                f"nonzeros must be in [1, {atoms}], the number of atoms; got {nonzeros}"
            )
        if config.pattern is not None:
            needed = _two_of_four(d_out, d_in, nonzeros)
            if (atoms, nonzeros) != (needed["atoms"], needed["nonzeros"]):
                raise ValueError(
                    f"pattern 2:4 needs atoms {needed['atoms']} and nonzeros {needed['nonzeros']} "
                    f"for [{d_out}, {d_in}], got {atoms} and {nonzeros}"
                )
        specs = {"values": TensorSpec([d_out, nonzeros], role="values")}
        if config.shares is None:
            specs["a.weight"] = TensorSpec([atoms, d_in], role="matrix")
        return specs | _positions(d_out, atoms, nonzeros)

    @classmethod
    def sizes_at(
        cls, step: int, d_out: int, d_in: int, *, ratio: float = 2.0, pattern: str | None = None
    ) -> Sizes:
        """Return `step` coefficients per output and `ratio` times as many atoms.

        There are at most as many atoms as a complete basis has: larger dictionaries lose more at
        the same size. On SmolLM2-135M's gate projections at 0.8 of the bits, 598 atoms instead of
        576 increase the error by 34 to 37 %.
        """
        if pattern is not None:
            return _two_of_four(d_out, d_in, step)
        return {"atoms": min(round(ratio * step), d_out, d_in), "nonzeros": step}

    @classmethod
    def multiply_adds(cls, d_out: int, d_in: int, config: ComponentConfig) -> int:
        """Return those of the two products; the second one is computed with its zeros."""
        return config.sizes["atoms"] * (d_out + d_in)

    @classmethod
    def describe(cls, d_out: int, d_in: int, config: ComponentConfig) -> str:
        """Return the numbers of coefficients and atoms."""
        return f"{config.sizes['nonzeros']} of {config.sizes['atoms']} atoms"

    @staticmethod
    def encode(D: Tensor, S: Tensor, mask: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        """Convert a dictionary and its coefficients.

        Parameters
        ----------
        D : Tensor, shape [d_in, atoms]
        S : Tensor, shape [atoms, d_out]
        mask : Tensor, shape [atoms, d_out]
            True for stored coefficients, equally many in every column and at least one.

        Raises
        ------
        ValueError
            If the columns have different numbers of coefficients.
        """
        return {"a.weight": D.T, **_encode_coefficients(S.T, mask.T.contiguous())}

    @property
    def support(self) -> tuple[int, int]:
        """Of how many coefficients how many are stored: of those of an output, or two of four."""
        if self.config.pattern is not None:
            return 4, 2
        return self.config.sizes["atoms"], self.config.sizes["nonzeros"]

    def encode_entries(self, entries: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """Return ``values``, and ``mask`` or ``index``."""
        return _encode_coefficients(entries, mask)

    def multiply_entries(self, x: Tensor, entries: Tensor) -> Tensor:
        """Map ``x`` [..., d_in] to [..., d_out] with other coefficients [d_out, atoms]."""
        return nn.functional.linear(self.multiply_first(x), entries)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x`` [..., d_in] to [..., d_out], through the atoms or with the whole matrix.

        The whole matrix has fewer columns than the two products need together, which pays off for
        many tokens. Code that is compiled for any number of tokens uses the atoms, because a choice
        would compile it twice.
        """
        atoms, tokens = self.config.sizes["atoms"], x.numel() // self.d_in
        through_atoms = tokens * atoms * (self.d_in + self.d_out)
        many = through_atoms > (tokens + atoms) * self.d_in * self.d_out
        # Adapters and hooks for offloaded weights only act when the module is called.
        if is_plain(self.first) and is_certain(many):
            S = self.entries()  # [d_out, atoms]
            return nn.functional.linear(x, S @ self.first_matrix(S))
        p = self.multiply_first(x)  # [..., atoms]
        y = self.masked_product(p)
        return nn.functional.linear(p, self.entries()) if y is None else y

    def layout(self) -> tuple[int, int, int, int]:
        """Return how the coefficients are laid out."""
        return FREE, self.config.sizes["atoms"], 0, self.values_group()

    def matrix(self) -> Tensor:
        """Return the matrix [d_out, d_in] in float32."""
        S = self.entries().float()
        return S @ self.first_matrix(S)

    def problems(self) -> list[str]:
        """Return violated invariants of mask or indices."""
        found = super().problems()
        atoms, nonzeros = self.config.sizes["atoms"], self.config.sizes["nonzeros"]
        if "mask" in self._buffers:
            mask, pattern = self.get_buffer("mask"), self.config.pattern
            count = self.d_out * nonzeros
            return found + mask_problems(mask, atoms, count, per_row=nonzeros, pattern=pattern)
        index = self.get_buffer("index").long()
        ok = int(index.min()) >= 0 and int(index.max()) < atoms
        ok = ok and bool((index.diff(dim=1) > 0).all())
        return found + ([] if ok else [f"index is not ascending in [0, {atoms})"])

    def entries(self) -> Tensor:
        """Return ``S^T`` [d_out, atoms] with its zeros."""
        if self.entry is not None and self.entry.device == "cuda":
            stored = self.masked()
            if stored.mask.is_cuda and not needs_gradients(*self.parameters(recurse=False)):
                expanded: Tensor | None = run_or_restore(self, stored, run=expand)
                if expanded is not None:
                    return expanded
        values, atoms = self.stored_values(), self.config.sizes["atoms"]
        if "mask" in self._buffers:
            return self.at_places(values, atoms)
        zeros = values.new_zeros(self.d_out, atoms)
        return zeros.scatter(1, self.get_buffer("index").long(), values)


def _encode_coefficients(entries: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Return the tensors for the coefficients [d_out, atoms] that a mask selects."""
    d_out, atoms = mask.shape
    fewest, most = mask.sum(dim=1).aminmax()
    if not 0 < int(fewest) == int(most):
        raise ValueError(
            f"every output must have equally many coefficients, got {fewest} to {most}"
        )
    values = entries[mask].view(d_out, -1)  # [d_out, nonzeros]
    if "mask" in _positions(d_out, atoms, values.shape[1]):
        return {"values": values, "mask": pack_bits(mask)}
    return {"values": values, "index": mask.nonzero()[:, 1].view(d_out, -1).to(torch.int16)}


def _positions(d_out: int, atoms: int, nonzeros: int) -> TensorSpecs:
    """Return the smaller of a mask and a list of indices."""
    if 8 * packed_width(atoms) <= 16 * nonzeros or atoms > 2**15:
        return {"mask": TensorSpec([d_out, packed_width(atoms)], torch.uint8)}
    return {"index": TensorSpec([d_out, nonzeros], torch.int16)}


def _two_of_four(d_out: int, d_in: int, nonzeros: int) -> Sizes:
    """Return a multiple of four atoms and half as many coefficients, rounded up where possible."""
    largest = min(d_out, d_in) // 4
    if largest == 0:
        raise ValueError(f"pattern 2:4 needs four atoms or more, got a weight [{d_out}, {d_in}]")
    fours = min(max(-(-nonzeros // 2), 1), largest)
    return {"atoms": 4 * fours, "nonzeros": 2 * fours}
