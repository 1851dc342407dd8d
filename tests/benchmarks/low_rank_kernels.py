"""Check and time the low-rank forms on the shapes of Llama-3-8B, relative to dense.

usage: python tests/benchmarks/low_rank_kernels.py [--keep 0.8 0.6 0.5] [--rows 1 16 1024]
           [--parts check time tune stream] [--layers 8] [--scale 1] [--device cuda]

Needs torch and Triton, not lrc's other dependencies. All seven linears of a layer, eight different
layers in one CUDA graph, so that no weight stays in the cache; dense is measured first and last.
`--device cpu --scale 64` with TRITON_INTERPRET=1 only shows that the script runs.
"""

import argparse
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

if __name__ == "__main__":
    # The package of this checkout, which need not be installed: its __init__ asks for a version.
    sys.modules["lrc"] = ModuleType("lrc")
    sys.modules["lrc"].__path__ = [str(Path(__file__).parents[2])]

from lrc.compressors.kernels import implementations, pivoted, pivoted_triton
from lrc.compressors.layers.component import ComponentConfig
from lrc.compressors.layers.compressed_linear import CompressedLinear
from lrc.compressors.layers.config import WeightConfig
from lrc.compressors.layers.siblings import stack_first_factors
from lrc.compressors.layers.streaming import stream_low_rank

D, KV, FF = 4096, 1024, 14336
GROUPS = (("q", "k", "v"), ("o",), ("gate", "up"), ("down",))
"""Linears that receive the same input."""
SHAPES = {
    "q": (D, D),
    "k": (KV, D),
    "v": (KV, D),
    "o": (D, D),
    "gate": (FF, D),
    "up": (FF, D),
    "down": (D, FF),
}
Run = Callable[[Tensor, Tensor], Any]


