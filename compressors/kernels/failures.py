"""Kernels that fail when they run: the layer goes on with its plain product."""

import logging
from collections.abc import Callable
from typing import Any

import torch

from lrc.compressors.kernels.fast_path import FastPath

log = logging.getLogger(__name__)
_reported: set[tuple[str, str]] = set()


def run_or_restore(module: FastPath, *args: Any, run: Callable[..., Any] | None = None) -> Any:
    """Return the product of the fast path of a module; None if it fails, and from then on.

    A kernel is compiled at its first call with a number of rows. That fails if it needs more
    registers or shared memory than the device has, or if a compiler is missing. The first failure
    of a kind is logged as a warning. Code compiled by torch raises the error instead.

    Parameters
    ----------
    module : FastPath
        With an entry. It has none, but a reason, after a failure.
    *args
        Of ``entry.run``.
    run : callable, optional
        Another kernel of the same entry.

    Raises
    ------
    torch.OutOfMemoryError
        The plain product would need more memory.
    """
    entry = module.entry
    assert entry is not None
    product = run or entry.run
    if torch.compiler.is_compiling():
        return product(*args)
    try:
        return product(*args)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # those of Triton, CUDA and compilers have no common class
        text = described(error)
        module.restore()
        module.reason = f"{entry.name}: failed at a call ({text})"
        kind = (entry.name, text)
        if kind not in _reported:
            _reported.add(kind)
            log.warning(
                "%s failed, and layers for which it fails are multiplied by plain PyTorch, which "
                "may be slower than the dense model: %s; update torch and Triton, or report this",
                entry.name,
                text,
            )
        return None


def described(error: BaseException) -> str:
    """Return the type and the first line of an error."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}".removesuffix(": ")
