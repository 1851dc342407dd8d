"""How fast a machine computes and writes, from measurements that take about two seconds."""

import hashlib
import math
import os
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lrc.compressors.io.finite import all_finite
from lrc.compressors.layers import QuantizationArgs
from lrc.compressors.solvers.linalg import tensor_cores, weighted_error
from lrc.compressors.solvers.quantized_matrix import round_to_nearest

EFFICIENCY = 0.75
"""Speed of the products in a model, relative to that of one large product."""
SECONDS = 0.15
"""For each measurement, of which the fastest run counts."""
MOST_RUNS, LEAST_RUNS = 50, 3
ROWS, WIDTH = {"cpu": 256, "cuda": 8192}, {"cpu": 768, "cuda": 4096}
"""Of the products that are timed."""
EIGENPROBLEMS = {"cpu": (128, 384), "cuda": (512, 2048)}
"""Sizes of the two eigenproblems that are timed; others follow from both."""
NUMBERS = {"cpu": 2**24, "cuda": 2**26}
"""Of the tensor whose elementwise operations are timed."""
WRITTEN = 2**24
"""Bytes of the file that is written to measure the disk, and read."""
ROUNDED = {"cpu": (768, 768), "cuda": (4096, 4096)}
"""Shape of the matrix that is rounded to nearest."""
DEQUANTIZED = (512, 1024)
"""Shape of the matrix that is dequantized, as from a GGUF file."""
_DISKS: dict[int, float] = {}
"""Bytes a second of the disks that were measured, by the number that the system gives them."""


@dataclass(frozen=True)
class MachineRates:
    """Speeds of a device, and of the disk that a run writes to."""

    products: float
    """Operations a second of products in float32, two per multiplication."""
    double_products: float
    """The same in float64."""
    model_products: float
    """The same in the dtype that whole models run in."""
    eigenproblems: tuple[tuple[int, float], tuple[int, float]]
    """Two sizes, smaller first, and the seconds of all eigenvectors in float64."""
    elementwise: float
    """Numbers a second of an elementwise operation in float32."""
    disk: float
    """Bytes a second, written and flushed."""
    rounding: float = math.inf
    """Numbers a second that are rounded to nearest in groups of 64, packed, and compared."""
    reading: float = math.inf
    """Bytes a second of bfloat16 weights that are read from the page cache and checked."""
    hashing: float = math.inf
    """Bytes a second of SHA-256."""

    def eigenvectors(self, size: int) -> float:
        """Return the seconds of a symmetric eigenproblem.

        From the measured ones by a power law. Beyond them the exponent is 3, that of the
        arithmetic, which is hidden by fixed costs at small sizes.

        >>> rates = MachineRates(1, 1, 1, ((100, 1.0), (200, 4.0)), 1, 1)
        >>> rates.eigenvectors(50), rates.eigenvectors(400)
        (0.25, 32.0)
        """
        (small, fast), (large, slow) = self.eigenproblems
        power = math.log(slow / fast) / math.log(large / small)
        return float(slow * (size / large) ** (3.0 if size > large else power))

    def shared(self, processes: int) -> "MachineRates":
        """Return the speeds of each of several processes that compute on the cores of this CPU.

        They are lower if there are more threads than cores.
        """
        (small, fast), (large, slow) = self.eigenproblems
        slower = max(1.0, processes * torch.get_num_threads() / (os.cpu_count() or 1))
        return MachineRates(
            self.products / slower,
            self.double_products / slower,
            self.model_products / slower,
            ((small, fast * slower), (large, slow * slower)),
            self.elementwise / slower,
            self.disk,
            self.rounding / slower,
            self.reading / slower,
            self.hashing / slower,
        )


def measure_rates(device: str, dtype: torch.dtype, folder: Path) -> MachineRates:
    """Measure a device and the disk of a folder, each device and each disk once per process.

    Parameters
    ----------
    device : str
    dtype : torch.dtype
        In which whole models run.
    folder : Path
        An existing folder.
    """
    disk = folder.stat().st_dev
    if disk not in _DISKS:
        _DISKS[disk] = WRITTEN / _writing_seconds(folder)
    return replace(_measure_device(device, dtype), disk=_DISKS[disk])


