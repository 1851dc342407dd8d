"""Trained parameters that are those of adapters, and the stored matrices that result."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from lrc.compressors.heal.adapted_matrices import AdaptedMatrix
from lrc.compressors.heal.adapters import Adapter
from lrc.compressors.heal.added_components import AddedComponent
from lrc.compressors.heal.parameters import TrainedParameters


class AdaptedParameters(TrainedParameters):
    """The numbers of adapters, in float32; everything stored is frozen while they are trained.

    Parameters
    ----------
    matrices : mapping of str to AdaptedMatrix
        By the names of their stored tensors in the checkpoint, or of the layers of components.
    adapters : mapping of str to Adapter
        Those of the matrices. They are attached.
    dtypes : mapping of str to torch.dtype
        Of the stored tensors.
    """

    def __init__(
        self,
        matrices: Mapping[str, AdaptedMatrix],
        adapters: Mapping[str, Adapter],
        dtypes: Mapping[str, torch.dtype],
    ) -> None:
        self._matrices, self._stored_dtypes = matrices, dtypes
        named: dict[str, nn.Parameter] = {}
        self._scales: dict[str, float] = {}
        known: set[int] = set()
        for name, adapter in adapters.items():
            adapter.to(matrices[name].numbers.device)
            scales = adapter.scales()
            for leaf, parameter in adapter.named_parameters():
                if id(parameter) not in known:  # adapters may share some
                    known.add(id(parameter))
                    named[f"{name}/{leaf}"] = parameter
                    self._scales[f"{name}/{leaf}"] = scales[leaf]
            matrices[name].attach(adapter)
        super().__init__(named, dict.fromkeys(named, torch.float32))

    @property
    def added(self) -> dict[str, int]:
        """Ranks of the low-rank components that are added, by the name of the layer."""
        return {
            name: matrix.rank
            for name, matrix in self._matrices.items()
            if isinstance(matrix, AddedComponent)
        }

    def scale(self, name: str) -> float:
        """Return the size to which the learning rate of a parameter is relative."""
        return self._scales[name]

    @contextmanager
    def as_stored(self) -> Iterator[None]:
        """Compute with the matrices as they would be stored, inside the context."""
        with ExitStack() as stack:
            for name, matrix in self._matrices.items():
                stack.enter_context(matrix.as_stored(self._stored_dtypes[name]))
            yield

    def encoded(self, rounded: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Merge the adapters with these values; return the stored tensors by name, on the CPU."""
        self.set_(rounded)
        return {
            f"{name}{suffix}": tensor.cpu()
            for name, matrix in self._matrices.items()
            for suffix, tensor in matrix.merge_(self._stored_dtypes[name]).items()
        }
