"""Cheap substitutes for the weights of a model, with which its forward runs in seconds at any size.

The forward of the model class runs unchanged on real hidden states. Only products with large
matrices are replaced: a linear layer returns some of its inputs with random signs, and an embedding
a wave whose phase depends on the token. All other parameters get random values.
"""

import math
from collections.abc import Callable, Collection
from typing import Any
from zlib import crc32

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, linear
from torch.overrides import TorchFunctionMode

from lrc.compressors.models.architecture import Architecture
from lrc.compressors.models.weights import SkeletonFiller

MAX_VALUES = 2**24
"""Parameters with more values stay on the meta device; whatever computes with them fails."""
PERIOD = 2**16 + 1
"""Random values of matrices repeat after so many: drawing them all would take longer than computing
with them. A prime number, so that no two rows are equal."""


class SimulatedReader(SkeletonFiller):
    """Fills a skeleton with random values instead of reading its weights from files.

    Weights of linear layers and embeddings stay on the meta device; `SimulatedProducts` computes
    with them.

    Parameters
    ----------
    architecture : Architecture
    exact : collection of str
        Linears whose weights the model's code also reads by itself, so that they need values.
    seed_name : callable, optional
        Maps a parameter name to the name that seeds its random values, so that the same parameter
        of two models gets equal values.
    """

    def __init__(
        self,
        architecture: Architecture,
        exact: Collection[str] = (),
        seed_name: Callable[[str], str] = lambda name: name,
    ) -> None:
        super().__init__(architecture)
        self._seed_name = seed_name
        self._drawn: dict[int, Tensor] = {}
        self._large = {
            f"{name}.weight"
            for name, module in architecture.model.named_modules()
            if isinstance(module, nn.Linear | nn.Embedding) and name not in exact
        } | {name for name, p in self._parameters.items() if p.numel() > MAX_VALUES}

    def read(self, name: str, *, device: str | torch.device = "cpu") -> Tensor:
        """Return random values, a meta tensor instead of a large matrix, or a buffer as it is.

        A buffer that the model class computes can be a mask, of which random values would let
        tokens depend on later ones.

        Vectors are between 0.5 and 1.5, as norms are; the products of matrices keep the scale.
        """
        parameter = self._parameters[name]
        computed = not isinstance(parameter, nn.Parameter) and not parameter.is_meta
        if name in self._large or computed or not parameter.is_floating_point():
            return parameter.detach()
        count, seed = parameter.numel(), crc32(self._seed_name(name).encode())
        if parameter.ndim < 2:
            return torch.rand(count, generator=torch.Generator().manual_seed(seed)) + 0.5
        start = seed % PERIOD
        values = self._matrix_values(parameter.shape[-1], start + count)
        return values[start : start + count].view(parameter.shape)

    def _matrix_values(self, d_in: int, count: int) -> Tensor:
        """Return at least `count` random values with the scale of a matrix with `d_in` columns.

        Matrices are views of these, from different places on: copies would take most of the time.
        """
        values = self._drawn.get(d_in)
        if values is None or len(values) < count:
            once = torch.rand(PERIOD, generator=torch.Generator().manual_seed(0))
            values = ((2 * once - 1) / math.sqrt(d_in)).repeat(-(-count // PERIOD))
            self._drawn[d_in] = values
        return values

    def fill_(
        self,
        name: str,
        *,
        device: str | torch.device,
        dtype: torch.dtype,
        skip: Collection[str] = (),
    ) -> None:
        """Fill the module `name` with random values.

        Its parameters are marked, so that `SimulatedProducts` recognizes them.
        """
        super().fill_(name, device=device, dtype=dtype, skip=skip)
        for full, owner, leaf in self._entries(name, skip):
            stored = self._architecture.tied.get(full, full)
            getattr(owner, leaf).seed_name = self._seed_name(stored)


class SimulatedProducts(TorchFunctionMode):
    """Compute products with the meta weights of a `SimulatedReader`, within the context."""

    def __init__(self) -> None:
        super().__init__()
        self._drawn: dict[tuple[str, int, int], tuple[Tensor, Tensor]] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Replace `linear` and look-ups of rows; leave all other functions unchanged."""
        kwargs = kwargs or {}
        if func is linear and _simulated(args[1]):
            return self._linear(*args, **kwargs)
        if func is embedding and _simulated(args[1]):
            return self._embedding(*args[:2])
        if args and _simulated(args[0]):
            if func == Tensor.device.__get__:
                return torch.device("cpu")  # where the model computes
            if func is Tensor.__getitem__ and not isinstance(args[1], slice):
                rows, *columns = args[1] if isinstance(args[1], tuple) else (args[1],)
                if all(column == slice(None) for column in columns):
                    return self._embedding(torch.as_tensor(rows), args[0])
        result = func(*args, **kwargs)
        no_values = isinstance(result, Tensor) and result.is_meta and "device" not in kwargs
        if no_values and any(isinstance(each, Tensor) and not each.is_meta for each in args):
            raise NotImplementedError(f"{func.__name__} of a simulated weight")
        return result

    def _linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        d_out, d_in = weight.shape
        if x.shape[-1] != d_in:
            raise ValueError(f"an input {list(x.shape)} for a weight {[d_out, d_in]}")
        index, sign = self._draw(weight, d_out, d_in)
        y = x[..., index] * sign.to(x.dtype)
        return y if bias is None else y + bias

    def _embedding(self, ids: Tensor, weight: Tensor) -> Tensor:
        d_model = weight.shape[1]
        _, sign = self._draw(weight, d_model, d_model)
        return torch.sin((ids + 1)[..., None] * torch.linspace(0.1, 3.0, d_model)) * sign

    def _draw(self, weight: Any, d_out: int, d_in: int) -> tuple[Tensor, Tensor]:
        """Draw an input and a sign for every output, the same for every use of a weight."""
        key = weight.seed_name, d_out, d_in
        if key not in self._drawn:
            generator = _generator(weight.seed_name)
            index = torch.randint(d_in, (d_out,), generator=generator)
            sign = torch.randint(2, (d_out,), generator=generator) * 2.0 - 1.0
            self._drawn[key] = index, sign
        return self._drawn[key]


def _simulated(weight: Any) -> bool:
    """Whether a tensor is the weight of a simulated product."""
    return isinstance(weight, Tensor) and hasattr(weight, "seed_name") and weight.is_meta


def _generator(seed_name: str) -> torch.Generator:
    return torch.Generator().manual_seed(crc32(seed_name.encode()))