def main() -> None:
    """Parse the command line and run the requested parts."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--keep", type=float, nargs="+", default=[0.8, 0.6, 0.5])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16, 1024])
    parser.add_argument("--parts", nargs="+", default=["check", "time", "stream"])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--scale", type=int, default=1, help="divisor of all widths")
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args()
    for name, (d_out, d_in) in SHAPES.items():
        SHAPES[name] = (d_out // args.scale, d_in // args.scale)
    torch.manual_seed(0)
    if "pivoted" not in implementations.MODULES:  # measured before it is in use
        implementations.MODULES += ("pivoted",)
    if args.device == "cuda":
        print(torch.cuda.get_device_name(), torch.__version__)
    for part in args.parts:
        {"check": check, "time": compare, "tune": tune, "stream": stream}[part](args)


def random(*shape: int, device: str, std: float = 0.02, dtype: Any = torch.bfloat16) -> Tensor:
    """Return normally distributed numbers."""
    return torch.randn(*shape, device=device, dtype=dtype) * std


def ranks(d_out: int, d_in: int, keep: float) -> tuple[int, int]:
    """Return the ranks of two factors and of pivots at the same size, multiples of 16 if large."""
    size, both = keep * d_out * d_in, d_out + d_in
    found = (size / both, (both - (both**2 - 4 * size) ** 0.5) / 2)
    factors, pivots = (int(r) // 16 * 16 or max(int(r), 1) for r in found)
    return factors, pivots


def pivots_of(d_out: int, rank: int, device: str, *, ascending: bool = True) -> Tensor:
    """Return an order of rows as the files store it."""
    rows = torch.randperm(d_out)
    if ascending:
        rows = torch.cat([rows[:rank].sort().values, rows[rank:].sort().values])
    order = torch.empty_like(rows)
    order[rows] = torch.arange(d_out)
    return order.to(torch.int16).to(device)


def check(args: argparse.Namespace) -> None:
    """Print the largest error of every kernel, in units of the bound that rounding allows."""
    print("\nlargest error / allowed (below 1 is correct)")
    many = [(4096, 1408), (1024, 416), (14336, 2464), (1000, 531), (37, 5), (24, 23)]
    rows = [*range(1, 18), 64, 1000]
    if args.scale > 1:
        many, rows = many[-2:], [1, 2, 17]
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        worst = dict.fromkeys(("few_rows", "few_rows, no order", "many_rows", "pivoted_rows"), 0.0)
        worst["interleave"] = 0.0
        for d_out, rank in many:
            order = pivots_of(d_out, rank, args.device)
            inverse = pivoted.inverse_of(order)
            c = random(d_out - rank, rank, device=args.device, std=1, dtype=dtype)
            for n in rows:
                p = random(n, rank + 8, device=args.device, std=1, dtype=dtype)[:, 8:]
                exact = p.double() @ c.double().T
                placed = torch.cat([p.double(), exact], 1)[:, order.int()]
                calls: dict[str, tuple[Callable[[], Tensor], Tensor]] = {
                    "pivoted_rows": (
                        partial(pivoted.pivoted_rows, p, c, order, inverse),
                        placed,
                    ),
                    "many_rows": (partial(pivoted_triton.many_rows, p, c, inverse), placed),
                    "interleave": (
                        partial(pivoted_triton.interleave, p, exact.to(dtype), order),
                        placed,
                    ),
                }
                if n <= pivoted.FEW_ROWS:
                    few = pivoted_triton.few_rows
                    calls["few_rows"] = (partial(few, p, c, inverse), placed)
                    calls["few_rows, no order"] = (partial(few, p, c, None), exact)
                for name, (call, expected) in calls.items():
                    # Sums in float32, then one rounding; cuBLAS may round parts of a sum.
                    roundings = 4 if name == "pivoted_rows" and n > pivoted.FEW_ROWS else 1
                    bound = 4 * rank**0.5 * 2.0**-23 + roundings * torch.finfo(dtype).eps
                    bound *= float(expected.abs().max())
                    error = float((call().double() - expected).abs().max()) / bound
                    worst[name] = max(worst[name], error)
        print(f"{dtype!s:16}", "  ".join(f"{name} {error:.2f}" for name, error in worst.items()))


def dense_layer(device: str) -> Run:
    """Return the seven products of a dense layer."""
    W = {name: random(*shape, device=device) for name, shape in SHAPES.items()}

    def run(x: Tensor, h: Tensor) -> Any:
        return [linear(h if name == "down" else x, W[name]) for name in W]

    return run


def factor_layer(device: str, keep: float, *, stacked: bool, triton: bool = False) -> Run:
    """Return the products of a layer of two factors."""
    A, B = {}, {}
    for name, (d_out, d_in) in SHAPES.items():
        rank = ranks(d_out, d_in, keep)[0]
        A[name], B[name] = random(rank, d_in, device=device), random(d_out, rank, device=device)
    first, columns = firsts(A, stacked=stacked)

    def product(x: Tensor, W: Tensor) -> Tensor:
        return pivoted_triton.few_rows(x, W, None) if triton else linear(x, W)

    def run(x: Tensor, h: Tensor) -> Any:
        ps = {key: product(h if key == "down" else x, W) for key, W in first.items()}
        return [product(ps[key][:, a:b], B[name]) for name, (key, a, b) in columns.items()]

    return run


def firsts(
    A: dict[str, Tensor], *, stacked: bool
) -> tuple[dict[str, Tensor], dict[str, tuple[str, int, int]]]:
    """Return the matrices of the first products, and where each linear finds its columns."""
    groups = GROUPS if stacked else tuple((name,) for name in A)
    matrices, columns = {}, {}
    for group in groups:
        matrices[group[0]] = (
            torch.cat([A[name] for name in group]) if len(group) > 1 else A[group[0]]
        )
        start = 0
        for name in group:
            columns[name] = (group[0], start, start + len(A[name]))
            start += len(A[name])
    return matrices, columns


def pivoted_layer(
    device: str, keep: float, way: str, *, stacked: bool = True, ascending: bool = True
) -> Run:
    """Return the products of a layer of pivots; `way` is how the second one is computed."""
    A, C, order, inverse = {}, {}, {}, {}
    for name, (d_out, d_in) in SHAPES.items():
        rank = ranks(d_out, d_in, keep)[1]
        A[name] = random(rank, d_in, device=device)
        C[name] = random(d_out - rank, rank, device=device)
        order[name] = pivots_of(d_out, rank, device, ascending=ascending)
        inverse[name] = pivoted.inverse_of(order[name])
    first, columns = firsts(A, stacked=stacked)

    def second(p: Tensor, name: str) -> Any:
        if way == "plain":
            y = torch.cat([p, linear(p, C[name])], dim=-1)
            return y.index_select(-1, order[name].int())
        if way == "products":  # without an order: what is to be reached
            return p, linear(p, C[name])
        if way == "gemm":
            return pivoted_triton.many_rows(p, C[name], inverse[name])
        return pivoted.pivoted_rows(p, C[name], order[name], inverse[name])

    def run(x: Tensor, h: Tensor) -> Any:
        ps = {}
        for key, W in first.items():
            source = h if key == "down" else x
            one = way == "both" and len(x) <= pivoted.FEW_ROWS
            ps[key] = pivoted_triton.few_rows(source, W, None) if one else linear(source, W)
        return [second(ps[key][:, a:b], name) for name, (key, a, b) in columns.items()]

    return run


def microseconds(layers: list[Run], n: int, device: str, repeats: int = 30) -> float:
    """Return the median time of a layer, all layers in one CUDA graph."""
    x = random(n, SHAPES["q"][1], device=device, std=1)
    h = random(n, SHAPES["down"][1], device=device, std=1)

    def everything() -> None:
        for layer in layers:
            layer(x, h)

    everything()
    if device != "cuda":
        start = time.perf_counter()
        everything()
        return (time.perf_counter() - start) / len(layers) * 1e6
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        everything()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        everything()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times)[len(times) // 2] / len(layers) * 1e3


@torch.no_grad()
def compare(args: argparse.Namespace) -> None:
    """Print one row for every number of inputs and size: ratios to dense."""
    forms: dict[str, Callable[[float], Run]] = {
        "factors": lambda keep: factor_layer(args.device, keep, stacked=False),
        "stacked": lambda keep: factor_layer(args.device, keep, stacked=True),
        "st.Triton": lambda keep: factor_layer(args.device, keep, stacked=True, triton=True),
        "pivot old": lambda keep: pivoted_layer(
            args.device, keep, "plain", stacked=False, ascending=False
        ),
        "plain": lambda keep: pivoted_layer(args.device, keep, "plain"),
        "products": lambda keep: pivoted_layer(args.device, keep, "products"),
        "random": lambda keep: pivoted_layer(args.device, keep, "kernel", ascending=False),
        "kernel": lambda keep: pivoted_layer(args.device, keep, "kernel"),
        "both": lambda keep: pivoted_layer(args.device, keep, "both"),
        "gemm": lambda keep: pivoted_layer(args.device, keep, "gemm"),
    }
    print(
        f"\nseven linears, {args.layers} layers in one graph: dense in microseconds a layer, others"
        " relative to it.\nPivots with stacked first factors: `plain` cat and gather, `products`"
        " without an order (the aim),\n`kernel` pivoted_rows (`random`: pivots not ascending),"
        " `both` also the first product in Triton,\n`gemm` products with scattered stores"
    )
    print("rows   keep  dense     " + "".join(f"{name:>10}" for name in forms))
    dense = [dense_layer(args.device) for _ in range(args.layers)]
    before = {n: microseconds(dense, n, args.device) for n in args.rows}
    for keep in args.keep:
        found: dict[tuple[str, int], float] = {}
        for name, make in forms.items():
            layers = [make(keep) for _ in range(args.layers)]
            for n in args.rows:
                if name == "st.Triton" and n > pivoted.FEW_ROWS:
                    continue
                found[name, n] = microseconds(layers, n, args.device)
            del layers
        for n in args.rows:
            cells = "".join(
                f"{before[n] / found[name, n]:10.2f}" if (name, n) in found else f"{'-':>10}"
                for name in forms
            )
            print(f"{n:5}  {keep:4}  {before[n]:8.1f}  {cells}", flush=True)
    after = {n: microseconds(dense, n, args.device) for n in args.rows}
    print("dense again:", "  ".join(f"{n}: {us:.1f}" for n, us in after.items()))


@torch.no_grad()
def tune(args: argparse.Namespace) -> None:
    """Print the fastest blocks of the kernels for every shape, with the bandwidth they reach."""
    keep = args.keep[len(args.keep) // 2]
    shapes = set()
    for group in GROUPS:
        d_in = SHAPES[group[0]][1]
        together = [ranks(*SHAPES[name], keep)[1] for name in group]
        shapes.add((sum(together), d_in, False))
        for name, rank in zip(group, together, strict=True):
            shapes.add((SHAPES[name][0] - rank, rank, True))
    few = [
        pivoted_triton.Blocks(r, k, w, s)
        for r in (2, 4, 8, 16, 32)
        for k in (256, 512, 1024)
        for w, s in ((4, 3), (8, 3))
        if r * k <= 16384
    ]
    print(f"\nfastest blocks at keep {keep}: rows, columns, warps, stages; us and TB/s or TFLOP/s")
    for others, rank, placed in sorted(shapes):
        matrices = [random(others, rank, device=args.device) for _ in range(8)]
        order = pivots_of(others + rank, rank, args.device) if placed else None
        inverse = None if order is None else pivoted.inverse_of(order)
        for n in args.rows:
            p = random(n, rank, device=args.device, std=1)
            results = []
            if n <= pivoted.FEW_ROWS:
                calls = [
                    (b, partial(pivoted_triton.few_rows, p, inverse=inverse, blocks=b))
                    for b in few
                    if n == 1 or b.rows >= 16
                ]
                calls.append((None, partial(pivoted_triton.few_rows, p, inverse=inverse)))
            elif inverse is not None:
                calls = [
                    (
                        (t, b),
                        partial(pivoted_triton.many_rows, p, inverse=inverse, blocks=b, tokens=t),
                    )
                    for t in (64, 128)
                    for b in (
                        pivoted_triton.Blocks(128, 64, 4, 4),
                        pivoted_triton.Blocks(128, 64, 8, 3),
                        pivoted_triton.Blocks(256, 64, 8, 3),
                    )
                ]
            else:
                continue
            calls.append(("cuBLAS", partial(linear, p)))
            for blocks, call in calls:
                runs: list[Run] = [lambda _x, _h, c=c, call=call: call(c) for c in matrices]  # type: ignore[misc]
                try:
                    results.append((microseconds(runs, n, args.device, 10), str(blocks)))
                except Exception as error:  # out of shared memory or registers
                    print(blocks, type(error).__name__)
            results.sort()
            rate = f"{2e-6 * others * rank / results[0][0]:.2f} TB/s"
            if n > pivoted.FEW_ROWS:
                rate = f"{2e-6 * n * others * rank / results[0][0]:.0f} TFLOP/s"
            known = {name: us for us, name in results}
            rest = "  ".join(
                f"{name} {known[name]:.1f}" for name in ("None", "cuBLAS") if name in known
            )
            print(
                f"[{others}, {rank}] n={n}: {results[0][0]:.1f} us {rate} {results[0][1]}; {rest}"
            )


class Mlp(nn.Module):
    """Gate, up and down as transformers calls them."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("gate", "up", "down"):
            d_out, d_in = SHAPES[name]
            self.add_module(f"{name}_proj", nn.Linear(d_in, d_out, bias=False, device="meta"))

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens one by one."""
        y: Tensor = self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))
        return y


class Layer(nn.Module):
    """The linears of a decoder layer, without attention between them."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("q", "k", "v", "o"):
            d_out, d_in = SHAPES[name]
            self.add_module(f"{name}_proj", nn.Linear(d_in, d_out, bias=False, device="meta"))
        self.mlp = Mlp()

    def forward(self, x: Tensor) -> Tensor:
        """Return the sum of both halves."""
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        width = k.shape[-1]
        q[..., :width] += k + v
        return x + self.o_proj(q) + self.mlp(x)


