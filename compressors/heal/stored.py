"""The stored tensors of a compressed model, and modules that hold them to be trained."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lrc.compressors.checkpoint.quantizer import replace_layers
from lrc.compressors.compress.layerwise import layer_file
from lrc.compressors.heal.trained_files import trained_tensors
from lrc.compressors.layers import CompressedLinear, layer_tensors, sentinel
from lrc.compressors.models.weights import WeightReader
from lrc.compressors.planning.plan import Plan
from lrc.compressors.session import Session


class StoredModel:
    """Reads tensors as a checkpoint would have them before a stage.

    Parameters
    ----------
    session : Session
        Of a run whose weights are compressed.
    plan : Plan
        With results.
    stage : int
        Index of the stage that reads.
    """

    def __init__(self, session: Session, plan: Plan, stage: int) -> None:
        self._journal = session.journal
        self._reader: WeightReader = session.models.reader
        self.modules = plan.modules()
        owners = plan.owner_layers()
        self._origin: dict[str, Callable[[], Tensor]] = {}
        for name, config in self.modules.items():
            for leaf in layer_tensors(config):
                if leaf != "weight":  # the sentinel
                    self._keep(f"{name}.{leaf}", owners[name])
        self._in_modules = {*self._origin}
        for name, result in plan.results.items():
            if result.refit and name not in self.modules:
                self._keep(f"{name}.weight", owners[name])
        self._origin |= trained_tensors(session.journal, plan, before=stage)

    def _keep(self, name: str, layer: int) -> None:
        self._origin[name] = lambda: self._journal.read_tensor(layer_file(layer), name)

    def read(self, name: str) -> Tensor:
        """Return a stored tensor by its name in the checkpoint."""
        origin = self._origin.get(name)
        return self._reader.read(name) if origin is None else origin()

    def source(self, name: str) -> Tensor:
        """Return the weight of a layer before it was compressed, after slicing."""
        return self._reader.read(f"{name}.weight")

    def dtypes(self, names: Iterable[str]) -> dict[str, torch.dtype]:
        """Return the dtypes in which tensors are stored."""
        return {name: self.read(name).dtype for name in names}

    @torch.no_grad()
    def fill_(self, name: str, layer: CompressedLinear) -> None:
        """Give a compressed layer its stored tensors; floating-point ones keep its own dtype."""
        tensors = {key: self.read(f"{name}.{key}") for key in layer.state_dict() if key != "weight"}
        layer.load_state_dict({**tensors, "weight": sentinel()})

    @torch.no_grad()
    def compress_(self, model: Any) -> None:
        """Turn a loaded model into the compressed one in its dtype, with gradients switched off."""
        replace_layers(model, self.modules)
        for name in self.modules:
            self.fill_(name, model.get_submodule(name))
        parameters = dict(model.named_parameters())
        for name in self._origin:
            if name in parameters and name not in self._in_modules:
                parameters[name].copy_(self.read(name))
        model.requires_grad_(False)

    @torch.no_grad()
    def compress_layer_(self, layer: nn.Module, prefix: str) -> None:
        """Turn a copy of a dense decoder layer in float32 into the compressed one.

        `prefix` is the name of the layer. Factors that another layer stores are read from there and
        not registered.
        """
        for name, config in self.modules.items():
            local = name.removeprefix(f"{prefix}.")
            if local == name:
                continue
            compressed = CompressedLinear.replacing(layer.get_submodule(local), config)
            self.fill_(name, compressed)
            for component in compressed.components:
                if component.config.shares is not None:
                    self._share(component, component.config.shares)
            layer.set_submodule(local, compressed)
        known = dict(layer.named_parameters())
        for name in self._origin:
            local = name.removeprefix(f"{prefix}.")
            if local != name and local in known and name not in self._in_modules:
                known[local].copy_(self.read(name))
        layer.requires_grad_(False)

    def _share(self, component: Any, owner: str) -> None:
        like = next(component.parameters())
        config = self.modules[owner]
        stored = CompressedLinear(config, device=like.device, dtype=like.dtype)
        self.fill_(owner, stored)
        stored.requires_grad_(False)
        component.use_factor_of(stored.get_submodule(component.TYPE))
