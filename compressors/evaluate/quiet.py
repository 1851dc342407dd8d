"""Run lm-eval without its logs, progress bars, prints and side effects."""

import io
import logging
import os
import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from typing import Any
from unittest import mock


@contextmanager
def quiet_harness(report: Callable[[int, int], None] | None = None) -> Iterator[None]:
    """Silence lm-eval.

    `report` is called with (requests done, requests) where lm-eval would advance a progress bar. It
    may raise to stop the evaluation.
    """
    with ExitStack() as stack:
        # It prints "bootstrapping for stddev" to stdout, which carries results only.
        stack.enter_context(redirect_stdout(io.StringIO()))
        # A pool of workers would fork a process that may hold a GPU.
        stack.enter_context(mock.patch.dict(os.environ, DISABLE_MULTIPROC="1"))
        for name in ("lm_eval", "transformers.tokenization_utils_base"):
            logger = logging.getLogger(name)
            stack.callback(logger.setLevel, logger.level)
            logger.setLevel(logging.ERROR)
        import lm_eval.api.model
        import lm_eval.api.task
        import lm_eval.models.huggingface
        import tqdm

        silent, reporting = _bar(tqdm.tqdm, None), _bar(tqdm.tqdm, report)
        for module, bar in (
            (tqdm, silent),
            (lm_eval.api.task, silent),
            (lm_eval.api.model, silent),
            (lm_eval.models.huggingface, reporting),
        ):
            stack.enter_context(mock.patch.object(module, "tqdm", bar, create=True))
        yield


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the global generators, which lm-eval's tasks use, and restore them afterwards."""
    import numpy as np
    import torch

    python_state, numpy_state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        random.seed(seed)
        np.random.seed(seed % 2**32)  # numpy accepts no larger one
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)


def _bar(base: Any, report: Callable[[int, int], None] | None) -> Any:
    """Return a class of progress bars that are not drawn; they share one count."""
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