@torch.no_grad()
def stream(args: argparse.Namespace) -> None:
    """Print time and memory of long inputs, all tokens at once and in tiles."""
    keep = args.keep[len(args.keep) // 2]
    batch, length = (8, 4096) if args.scale == 1 else (2, 64)
    x = random(batch, length, SHAPES["q"][1], device=args.device, std=1)
    print(
        f"\n{batch} x {length} tokens, keep {keep}: ms; transient MiB besides the result, by part"
    )
    for kind in ("dense", "low_rank", "pivoted_low_rank"):
        model = layer_of(kind, keep, args.device)
        tiles = [None] if kind == "dense" else [None, 1024, 2048, 4096, 8192]
        for tile in tiles:
            if kind != "dense":
                stream_low_rank(model, tile if args.scale == 1 or tile is None else 16)
            cells = []
            for name, part in {"layer": model, "mlp": model.mlp, "q": model.q_proj}.items():
                ms, mib = measured(part, x, args.device)
                cells.append(f"{name} {ms:8.2f} ms {mib:7.0f} MiB")
            print(f"{kind:17} tile {tile!s:5} ", "   ".join(cells), flush=True)


def layer_of(kind: str, keep: float, device: str) -> Any:
    """Return a layer of random weights, dense or compressed."""
    model: Any = Layer()
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear):
            d_out, d_in = module.weight.shape
            if kind != "dense":
                rank = ranks(d_out, d_in, keep)[kind != "low_rank"]
                config = WeightConfig((d_out, d_in), (ComponentConfig(kind, {"rank": rank}),))
                model.set_submodule(name, CompressedLinear.replacing(module, config))
    model.to(torch.bfloat16).to_empty(device=device)
    for parameter in model.parameters():
        parameter.normal_(std=0.02)
    for module in model.modules():
        if "order" in module._buffers:
            rank = module.config.sizes["rank"]
            module.order.copy_(pivots_of(module.d_out, rank, device))
            module.optimize()
    stack_first_factors(model)
    return model.eval()


def measured(module: nn.Module, x: Tensor, device: str) -> tuple[float, float]:
    """Return the milliseconds of a call and the MiB that it needs besides its result."""
    if device != "cuda":
        start = time.perf_counter()
        module(x)
        return (time.perf_counter() - start) * 1e3, 0
    module(x)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    y = module(x)
    mib = (torch.cuda.max_memory_allocated() - before - y.nbytes) / 2**20
    times = []
    for _ in range(10):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        module(x)
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times)[len(times) // 2], mib


if __name__ == "__main__":
    main()
