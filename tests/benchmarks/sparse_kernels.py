"""Check and time the products with sparse matrices on a GPU, against cuBLAS in bfloat16.

Needs torch and Triton, not lrc, and less than four minutes::

    python tests/benchmarks/sparse_kernels.py [--json FILE] [--shapes 4096x4096] [--rows 1,16]

Every time is the median over replays of a CUDA graph that multiplies by different matrices in turn,
more than fit into the cache. A column is the speed relative to cuBLAS, and the best configuration:
rows and warps of a program. `permute` is the kernel for n of 8, `few` multiplies with
multiply-adds, `dot` with tensor cores, `expand` writes a dense matrix for cuBLAS, `run` is what
production code chooses. Kernels are compiled by several processes first; Triton keeps them in its
cache.
"""

import argparse
import importlib
import json
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

SHAPES = "4096x4096,14336x4096,4096x14336,576x576,1536x576,576x1536"
CACHE = 240 << 20
"""Bytes of all matrices that are used in turn: several times an L2 cache of 50 to 60 MiB."""
MOST = 48
"""Matrices at most, so that recording stays short for small ones."""
FEW = [(2, 4), (4, 4), (2, 2), (1, 4), (4, 2), (4, 8), (8, 4), (8, 2)]
DOT = [(16, 32, 4), (16, 64, 4), (32, 32, 4), (32, 64, 8)]
EXPAND = [(4, 128, 4), (2, 64, 2), (4, 32, 4), (8, 64, 8)]
COMPILERS = 14


def load() -> tuple[Any, Any, Any, Any]:
    """Import the kernels without the packages that importing lrc needs."""
    root = Path(__file__).parents[2]
    folders = {
        "lrc": root / ".package/lrc",
        "lrc.compressors": root / "compressors",
        "lrc.compressors.kernels": root / "compressors/kernels",
    }
    for name, folder in folders.items():
        module = ModuleType(name)
        module.__path__ = [str(folder)]
        sys.modules[name] = module
    names = ("masked", "masked_triton", "n8_triton", "mask_places")
    masked, masked_triton, n8_triton, places = (
        importlib.import_module(f"lrc.compressors.kernels.{name}") for name in names
    )
    return masked, masked_triton, n8_triton, places


masked, masked_triton, n8_triton, places = load()
Blocks = masked_triton.Blocks


def pack_bits(mask: Tensor) -> Tensor:
    """Return the bytes of a mask [rows, columns], whose columns are a multiple of 8."""
    each = 1 << torch.arange(8, device=mask.device, dtype=torch.uint8)
    return (mask.unflatten(1, (-1, 8)).to(torch.uint8) * each).sum(2, dtype=torch.uint8)


