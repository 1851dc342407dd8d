"""The memory of solvers is that of the tensors that are alive at the same time."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lrc.compressors.estimates import solver_memory
from lrc.compressors.estimates.solver_memory import DOUBLE, STACK_MATRICES, STACK_SQUARES
from lrc.compressors.layers import QuantizationArgs
from lrc.compressors.methods.fixed_size import Pruning
from lrc.compressors.solvers import error_compensation, sampled_curves
from lrc.compressors.solvers.column_quantizer import ColumnQuantizer
from lrc.compressors.solvers.error_compensation import refit_target
from lrc.compressors.solvers.gptq import gptq_together
from lrc.compressors.solvers.moments import Moment, Statistics


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that exist at once."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._known: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for each in tree_leaves((args, kwargs, out)):
            if isinstance(each, Tensor):
                storage = each.untyped_storage()
                self._known[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        if sum(size for _, size in self._known.values()) > self.peak:
            expired = [key for key, (found, _) in self._known.items() if found.expired()]
            for key in expired:
                del self._known[key]
            self.peak = max(self.peak, sum(size for _, size in self._known.values()))
        return out


def live_bytes(run: Callable[[], object]) -> int:
    """Return the largest number of bytes that a function uses, with its arguments."""
    with LiveBytes() as live:
        run()
    return live.peak


def moment(size: int) -> Moment:
    x = torch.randn(2 * size, size, generator=torch.Generator().manual_seed(size))
    return Moment.of(x.T @ x)


@pytest.mark.parametrize("shape", [(160, 320), (320, 160), (192, 192)], ids=str)
@pytest.mark.parametrize(
    ("count", "sampled"),
    [(0, False), (1, False), (1, True), (2, False)],
    ids=["solution", "curve", "sampled curve", "curves of two"],
)
def test_a_mask_search_takes_the_estimated_memory(
    shape: tuple[int, int], count: int, sampled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    d_out, d_in = shape
    if sampled:
        monkeypatch.setattr(sampled_curves, "SAMPLED_FROM", 0)
    part = Pruning(frozenset({"inputs", "gradients"}), "")
    weights = [torch.randn(shape).bfloat16() for _ in range(max(count, 1))]
    known = [Statistics(100, moment(d_in), moment(d_out)) for _ in weights]
    sizes = [{"nonzeros": d_out * d_in * n // 8} for n in ((7, 6, 4, 2) if sampled else (4,))]
    assert bool(sampled_curves.sampled_rows(*shape, len(sizes))) == sampled
    options = {"damp": 1e-4, "gradient_damp": 1e-2}
    if count:
        found = live_bytes(lambda: part.squared_errors_of(weights, known, sizes, **options))
    else:
        found = live_bytes(lambda: part.solve(weights[0], known[0], sizes[0], **options))
    monkeypatch.setattr(solver_memory, "numbers", lambda task: d_out * d_in)
    given = len(weights) * (2 * d_out * d_in + 4 * (d_in**2 + d_out**2))
    work: Any = type("Work", (), {"kind": "cpu"})
    task: Any = None
    expected = given + solver_memory._fixed_size(
        work, task, part, max(count, 1), (d_in**2, d_out**2)
    )
    assert found == pytest.approx(expected, rel=0.1)


def test_a_stack_of_quantized_matrices_takes_the_estimated_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = ColumnQuantizer.__init__

    def as_on_a_gpu(self: ColumnQuantizer, *arguments: Any) -> None:
        made(self, *arguments)
        self.dtype = torch.float32

    monkeypatch.setattr(ColumnQuantizer, "__init__", as_on_a_gpu)
    rows, columns = 128, 384
    weights = [torch.randn(rows, columns).bfloat16() for _ in range(2)]
    moments = [moment(columns).full for _ in weights]
    args = QuantizationArgs(bits=4, group_size=64)
    found = live_bytes(
        lambda: gptq_together(weights, moments, args, dtype=torch.bfloat16, passes=1)  # type: ignore[arg-type]
    )
    given = 2 * rows * columns + 4 * columns**2
    own = DOUBLE * (STACK_MATRICES * rows * columns + STACK_SQUARES * columns**2)
    assert found == pytest.approx(2 * (given + own), rel=0.1)


def test_a_refit_takes_two_squares_and_two_matrices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(error_compensation, "COLUMNS", 64)  # as few as of a large matrix
    d_out, d_in = 64, 512
    H, cross, deficit = torch.eye(d_in), torch.zeros(d_in, d_in), torch.zeros(d_out, d_in)
    W = torch.randn(d_out, d_in).bfloat16()
    found = live_bytes(
        lambda: refit_target(W, H, cross, mix=0.5, damp=0.01, deficit=deficit, residual=0.5)
    )
    given = 2 * 4 * d_in**2 + 4 * d_out * d_in + 2 * d_out * d_in
    assert found == pytest.approx(given + DOUBLE * 2 * (d_in**2 + d_out * d_in), rel=0.1)