@cache
def _measure_device(device: str, dtype: torch.dtype) -> MachineRates:
    """Return the rates of a device, with zero for the disk."""
    kind = torch.device(device).type
    rows, width = ROWS[kind], WIDTH[kind]

    def products(dtype: torch.dtype) -> float:
        x = torch.ones(rows, width, dtype=dtype, device=device)
        W = torch.ones(width, width, dtype=dtype, device=device)
        return 2 * rows * width**2 / _seconds(lambda: x @ W.T, device)

    def elementwise() -> float:
        x = torch.ones(NUMBERS[kind], device=device)
        return x.numel() / _seconds(lambda: x.mul_(1), device)

    def eigenvectors(size: int) -> float:
        generator = torch.Generator(device).manual_seed(0)
        given: dict[str, Any] = {"dtype": torch.float64, "device": device, "generator": generator}
        x = torch.randn(size, size, **given)
        M = x @ x.T
        return _seconds(lambda: torch.linalg.eigh(M), device)

    def rounding() -> float:
        W = torch.randn(ROUNDED[kind], generator=torch.Generator().manual_seed(0))
        W, args = W.bfloat16().to(device), QuantizationArgs(bits=8, group_size=64)

        def run() -> None:
            found = round_to_nearest(W, args, dtype=W.dtype)
            found.encode("weight")
            weighted_error(W, found.weight())

        return W.numel() / _seconds(run, device)

    with tensor_cores(device):
        single = products(torch.float32)
    (small, large), zeros = EIGENPROBLEMS[kind], bytes(WRITTEN)
    rates = MachineRates(
        single,
        products(torch.float64),
        single if dtype == torch.float32 else products(dtype),
        ((small, eigenvectors(small)), (large, eigenvectors(large))),
        elementwise(),
        disk=0.0,
        rounding=rounding(),
        reading=_reading(),
        hashing=WRITTEN / _seconds(lambda: hashlib.sha256(zeros), "cpu"),
    )
    if kind == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)  # they are those of the run in its report
    return rates


def _reading() -> float:
    """Return the bytes a second that are read from the page cache and checked."""
    with tempfile.TemporaryFile() as file:
        file.write(bytes(WRITTEN))

        def read() -> None:
            file.seek(0)
            values = torch.frombuffer(bytearray(file.read()), dtype=torch.bfloat16)
            all_finite(values)

        return WRITTEN / _seconds(read, "cpu")


@cache
def dequantizing_rate(kind: str) -> float:
    """Return the numbers a second that are dequantized from a type of GGUF files."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize

    block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    rows, columns = DEQUANTIZED
    stored = np.zeros((rows, columns // block * block_bytes), np.uint8)

    def run() -> None:
        torch.from_numpy(dequantize(stored, GGMLQuantizationType[kind])).bfloat16()

    return rows * columns / _seconds(run, "cpu")


def _seconds(run: Callable[[], Any], device: str) -> float:
    """Return the shortest time of some runs; the first ones include what happens only once.

    On a CPU, time in which the system runs other processes is left out.
    """
    on_gpu = device.startswith("cuda")
    clock = time.perf_counter if on_gpu else time.thread_time
    times: list[float] = []
    while len(times) < LEAST_RUNS or (sum(times) < SECONDS and len(times) < MOST_RUNS):
        start = clock()
        run()
        if on_gpu:
            torch.cuda.synchronize(device)
        times.append(clock() - start)
    return min(times)


def _writing_seconds(folder: Path) -> float:
    """Return the time to write and flush a file; that of a fast disk if the folder is read-only."""
    start = time.perf_counter()
    with suppress(OSError), tempfile.TemporaryFile(dir=folder) as file:
        file.write(bytes(WRITTEN))
        file.flush()
        os.fsync(file.fileno())
        return time.perf_counter() - start
    return WRITTEN / 1e9
