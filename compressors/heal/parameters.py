"""Which stored numbers are trained, and their copies in float32.

What a stage may train follows from the role of a tensor in its component, so that a new component
type needs nothing here: masks, indices and integers are buffers, which training does not change.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType

import torch
from torch import Tensor, nn

from lrc.compressors.heal.factor_coordinates import Coordinates
from lrc.compressors.heal.moving_support import VALUES, MovingSupport
from lrc.compressors.heal.unpacked_factors import UnpackedFactor
from lrc.compressors.layers import CompressedLinear
from lrc.compressors.methods.base import LOW_RANK_TYPES

ALL = "all"
SCALE = "_scale"
SMALLEST_SCALE = 1 / 16  # of its first value: a scale of zero would be refused when loading


def parameter_roles(
    root: nn.Module, excluded: Iterable[nn.Module | None] = ()
) -> dict[str, frozenset[str]]:
    """Return for every parameter which values of the option `train` include it.

    ``factors`` are the low-rank components, as in WeLore [1]_; ``norms`` are norms and biases, as
    in PERP [2]_; ``scales`` are the scales of integers, as in EfficientQAT's second phase [3]_,
    with norms, and biases of quantized layers.

    Parameters
    ----------
    root : nn.Module
        A model or a decoder layer, with its compressed layers.
    excluded : iterable of nn.Module
        Modules whose parameters are never trained, such as the embedding.

    References
    ----------
    .. [1] A. Jaiswal et al., "From Low Rank Gradient Subspace Stabilization to Low-Rank Weights",
       2024. https://arxiv.org/abs/2407.11239
    .. [2] M. Zimmer et al., "PERP: Rethinking the Prune-Retrain Paradigm in the Era of LLMs", 2023.
       https://arxiv.org/abs/2312.15230
    .. [3] M. Chen et al., "EfficientQAT: Efficient Quantization-Aware Training for Large Language
       Models", 2024. https://arxiv.org/abs/2407.11062
    """
    found: dict[int, set[str]] = {}
    for module in root.modules():
        if isinstance(module, CompressedLinear):
            found |= _compressed_roles(module)
        elif isinstance(module, nn.Linear):
            if module.bias is not None:
                found.setdefault(id(module.bias), {ALL, "norms"})
            found.setdefault(id(module.weight), {ALL})
    fixed = {id(p) for module in excluded if module is not None for p in module.parameters()}
    fixed |= {id(p) for m in root.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    others = {1: {ALL, "norms", "scales"}}  # vectors outside linear layers are those of norms
    return {
        name: frozenset(found.get(id(p)) or others.get(p.ndim, {ALL}))
        for name, p in root.named_parameters()
        if id(p) not in fixed
    }


def _compressed_roles(layer: CompressedLinear) -> dict[int, set[str]]:
    found: dict[int, set[str]] = {}
    for component in layer.components:
        for leaf, parameter in component.named_parameters():
            roles = found.setdefault(id(parameter), {ALL})
            if component.TYPE in LOW_RANK_TYPES:
                roles.add("factors")
            if leaf.removesuffix(SCALE) == VALUES:
                roles.add("values")
            if leaf.endswith(SCALE):
                roles.add("scales")
    if layer.bias is not None:
        quantized = layer.config.quantization is not None
        found[id(layer.bias)] = {ALL, "norms"} | ({"scales"} if quantized else set())
    return found


class TrainedParameters:
    """Parameters that are trained in float32, with the dtypes in which they are stored.

    A model may compute with 16-bit parameters. These are then copies of the ones that are trained,
    and their gradients are added to those of the latter by `collect_gradients_`.

    Parameters
    ----------
    parameters : mapping of str to nn.Parameter
        Those of the model, by their names in the checkpoint. They require gradients from now on.
    dtypes : mapping of str to torch.dtype
        Of the stored tensors, whose values the parameters have.
    forms : mapping of str to MovingSupport or UnpackedFactor
        Of the parameters that are stored in another form: only the largest entries, or integers.
    coordinates : mapping of str to Coordinates
        In which parameters are trained, see `factor_coordinates`; others are trained as they are.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        dtypes: Mapping[str, torch.dtype],
        forms: Mapping[str, MovingSupport | UnpackedFactor] = MappingProxyType({}),
        coordinates: Mapping[str, Coordinates] = MappingProxyType({}),
    ) -> None:
        self._forms, self.coordinates = forms, coordinates
        self.parameters: dict[str, Tensor] = {}
        """In float32, or float64."""
        self._copies: list[tuple[Tensor, Tensor]] = []
        """Trained parameters and their copies in the model."""
        for name, parameter in parameters.items():
            parameter.requires_grad_(True)
            self.parameters[name] = parameter
            if parameter.dtype.itemsize < torch.float32.itemsize:
                trained = nn.Parameter(parameter.detach().float(), requires_grad=False)
                self.parameters[name] = trained
                self._copies.append((trained, parameter))
        self._dtypes = dtypes
        self.start = self.rounded()
        self._limits = {
            name: (SMALLEST_SCALE * start.float().abs(), start.float().sign())
            for name, start in self.start.items()
            if name.endswith(SCALE)
        }

    @property
    def added(self) -> dict[str, int]:
        """Ranks of the low-rank components that are added, by the name of the layer: none."""
        return {}

    @property
    def count(self) -> int:
        """How many numbers are trained."""
        return sum(parameter.numel() for parameter in self.parameters.values())

    def rounded(self) -> dict[str, Tensor]:
        """Return the values as they would be stored: rounded, or zero outside of a support."""
        found = {}
        for name, parameter in self.parameters.items():
            form = self._forms.get(name)
            exact = parameter.detach() if form is None else form.selected()
            found[name] = exact.to(self._dtypes[name], copy=True)
        return found

    def encoded(self, rounded: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors of the checkpoint for what `rounded` returned, on the CPU."""
        found: dict[str, Tensor] = {}
        for name, tensor in rounded.items():
            form = self._forms.get(name)
            tensors = {name: tensor}
            if form is not None:
                prefix = name.removesuffix(VALUES)
                tensors = {f"{prefix}{key}": each for key, each in form.encode(tensor).items()}
            found |= {key: each.cpu() for key, each in tensors.items()}
        return found

    def moved(self, rounded: Mapping[str, Tensor]) -> int | None:
        """Return how many values have other places than at first; None if places are fixed."""
        moving = [name for name, form in self._forms.items() if form.moves]
        if not moving:
            return None
        return sum(int(((rounded[name] != 0) & (self.start[name] == 0)).sum()) for name in moving)

    @torch.no_grad()
    def set_(self, values: Mapping[str, Tensor]) -> None:
        """Replace the values."""
        for name, parameter in self.parameters.items():
            parameter.copy_(values[name])
        self._update_model_()

    def clear_copies_(self) -> None:
        """Remove the gradients of copies, before those of a batch are calculated."""
        for _, used in self._copies:
            used.grad = None

    @torch.no_grad()
    def collect_gradients_(self) -> None:
        """Add the gradients of copies to those of the trained parameters, and remove them."""
        for trained, used in self._copies:
            if used.grad is not None:
                assert trained.grad is not None
                trained.grad.add_(used.grad)
        self.clear_copies_()

    def scale(self, name: str) -> float:
        """Return the size to which the learning rate of a parameter is relative."""
        if name in self.coordinates:
            return self.coordinates[name].size
        return float(self.parameters[name].detach().square().mean().sqrt())

    @contextmanager
    def as_stored(self) -> Iterator[None]:
        """Compute with the values as they would be stored, inside the context."""
        exact = {name: p.detach().clone() for name, p in self.parameters.items()}
        self.set_(self.rounded())
        try:
            yield
        finally:
            self.set_(exact)

    @torch.no_grad()
    def limit_(self) -> None:
        """Keep scales away from zero, and their signs; compute with the changed values."""
        for name, (smallest, sign) in self._limits.items():
            parameter = self.parameters[name]
            parameter.copy_(torch.maximum(parameter * sign, smallest) * sign)
        self._update_model_()

    def _update_model_(self) -> None:
        """Let the model compute with the present values."""
        for form in self._forms.values():
            form.select_()
        if self._copies:
            trained, used = (list(each) for each in zip(*self._copies, strict=True))
            torch._foreach_copy_(used, trained)