def of_eight(W: Tensor, density: float) -> tuple[Tensor, Any]:
    """Return a matrix with n entries in every eight columns, dense and stored."""
    n, d_out = round(8 * density), len(W)
    scores = torch.rand(d_out, W.shape[1] // 8, 8, device=W.device)
    mask = (scores.argsort(2).argsort(2) < n).flatten(1)
    values = W[mask].view(d_out, -1, n)
    stored = masked.Masked(masked.EIGHT_OF, W.shape[1], values, pack_bits(mask), n=n)
    return W * mask, stored


def free(W: Tensor, density: float) -> tuple[Tensor, Any]:
    """Return a matrix with entries anywhere, dense and stored."""
    mask = torch.rand(W.shape, device=W.device) < density
    packed = pack_bits(mask)
    starts, offsets = places.starts_and_offsets(packed)
    stored = masked.Masked(masked.FREE, W.shape[1], W[mask], packed, starts=starts, offsets=offsets)
    return W * mask, stored


def groups(W: Tensor, density: float, size: int = 16) -> tuple[Tensor, Any]:
    """Return a matrix with groups of int4 anywhere, dense and stored."""
    d_out, columns = W.shape
    mask = torch.rand(d_out, columns // size, device=W.device) < density
    padded = torch.nn.functional.pad(mask, (0, -mask.shape[1] % 8))
    count = int(mask.sum())
    words = torch.randint(-(2**31), 2**31, (1, count * size // 8), device=W.device)
    words = words.to(torch.int32)
    codes = (words.view(-1, 1) >> 4 * torch.arange(8, device=W.device)) & 15
    scale = (torch.rand(count, device=W.device) / 100 + 0.01).to(W.dtype)
    dense = torch.zeros(d_out, columns // size, size, device=W.device, dtype=W.dtype)
    dense[mask] = (codes.view(count, size) - 8).to(W.dtype) * scale[:, None]
    packed = pack_bits(padded)
    starts, offsets = places.starts_and_offsets(packed)
    stored = masked.Masked(
        masked.GROUPS, columns, words, packed, scale, starts, offsets, 0, 4, size
    )
    return dense.flatten(1), stored


def int4_values(W: Tensor, density: float) -> tuple[Tensor, Any]:
    """Return a matrix with int4 entries anywhere, dense and stored."""
    mask = torch.rand(W.shape, device=W.device) < density
    packed = pack_bits(mask)
    starts, offsets = places.starts_and_offsets(packed)
    count = int(mask.sum())
    words = torch.randint(-(2**31), 2**31, (1, -(-count // 8)), device=W.device).to(torch.int32)
    codes = ((words.view(-1, 1) >> 4 * torch.arange(8, device=W.device)) & 15).flatten()[:count]
    scale = (torch.rand(-(-count // 128), device=W.device) / 100 + 0.01).to(W.dtype)
    values = (codes - 8).to(W.dtype) * scale.repeat_interleave(128)[:count]
    stored = masked.Masked(
        masked.FREE, W.shape[1], words, packed, scale, starts, offsets, 0, 4, 128
    )
    return torch.zeros_like(W).masked_scatter(mask, values), stored


FORMS = {"n8": of_eight, "free": free, "block4": groups, "free4": int4_values}


def permute(x: Tensor, stored: Any, blocks: Any) -> Tensor:
    """Multiply by n of eight, with the arguments of the other kernels."""
    return n8_triton.few_rows(x, stored.values, stored.mask, stored.n, blocks)


def expanded(x: Tensor, stored: Any, blocks: Any) -> Tensor:
    """Multiply by a temporary dense matrix."""
    return torch.nn.functional.linear(x, masked_triton.expand(stored, blocks))


def variants(
    form: str, rows: int, *, small: bool = False
) -> dict[str, list[tuple[str, Callable[..., Tensor]]]]:
    """Return the kernels that serve a form for a number of rows, with their configurations."""
    few = [(f"{r},{w}", Blocks(r, 32 * w, w)) for r, w in FEW[: 4 if small else None]]
    dot = [(f"{r},{g},{w}", Blocks(r, g, w)) for r, g, w in DOT[: 2 if small else None]]
    wide = [(f"{r},{g},{w}", Blocks(r, g, w)) for r, g, w in EXPAND[: 2 if small else None]]
    found: dict[str, Any] = {}
    if rows <= 4:
        if form == "n8":
            found["permute"] = [(name, partial(permute, blocks=b)) for name, b in few]
            few = few[:4]
        found["few"] = [(name, partial(masked_triton.few_rows, blocks=b)) for name, b in few]
    if rows <= 16:
        found["dot"] = [(name, partial(masked_triton.some_rows, blocks=b)) for name, b in dot]
    else:
        found["expand"] = [(name, partial(expanded, blocks=b)) for name, b in wide]
    found["run"] = [("", masked.run)]
    return found


def graph_time(calls: list[Callable[[], Any]], budget: float = 0.02) -> float:
    """Return the median seconds of one call, in a CUDA graph of all."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        calls[0]()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for call in calls:
            call()
    times: list[float] = []
    start = time.perf_counter()
    while len(times) < 5 or (time.perf_counter() - start < budget and len(times) < 30):
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        graph.replay()
        after.record()
        after.synchronize()
        times.append(before.elapsed_time(after) / 1e3 / len(calls))
    return median(times[1:])


def stored_bytes(stored: Any) -> int:
    """Return the bytes of a stored matrix."""
    tensors = [field for field in stored if isinstance(field, Tensor)]
    return sum(tensor.nbytes for tensor in tensors)


def check() -> None:
    """Compare all kernels with float64 references, and dense matrices bit by bit."""
    worst: dict[str, float] = {}
    for form, make in FORMS.items():
        for d_out, columns in ((512, 4096), (64, 576), (37, 160)):
            for density in (0.75, 0.5, 0.25) if columns == 4096 else (0.5,):
                W = torch.randn(d_out, columns, device="cuda", dtype=torch.bfloat16)
                dense, stored = make(W, density)
                assert torch.equal(masked_triton.expand(stored), dense), (form, d_out, density)
                for rows in (1, 3, 17) if columns == 160 else (1, 4, 16, 1024):
                    x = torch.randn(rows, columns, device="cuda", dtype=torch.bfloat16)
                    exact = x.double() @ dense.double().T
                    for kind, configurations in variants(form, rows).items():
                        y = configurations[0][1](x, stored)
                        error = float((y - exact).norm() / exact.norm())
                        worst[kind] = max(worst.get(kind, 0.0), error)
    print("largest relative errors (bfloat16: 2e-3 is rounding):", worst, flush=True)
    assert max(worst.values()) < 4e-3


def two_of_four(d_out: int, columns: int, rows: int, dense: float) -> str:
    """Time torch's semi-structured tensors."""
    from torch.sparse import SparseSemiStructuredTensor, to_sparse_semi_structured

    parts = []
    for cutlass in (False, True):
        try:
            SparseSemiStructuredTensor._FORCE_CUTLASS = cutlass
            count = max(1, min(MOST // 2, CACHE // (d_out * columns)))
            matrices = []
            for _ in range(count):
                W = torch.randn(d_out, columns, device="cuda", dtype=torch.bfloat16)
                kept = torch.rand(d_out, columns // 4, 4, device="cuda").argsort(2).argsort(2) < 2
                matrices.append(to_sparse_semi_structured(W * kept.flatten(1)))
            x = torch.randn(rows, columns, device="cuda", dtype=torch.bfloat16)
            seconds = graph_time(
                [partial(torch.nn.functional.linear, x, matrix) for matrix in matrices]
            )
            parts.append(f"{'cutlass' if cutlass else 'cuSPARSELt'} {dense / seconds:.2f}x")
        except Exception as error:
            parts.append(f"{type(error).__name__}: {str(error)[:60]}")
    return ", ".join(parts)


def compile_part(part: int) -> None:
    """Run every COMPILERS-th configuration once, which puts it into Triton's cache."""
    jobs = []
    for columns in (4096, 576, 1536, 160):
        for form in FORMS:
            densities = (0.75, 0.5, 0.25) if form == "n8" and columns == 4096 else (0.5,)
            for density in densities:
                for rows in (1, 3, 17) if columns == 160 else (1, 4, 16, 1024):
                    for found in variants(form, rows, small=columns < 4096).values():
                        if columns == 160:
                            found = found[:1]
                        jobs += [(columns, form, density, rows, product) for _, product in found]
    for columns, form, density, rows, product in jobs[part::COMPILERS]:
        d_out = 37 if columns == 160 else 256
        _, stored = FORMS[form](torch.zeros(d_out, columns, device="cuda").bfloat16(), density)
        product(torch.zeros(rows, columns, device="cuda").bfloat16(), stored)


def main() -> None:
    """Compile, check, time, print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--shapes", default=SHAPES)
    parser.add_argument("--rows", default="1,4,16,1024")
    parser.add_argument("--densities", default="0.75,0.5,0.25")
    parser.add_argument("--forms", default=",".join(FORMS))
    parser.add_argument("--seconds", type=float, default=210)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--compile", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.compile is not None:
        compile_part(args.compile)
        return
    start, records = time.perf_counter(), []
    command = [sys.executable, __file__, "--compile"]
    workers = [subprocess.Popen([*command, str(part)]) for part in range(COMPILERS)]
    failed = [worker.wait() for worker in workers]
    print(f"compiled in {time.perf_counter() - start:.0f} s, exit codes {set(failed)}", flush=True)
    check()
    print(f"checked after {time.perf_counter() - start:.0f} s", flush=True)
    torch.manual_seed(0)
    for shape in args.shapes.split(","):
        d_out, columns = map(int, shape.split("x"))
        small = d_out * columns < 1 << 22
        count = max(2, min(MOST, CACHE // (2 * d_out * columns)))
        weights = [
            torch.randn(d_out, columns, device="cuda", dtype=torch.bfloat16) for _ in range(count)
        ]
        dense = {}
        for rows in map(int, args.rows.split(",")):
            x = torch.randn(rows, columns, device="cuda", dtype=torch.bfloat16)
            dense[rows] = graph_time([partial(torch.nn.functional.linear, x, W) for W in weights])
            line = f"{shape} r{rows} dense {dense[rows] * 1e6:.1f} us"
            if rows in (1, 1024):
                line += f", 2:4 {two_of_four(d_out, columns, rows, dense[rows])}"
            print(line, flush=True)
        for density in map(float, args.densities.split(",")):
            if small and density != 0.5:
                continue
            for form in args.forms.split(","):
                if form == "free4" and density != 0.5:
                    continue
                made = [FORMS[form](weights[0], density)[1]]
                more = min(MOST, CACHE // stored_bytes(made[0]) + 1)
                made += [FORMS[form](weights[i % count], density)[1] for i in range(1, more)]
                for rows, reference in dense.items():
                    if time.perf_counter() - start > args.seconds:
                        print("out of time")
                        finish(args.json, records)
                        return
                    x = torch.randn(rows, columns, device="cuda", dtype=torch.bfloat16)
                    parts = []
                    for kind, configurations in variants(form, rows, small=small).items():
                        times = {
                            name: graph_time([partial(product, x, stored) for stored in made])
                            for name, product in configurations
                        }
                        best = min(times, key=lambda name: times[name])
                        parts.append(f"{kind} {reference / times[best]:.2f}x ({best})")
                        records.append(
                            {
                                "shape": shape,
                                "density": density,
                                "form": form,
                                "rows": rows,
                                "kind": kind,
                                "dense_us": reference * 1e6,
                                "us": {name: seconds * 1e6 for name, seconds in times.items()},
                            }
                        )
                    bytes_ratio = 2 * d_out * columns / stored_bytes(made[0])
                    print(
                        f"{shape} d{density} r{rows} {form} [bytes {bytes_ratio:.2f}x] "
                        + ", ".join(parts),
                        flush=True,
                    )
                del made
    finish(args.json, records)
    print(f"done after {time.perf_counter() - start:.0f} s")


def finish(path: Path | None, records: list[dict[str, Any]]) -> None:
    """Write all times."""
    if path is not None:
        path.write_text(json.dumps(records))


if __name__ == "__main__":
    main()
