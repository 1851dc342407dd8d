"""Check and time the products with packed integers on a GPU, against cuBLAS in bfloat16.

Needs torch and Triton, not lrc::

    python tests/benchmarks/kernels.py
    python tests/benchmarks/kernels.py --sweep --schemes int4-g64,int3-g64 --rows 1

Every time is the median over replays of a CUDA graph that multiplies by different matrices in turn,
more than fit into the cache. Columns are the speed relative to cuBLAS: ``v`` for the kernel of
threads, ``t`` for tensor cores on packed tiles, ``m`` for a temporary matrix and cuBLAS, and
``torch`` for torch's own int4 kernel. A star marks what `product` chooses.
"""

import argparse
import importlib.util
import itertools
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

SHAPES = "4096x4096,1024x4096,14336x4096,4096x14336,576x576,1536x576,576x1536"
ROWS = "1,4,16,64,1024"
SCHEMES = "int4-g64,int8,int3-g64"
CACHE = 256 << 20
"""Bytes of all matrices that are used in turn: several times an L2 cache of 50 MiB."""
EVERY = tuple(
    f"int{bits}{group}{zero}"
    for bits in range(2, 9)
    for group in ("", "-g64", "-g32", "-g20")
    for zero in ("", "-asymmetric")
)
"""Schemes of ``--check-all``, which compiles for minutes."""
MOST = 256
"""Matrices at most, so that recording stays short for small ones."""


