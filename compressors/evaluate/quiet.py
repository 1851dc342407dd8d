"""Run lm-eval without its logs, progress bars, prints and side effects."""

import io
import logging
import os
import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from typing import Any


@contextmanager
def quiet_harness(report: Callable[[int, int], None] | None = None) -> Iterator[None]:
    """Silence lm-eval, and hear its progress instead.

    Parameters
    ----------
    report : callable, optional
        Called with (requests done, requests) where lm-eval would move a progress bar. What it
        raises ends the evaluation.
    """
    with ExitStack() as stack:
        # It prints "bootstrapping for stddev" to stdout, which carries results only.
        stack.enter_context(redirect_stdout(io.StringIO()))
        # A pool of workers would fork a process that may hold a GPU.
        stack.enter_context(_environment("DISABLE_MULTIPROC", "1"))
        for name in ("lm_eval", "transformers.tokenization_utils_base"):
            stack.enter_context(_level(logging.getLogger(name), logging.ERROR))
        import lm_eval.api.model
        import lm_eval.api.task
        import lm_eval.models.huggingface
        import tqdm

        silent, reporting = _bar(tqdm.tqdm, None), _bar(tqdm.tqdm, report)
        for module in (tqdm, lm_eval.api.task, lm_eval.api.model):
            stack.enter_context(_attribute(module, "tqdm", silent))
        stack.enter_context(_attribute(lm_eval.models.huggingface, "tqdm", reporting))
        yield


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the global generators, which lm-eval's tasks use, and restore them afterwards."""
    import numpy as np
    import torch

    python_state, numpy_state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        random.seed(seed)
        np.random.seed(seed % 2**32)  # numpy takes no larger one
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)


def _bar(base: Any, report: Callable[[int, int], None] | None) -> Any:
    """Make a progress bar that is never drawn; all that are made count as one."""
    done = 0

    class Bar(base):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "disable": True})

        def update(self, n: int = 1) -> None:
            nonlocal done
            done += n
            if report is not None:
                report(done, max(done, self.total or 0))

    return Bar


@contextmanager
def _attribute(holder: Any, name: str, value: Any) -> Iterator[None]:
    missing = object()
    old = getattr(holder, name, missing)
    if old is missing:  # a version of lm-eval that draws no bar there
        yield
        return
    setattr(holder, name, value)
    try:
        yield
    finally:
        setattr(holder, name, old)


@contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    old = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if old is None:
            del os.environ[name]
        else:
            os.environ[name] = old


@contextmanager
def _level(logger: logging.Logger, level: int) -> Iterator[None]:
    old = logger.level
    logger.setLevel(level)
    try:
        yield
    finally:
        logger.setLevel(old)
