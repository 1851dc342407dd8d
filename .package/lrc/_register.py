"""Register lrc with libraries that load its checkpoints, without importing them.

`import lrc` has to make `from_pretrained` and adapters of PEFT work, and `lrc --help` has to answer
at once; importing transformers takes seconds. So a finder waits for the modules that hold the
registries and registers right after they have been executed. Where they are loaded already, it
registers now.
"""

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

REGISTRIES = {
    "transformers.quantizers.auto": "lrc.compressors.checkpoint.quantizer",
    "peft.tuners.lora": "lrc.compressors.integrations.peft_lora",
    "peft.utils.transformers_weight_conversion": "lrc.compressors.integrations.peft_experts",
}
"""Module to wait for -> module whose function `register` is called then."""


class _AfterImport(MetaPathFinder):
    """Finds nothing itself; lets the others find a registry and adds a step after its execution."""

    def __init__(self, registry: str) -> None:
        self.registry = registry

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != self.registry:
            return None
        sys.meta_path.remove(self)  # once is enough, and find_spec below must not come back here
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _RegisterAfter(spec.loader, name)
        return spec


class _RegisterAfter(Loader):
    """The registry's own loader, and our registration as its last line."""

    def __init__(self, loader: Loader, registry: str) -> None:
        self._loader, self._registry = loader, registry

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        _register(self._registry)


def _register(registry: str) -> None:
    # Where our module is what imports the registry, it is not complete yet, and registers itself.
    ours = importlib.import_module(REGISTRIES[registry])
    if hasattr(ours, "register"):
        ours.register()


def register_loaders() -> None:
    """Make transformers and PEFT read lrc checkpoints, now or when they are imported."""
    for registry in REGISTRIES:
        if registry in sys.modules:
            _register(registry)
        elif not any(getattr(finder, "registry", None) == registry for finder in sys.meta_path):
            sys.meta_path.insert(0, _AfterImport(registry))
