"""Deltas on a model in memory: several can be added, and one at a time is active."""

from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping

from lrc.compressors.deltas.delta_format import FILES, Delta, read_delta
from lrc.compressors.deltas.lora_folder import CONFIG, Lora, parse_config
from lrc.compressors.io.shortened import shortened
from lrc.compressors.io.weight_hash import WeightHash, dtype_name
from lrc.compressors.models.contents import renamed
from lrc.configs.errors import DeltaError

DEFAULT = "default"


class LoadedDeltas:
    """The deltas of a loaded base model.

    Weights are changed in place. Those of the base are kept in CPU memory while a delta is active,
    and restored bit by bit.

    Parameters
    ----------
    model : PreTrainedModel
        The base model. It must not be trained or cast to another dtype while a delta is active.

    Raises
    ------
    DeltaError
        If it is not a model of transformers.

    Examples
    --------
    >>> deltas = LoadedDeltas(model)                        # doctest: +SKIP
    >>> deltas.add("sst2", "deltas/sst2")                   # doctest: +SKIP
    >>> deltas.add("cola", "deltas/cola")                   # doctest: +SKIP
    >>> deltas.activate("sst2")                             # doctest: +SKIP
    >>> deltas.activate("cola")                             # doctest: +SKIP
    >>> deltas.deactivate()  # the base model               # doctest: +SKIP
    """

    def __init__(self, model: PreTrainedModel) -> None:
        if not isinstance(model, PreTrainedModel):
            raise DeltaError(
                f"model: must be a model of transformers without adapters, got "
                f"{type(model).__name__}; give the base model"
            )
        self.model = model
        self.active: str | None = None
        self._deltas: dict[str, Delta] = {}
        self._places: dict[str, Tensor] = {}
        self._base: dict[str, Tensor] = {}

    @property
    def names(self) -> list[str]:
        """Names of the deltas that have been added."""
        return list(self._deltas)

    def add(self, name: str, folder: str | Path) -> None:
        """Read a delta and check that it belongs to the model; it is not active yet.

        Raises
        ------
        DeltaError
            If the delta is damaged, was made for another model or dtype, or the name is taken.
        """
        if name in self._deltas:
            raise DeltaError(
                f"{name}: a delta of this name has been added already; choose another name"
            )
        delta = read_delta(Path(folder))
        places = self._find(delta)
        found = WeightHash()
        for key in sorted(delta.base_dtypes):
            value, dtype = self._value(key, places), getattr(torch, delta.base_dtypes[key])
            if not torch.equal(value.to(dtype).to(value.dtype), value):
                raise DeltaError(
                    f"{folder}: was made for a base model in {delta.base_dtypes[key]}, but {key} "
                    f"has been changed since it was loaded, or was loaded in "
                    f"{dtype_name(value.dtype)} from other files; load that base model",
                    code="other-base",
                )
            found.add(key, value.to(dtype))
        delta.refuse_other_base(type(self.model).__name__, found.hexdigest(), "changed_sha256")
        if delta.is_adapter:
            parse_config(delta.folder / FILES / CONFIG)
        self._places |= places
        self._deltas[name] = delta

    @torch.no_grad()
    def activate(self, name: str) -> None:
        """Replace the active delta, if there is one, by another.

        Raises
        ------
        DeltaError
            If no delta of this name has been added, or it is damaged.
        """
        if name not in self._deltas:
            raise DeltaError(
                f"{name}: must be the name of a delta that has been added, one of "
                f"{shortened(self.names, ', ') or 'none'}; add it first"
            )
        self.deactivate()
        delta = self._deltas[name]
        new = _adapted(delta) if delta.is_adapter else {}
        try:
            for key in delta.base_dtypes:
                place = self._places[key]
                before = place.detach().to("cpu", copy=True)
                change = new.get(key)
                if change is None:
                    after = delta.read(key, before)
                else:
                    exact = torch.promote_types(before.dtype, torch.float32)
                    after = before.to(exact) + change.to(exact)
                self._base[key] = before
                place.copy_(after)
        except BaseException:
            self.deactivate()
            raise
        self.active = name

    @torch.no_grad()
    def deactivate(self) -> None:
        """Restore the weights of the base model."""
        for key, tensor in self._base.items():
            self._places[key].copy_(tensor)
        self._base.clear()
        self.active = None

    def _value(self, key: str, places: dict[str, Tensor]) -> Tensor:
        """Return a tensor of the base, in the dtype of the model, also while a delta is active."""
        return self._base[key] if key in self._base else places[key].detach()

    def _find(self, delta: Delta) -> dict[str, Tensor]:
        """Return the parameters and buffers of the model by their names in the files."""
        state = self.model.state_dict(keep_vars=True)
        conversions = get_model_conversion_mapping(self.model)
        names = renamed(delta.base_dtypes, conversions, self.model)
        lost = [key for key, (name, changed) in names.items() if changed or name not in state]
        lost += [key for key, (name, _) in names.items() if name in state and state[name].is_meta]
        if lost:
            raise DeltaError(
                f"{type(self.model).__name__}: has no dense tensors {shortened(lost, ', ')} in "
                f"memory, which {delta.folder} changes; load its base model "
                f"({delta.description['base']['name']}) without quantization, offloading and "
                "adapters",
                code="other-base",
            )
        return {key: state[name] for key, (name, _) in names.items()}


def load_delta(model: PreTrainedModel, folder: str | Path, *, name: str = DEFAULT) -> LoadedDeltas:
    """Change a loaded base model into the tuned model of a delta.

    Parameters
    ----------
    model : PreTrainedModel
        The base model, changed in place.
    folder : str or Path
        Folder that ``lrc delta make`` wrote.
    name : str
        Name of the delta, for switching.

    Returns
    -------
    LoadedDeltas
        Adds more deltas, switches between them, and restores the base model.

    Raises
    ------
    DeltaError
        If the delta is damaged, or was made for another model or dtype.
    """
    deltas = LoadedDeltas(model)
    deltas.add(name, folder)
    deltas.activate(name)
    return deltas


def _adapted(delta: Delta) -> dict[str, Tensor]:
    """Return what an adapter adds to every matrix."""
    config = parse_config(delta.folder / FILES / CONFIG)
    lora = Lora(delta.folder, config, delta.read_adapter())
    return {f"{module}.weight": lora.change(module) for module in lora.modules}
