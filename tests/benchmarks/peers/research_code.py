"""Running research code for older releases of transformers, without changing it."""

import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch


def import_folder(code: str) -> None:
    """Make the modules of the folder `code` importable; without a GPU, CUDA calls do nothing."""
    folder = Path(code).resolve()
    if not folder.is_dir():
        raise SystemExit(f"error: code={code}: not a folder; give a clone of the repository")
    sys.path.insert(0, str(folder))
    if not torch.cuda.is_available():
        torch.cuda.synchronize = lambda *_: None  # type: ignore[assignment]


def leave_out(*modules: str) -> None:
    """Replace modules that are imported but not used by empty ones."""
    for name in modules:
        sys.modules[name] = ModuleType(name)


def commit(code: str) -> str:
    """Return the commit of a clone, or the contents of the file COMMIT of a copy."""
    note = Path(code) / "COMMIT"
    if note.is_file():
        return note.read_text().strip()[:10]
    command = ["git", "-C", code, "rev-parse", "--short=10", "HEAD"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def give_positions(model: Any) -> None:
    """Let decoder layers be called alone without position embeddings, as until transformers 4.47.

    All windows have the same length and start at position 0.
    """

    def add(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if kwargs.get("position_embeddings") is None:
            hidden = args[0]
            places = torch.arange(hidden.shape[1], device=hidden.device)[None]
            kwargs["position_embeddings"] = model.model.rotary_emb(hidden, places)
        return args, kwargs

    for layer in model.model.layers:
        layer.register_forward_pre_hook(add, with_kwargs=True)
