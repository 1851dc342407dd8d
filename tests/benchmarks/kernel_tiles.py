"""Find the fastest division of the CUDA kernels for few tokens, relative to cuBLAS in bfloat16.

usage: python -m tests.benchmarks.kernel_tiles [--shapes 4096x4096,...] [--rows 1,16]
           [--forms int4-g64,int8,4:8,groups]

Every time is the median over replays of a CUDA graph that multiplies by different matrices in turn,
more than fit into the cache. A column is a speed relative to cuBLAS with the tiles, warps and
stages of its blocks; a star marks what production code chooses.
"""

import argparse
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import product
from statistics import median
from typing import Any

import torch
from torch import Tensor

from lrc.compressors.kernels import masked_cuda, nvrtc, packed_linear
from lrc.compressors.kernels.few_tokens import Blocks
from lrc.compressors.kernels.mask_places import starts_and_offsets
from lrc.compressors.latency.latency_table import Product
from lrc.compressors.latency.random_layers import random_layer
from lrc.compressors.layers import ComponentConfig, QuantizationArgs
from lrc.compressors.solvers.cuda_graphs import record

SHAPES = "4096x4096,14336x4096,4096x14336,1024x4096"
FORMS = "int4-g64,int8,int3-g64,4:8,6:8,groups"
CACHE = 240 << 20
"""Bytes of all matrices that are used in turn: several times an L2 cache of 50 MiB."""
MOST = 24
"""Matrices at most, so that recording stays short for small ones."""
Call = Callable[[Tensor, Blocks | None], Tensor]


def calls(form: str, d_out: int, d_in: int) -> Iterator[tuple[Call, int]]:
    """Yield products with random matrices of a form, and the bytes of each."""
    generator = torch.Generator("cuda").manual_seed(0)
    while True:
        component = random_layer(
            Product((d_out, d_in), component_of(form, d_out, d_in)),
            dtype=torch.bfloat16,
            generator=generator,
        ).components[0]  # type: ignore[index]
        tensors = dict(component.named_buffers()) | dict(component.named_parameters())
        size = sum(tensor.nbytes for tensor in tensors.values())
        yield call_of(form, {key.rpartition(".")[2]: t for key, t in tensors.items()}), size


def component_of(form: str, d_out: int, d_in: int) -> ComponentConfig:
    """Return how a matrix is stored."""
    if form == "groups":
        args = QuantizationArgs.parse("int4-g16")
        count = d_out * args.groups(d_in) // 2
        return ComponentConfig("block_sparse", {"groups": count}, quantization=args)
    eight = re.fullmatch(r"(\d):8", form)
    if eight:
        return ComponentConfig("semi_structured", {"n": int(eight[1])})
    return ComponentConfig("dense", {}, quantization=QuantizationArgs.parse(form))


def call_of(form: str, tensors: dict[str, Tensor]) -> Call:
    """Return the product with stored tensors."""
    if form == "groups":
        mask = masked_cuda.padded(tensors["mask"])
        packed, scale = tensors["values_packed"], tensors["values_scale"]
        stored = masked_cuda.Groups(packed, scale, mask, *starts_and_offsets(mask), 4, 16)
        return lambda x, blocks: masked_cuda.groups(x, [stored], blocks)[0]
    if form.endswith(":8"):
        eight = masked_cuda.EightOf(tensors["values"], tensors["mask"], int(form[0]))
        return lambda x, blocks: masked_cuda.eight_of(x, eight, blocks)
    bits = QuantizationArgs.parse(form).bits
    words, scales = tensors["weight_packed"], tensors["weight_scale"]
    zero = tensors.get("weight_zero_point")
    return lambda x, blocks: packed_linear.product(x, words, scales, zero, bits, blocks)


def timed(steps: list[Callable[[], Any]], replays: int = 11) -> float:
    """Return the microseconds of a step, all of them in one CUDA graph."""

    def everything() -> None:
        for step in steps:
            step()

    replay = record(everything, torch.device("cuda", torch.cuda.current_device()))
    times = []
    for _ in range(replays):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return 1000 * median(times[1:]) / len(steps)


def dense_time(d_out: int, d_in: int, x: Tensor) -> float:
    """Return the microseconds of cuBLAS."""
    count = min(MOST, CACHE // (2 * d_out * d_in) + 1)
    matrices = torch.randn(count, d_out, d_in, device="cuda").bfloat16()
    return timed([partial(torch.nn.functional.linear, x, W) for W in matrices])


def compiles(call: Call, x: Tensor, blocks: Blocks) -> bool:
    """Compile a kernel; return False if it needs too many resources."""
    try:
        call(x, blocks)
    except nvrtc.CompilationError:
        return False
    return True


@torch.no_grad()
def main() -> None:
    """Parse the command line, and print the best blocks of every form and shape."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--shapes", default=SHAPES, help="d_out x d_in")
    parser.add_argument("--rows", default="1,16")
    parser.add_argument("--forms", default=FORMS)
    args = parser.parse_args()
    print(torch.cuda.get_device_name(), "torch", torch.__version__)
    for rows, shape in product(map(int, args.rows.split(",")), args.shapes.split(",")):
        d_out, d_in = map(int, shape.split("x"))
        x = torch.randn(rows, d_in, device="cuda").bfloat16()
        dense = dense_time(d_out, d_in, x)
        tokens = 8 if rows <= 8 else 16 if rows <= 16 else 32
        for form in args.forms.split(","):
            made = []
            for call, size in calls(form, d_out, d_in):
                made.append(call)
                if len(made) >= min(MOST, CACHE // size + 1):
                    break
            divisions = [Blocks(tokens, *b) for b in product((1, 2), (2, 4, 8, 16), (1, 2))]
            with ThreadPoolExecutor() as threads:
                works = list(threads.map(partial(compiles, made[0], x), divisions))
            torch.cuda.synchronize()
            found: list[tuple[float, str]] = []
            for blocks in [None, *(b for b, ok in zip(divisions, works, strict=True) if ok)]:
                us = timed([partial(call, x, blocks) for call in made])
                found.append((us, "*" if blocks is None else str(tuple(blocks[1:]))))
            best = "  ".join(f"{dense / us:.2f}x {name}" for us, name in sorted(found)[:4])
            chosen = f"{dense / found[0][0]:.2f}x"
            print(
                f"{rows:3} {shape:12} {form:9} dense {dense:5.1f} us  * {chosen}  {best}",
                flush=True,
            )
            del made


if __name__ == "__main__":
    main()