def load_kernels() -> Any:
    """Import the kernels by their path, because importing lrc needs its dependencies."""
    path = Path(__file__).parents[2] / "compressors/kernels/packed_linear_triton.py"
    spec = importlib.util.spec_from_file_location("packed_linear_triton", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look it up
    spec.loader.exec_module(module)
    return module


class Matrix:
    """Random packed integers."""

    def __init__(self, scheme: str, d_out: int, d_in: int, device: str) -> None:
        found = re.fullmatch(r"int(\d)(?:-g(\d+))?(-asymmetric)?", scheme)
        assert found is not None, f"cannot read {scheme!r}"
        self.bits, self.columns = int(found[1]), d_in
        self.groups = d_in // int(found[2]) if found[2] else 1
        self.packed = self._words(d_out, -(-d_in * self.bits // 32), device)
        # Triton's interpreter cannot multiply bfloat16 matrices.
        dtype = torch.bfloat16 if device == "cuda" else torch.float16
        self.scale = torch.rand(d_out, self.groups, device=device).add_(0.5).div_(100).to(dtype)
        self.zero = None
        if found[3]:
            self.zero = self._words(-(-d_out * self.bits // 32), self.groups, device)

    @staticmethod
    def _words(rows: int, columns: int, device: str) -> Tensor:
        shape = rows, columns
        return torch.randint(-(2**31), 2**31, shape, dtype=torch.int32, device=device)

    @property
    def stored(self) -> tuple[Tensor, Tensor, Tensor | None, int]:
        """The arguments of the kernels after the input."""
        return self.packed, self.scale, self.zero, self.bits

    def exact(self) -> Tensor:
        """Return the matrix in float64."""
        steps = unpack(self.packed, self.bits, self.columns)
        if self.zero is not None:
            zeros = unpack(self.zero.T, self.bits, len(steps)).T
            steps = steps - zeros.repeat_interleave(self.columns // self.groups, dim=1)
        return steps * self.scale.double().repeat_interleave(self.columns // self.groups, dim=1)

    def bytes(self) -> int:
        """Return the stored bytes."""
        return 4 * self.packed.numel() + 2 * self.scale.numel()


def unpack(words: Tensor, bits: int, columns: int) -> Tensor:
    """Return signed codes [rows, columns] in float64, one column after the other."""
    wide = torch.nn.functional.pad(words.long() & 0xFFFFFFFF, (0, 1))
    bit = torch.arange(columns, device=words.device) * bits
    pairs = wide[:, bit // 32] | (wide[:, bit // 32 + 1] << 32)
    return ((pairs >> (bit % 32)) & ((1 << bits) - 1)).double() - (1 << (bits - 1))


def check(kernels: Any, device: str, schemes: Iterable[str]) -> None:
    """Compare all kernels with float64 on matrices of awkward shapes."""
    products = {
        "vector": (kernels.vector_product, (1, 4)),
        "tile": (kernels.tile_product, (1, 17, 70)),
        "matrix": (kernels.matrix_product, (17,)),
    }
    worst, count = 0.0, 0
    for scheme, (d_out, d_in) in itertools.product(schemes, ((37, 320), (576, 960))):
        matrix = Matrix(scheme, d_out, d_in, device)
        exact = matrix.exact()
        for name, (product, rows) in products.items():
            for n in rows:
                x = (torch.randn(n, d_in, device=device) + 0.5).to(matrix.scale.dtype)
                expected = x.double() @ exact.T
                plain = (x @ exact.to(x.dtype).T).double()
                y = product(x, *matrix.stored).double()
                rounding = torch.finfo(x.dtype).eps * expected.abs().max()
                allowed = max((plain - expected).abs().max(), rounding)
                error = float((y - expected).abs().max() / allowed)
                worst, count = max(worst, error), count + 1
                assert error < 3, f"{name} {scheme} {d_out}x{d_in} {n}: {error}"
    print(f"{count} products are right; largest error {worst:.2f} of the plain product's")


def timed(step: Callable[[int], object], count: int, replays: int = 15) -> float:
    """Return microseconds per call of a step over matrices 0 to count - 1, in one CUDA graph."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step(0)
        step(count - 1)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for i in range(count):
            step(i)
    graph.replay()
    times = []
    for _ in range(replays):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return 1000 * median(times) / count


def copies(size: int) -> int:
    """Return how many matrices of `size` bytes exceed the cache."""
    return min(MOST, max(3, -(-CACHE // size)))


def dense_time(d_out: int, d_in: int, rows: int) -> float:
    """Return microseconds of cuBLAS."""
    matrices = torch.randn(copies(2 * d_out * d_in), d_out, d_in, device="cuda").bfloat16()
    x = torch.randn(rows, d_in, device="cuda").bfloat16()
    return timed(lambda i: torch.mm(x, matrices[i].T), len(matrices))


def torch_time(d_out: int, d_in: int, rows: int, group: int) -> float | None:
    """Return microseconds of torch's own int4 kernel; None if it does not fit."""
    if d_in % 64 or d_out % 8 or rows > 64:
        return None
    count = copies(d_out * d_in // 2)
    codes = torch.randint(0, 256, (d_out, d_in // 2), device="cuda", dtype=torch.uint8)
    packed = torch.ops.aten._convert_weight_to_int4pack(codes, 4)
    all_packed = [packed.clone() for _ in range(count)]
    scales = torch.ones(d_in // group, d_out, 2, device="cuda").bfloat16()
    x = torch.randn(rows, d_in, device="cuda").bfloat16()
    product = torch.ops.aten._weight_int4pack_mm
    return timed(lambda i: product(x, all_packed[i], group, scales), count)


def table(kernels: Any, shapes: list[tuple[int, int]], rows: list[int], schemes: list[str]) -> None:
    """Print the speed of every kernel relative to cuBLAS."""
    print(f"{'':16} {'dense us':>9}" + "".join(f"  {scheme:>26}" for scheme in schemes))
    for (d_out, d_in), n in itertools.product(shapes, rows):
        dense = dense_time(d_out, d_in, n)
        x = torch.randn(n, d_in, device="cuda").bfloat16()
        cells = []
        for scheme in schemes:
            size = Matrix(scheme, d_out, d_in, "cuda").bytes()
            matrices = [Matrix(scheme, d_out, d_in, "cuda") for _ in range(copies(size))]
            limits = {"v": kernels.VECTOR_ROWS, "t": kernels.TILE_ROWS, "m": sys.maxsize}
            chosen = next(key for key, limit in limits.items() if n <= limit)
            parts = []
            for key, product, most in (
                ("v", kernels.vector_product, 4),
                ("t", kernels.tile_product, 1024),
                ("m", kernels.matrix_product, sys.maxsize),
            ):
                if n <= most and not (key == "m" and n == 1):
                    us = _time(product, x, matrices)
                    parts.append(f"{key}{'*' if key == chosen else ''}{dense / us:.2f}")
            if scheme == "int4-g64" and (own := torch_time(d_out, d_in, n, 64)):
                parts.append(f"torch {dense / own:.2f}")
            cells.append(" ".join(parts))
        row = "".join(f"  {cell:>26}" for cell in cells)
        print(f"{f'{d_out}x{d_in} {n}':16} {dense:9.1f}{row}", flush=True)


def _time(product: Callable[..., Tensor], x: Tensor, matrices: list[Matrix]) -> float:
    return timed(lambda i: product(x, *matrices[i].stored), len(matrices))


def configurations(kernels: Any, rows: int) -> Iterator[tuple[Callable[..., Tensor], Any]]:
    """Yield kernels and their sizes for a number of rows."""
    if rows <= 4:
        for repeats, warps in itertools.product((1, 2, 4, 8), (1, 2, 4, 8, 16)):
            yield kernels.vector_product, kernels.VectorConfig(repeats, warps)
    if rows > 2:
        for block_n, block_k, warps, stages in itertools.product(
            (16, 32, 64, 128), (32, 64, 128), (2, 4, 8), (1, 3, 4)
        ):
            yield kernels.tile_product, kernels.TileConfig(block_n, block_k, warps, stages)


def sweep(
    kernels: Any,
    shapes: list[tuple[int, int]],
    rows: list[int],
    schemes: list[str],
    seconds: float,
) -> None:
    """Print the three best configurations of every shape, with what the heuristic achieves."""
    end = time.monotonic() + seconds
    for scheme, n, (d_out, d_in) in itertools.product(schemes, rows, shapes):
        dense = dense_time(d_out, d_in, n)
        x = torch.randn(n, d_in, device="cuda").bfloat16()
        size = Matrix(scheme, d_out, d_in, "cuda").bytes()
        matrices = [Matrix(scheme, d_out, d_in, "cuda") for _ in range(copies(size))]
        product = kernels.vector_product if n <= 4 else kernels.tile_product
        now = _time(product, x, matrices)
        found = []
        for each, config in configurations(kernels, n):
            if time.monotonic() > end:
                print("the time is over")
                return
            call = _with_config(each, config)
            try:
                found.append((_time(call, x, matrices), str(config)))
            except Exception as error:  # too much shared memory, for example
                print(f"  {config}: {type(error).__name__}: {str(error)[:80]}")
        best = "; ".join(f"{dense / us:.2f}x {name}" for us, name in sorted(found)[:3])
        print(f"{scheme} {d_out}x{d_in} {n}: heuristic {dense / now:.2f}x; {best}", flush=True)


def _with_config(product: Callable[..., Tensor], config: Any) -> Callable[..., Tensor]:
    return lambda *given: product(*given, config=config)


def main() -> None:
    """Run the checks, then the table or the sweep."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", default=SHAPES, help="d_out x d_in")
    parser.add_argument("--rows", default=ROWS)
    parser.add_argument("--schemes", default=SCHEMES)
    parser.add_argument("--sweep", action="store_true", help="print the best block sizes instead")
    parser.add_argument("--seconds", type=float, default=480, help="longest time of a sweep")
    parser.add_argument("--check-all", action="store_true", help="check all schemes, then stop")
    parser.add_argument("--no-check", action="store_true")
    given = parser.parse_args()
    kernels = load_kernels()
    torch.manual_seed(0)
    gpu, schemes = torch.cuda.is_available(), given.schemes.split(",")
    if gpu:
        print(torch.cuda.get_device_name(), "torch", torch.__version__, flush=True)
    if not given.no_check:
        both = [f"{scheme}{zero}" for scheme in schemes for zero in ("", "-asymmetric")]
        check(kernels, "cuda" if gpu else "cpu", EVERY if given.check_all else both)
    if given.check_all or not gpu:  # without one, set TRITON_INTERPRET=1
        return
    shapes = [tuple(map(int, shape.split("x"))) for shape in given.shapes.split(",")]
    rows = [*map(int, given.rows.split(","))]
    if given.sweep:
        sweep(kernels, shapes, rows, schemes, given.seconds)
    else:
        table(kernels, shapes, rows, schemes)


if __name__ == "__main__":
    main()
