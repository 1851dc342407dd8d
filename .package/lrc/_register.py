"""Register lrc's loader with transformers, without importing transformers.

`import lrc` has to make `from_pretrained` work, and `lrc --help` has to answer at once; importing
transformers takes seconds. So a finder waits for the one module that holds the registry and
registers right after it has been executed. Where that module is loaded already, it registers now.
"""

import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

REGISTRY = "transformers.quantizers.auto"


class _AfterImport(MetaPathFinder):
    """Finds nothing itself; lets the others find `REGISTRY` and adds a step after its execution."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != REGISTRY:
            return None
        sys.meta_path.remove(self)  # once is enough, and find_spec below must not come back here
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _RegisterAfter(spec.loader)
        return spec


class _RegisterAfter(Loader):
    """The registry's own loader, and our registration as its last line."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        _register()


def _register() -> None:
    # Where that module is what imports the registry, it is not complete yet, and registers itself.
    from lrc.compressors.checkpoint import quantizer

    if hasattr(quantizer, "register"):
        quantizer.register()


def register_with_transformers() -> None:
    """Make `AutoModel*.from_pretrained` read lrc checkpoints, now or when transformers comes."""
    if REGISTRY in sys.modules:
        _register()
    elif not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport())
