"""Speed and memory of every stored form on the shapes of Llama-3-8B, with random weights.

usage: python -m tests.benchmarks.forms [layers] [stream] [model] [--rows 1 16 1024]
           [--device cuda] [--scale 1] [--seconds S]

layers  the seven linears of a layer, several different layers in one CUDA graph, so that no weight
        stays in a cache; ratios to dense, which takes turns with every form
stream  8 x 4,096 tokens through the low-rank forms, all at once and in tiles: time and memory
model   a whole model of 32 layers, one form after the other: tokens a second at batch 1 and 16

On a CPU, in float32, `--device cpu --scale 4` takes a minute.
"""

import argparse
import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from lrc.compressors.benchmark.decoders import EagerDecoder, GraphDecoder
from lrc.compressors.kernels import optimize
from lrc.compressors.latency.latency_table import Product
from lrc.compressors.latency.random_layers import random_layer
from lrc.compressors.layers import ComponentConfig, QuantizationArgs
from lrc.compressors.layers.siblings import share_inputs
from lrc.compressors.layers.streaming import stream_low_rank
from lrc.compressors.solvers.cuda_graphs import record

D, KV, FF, LAYERS, VOCABULARY = 4096, 1024, 14336, 32, 128256
COPIES, ROUNDS = 8, 15
"""Layers whose linears are timed together, which do not fit into a cache."""


@dataclass(frozen=True)
class Form:
    """A stored form, whose size depends on the shape of the matrix."""

    component: Callable[[int, int], ComponentConfig] | None


def ranked(kind: str, keep: float) -> Form:
    """Return a low-rank form of a share of the parameters; ranks are multiples of 16."""

    def component(d_out: int, d_in: int) -> ComponentConfig:
        size, both = keep * d_out * d_in, d_out + d_in
        exact = size / both if kind == "low_rank" else (both - (both**2 - 4 * size) ** 0.5) / 2
        return ComponentConfig(kind, {"rank": int(exact) // 16 * 16 or 1})

    return Form(component)


def integers(scheme: str) -> Form:
    """Return quantized matrices."""
    args = QuantizationArgs.parse(scheme)
    return Form(lambda d_out, d_in: ComponentConfig("dense", {}, quantization=args))


def groups(scheme: str, density: float) -> Form:
    """Return matrices of which some groups of integers are stored."""
    args = QuantizationArgs.parse(scheme)

    def component(d_out: int, d_in: int) -> ComponentConfig:
        count = int(density * d_out * args.groups(d_in))
        return ComponentConfig("block_sparse", {"groups": count}, quantization=args)

    return Form(component)


def sparse(density: float, pattern: str | None = None) -> Form:
    """Return sparse matrices."""
    return Form(
        lambda d_out, d_in: ComponentConfig(
            "sparse", {"nonzeros": int(density * d_out * d_in)}, pattern=pattern
        )
    )


def dictionary(keep: float) -> Form:
    """Return dictionaries with three atoms for each coefficient of an output."""

    def component(d_out: int, d_in: int) -> ComponentConfig:
        each = 3 * d_in + d_out * (1 + 3 / 16)  # numbers of 16 bits for one coefficient
        count = int(keep * d_out * d_in / each)
        return ComponentConfig("dictionary", {"atoms": 3 * count, "nonzeros": count})

    return Form(component)


def eight(n: int) -> Form:
    """Return the pattern n:8."""
    return Form(lambda d_out, d_in: ComponentConfig("semi_structured", {"n": n}))


FORMS = {
    "dense": Form(None),
    "int4-g64": integers("int4-g64"),
    "int8": integers("int8"),
    "int3-g64": integers("int3-g64"),
    "factors 0.8": ranked("low_rank", 0.8),
    "factors 0.6": ranked("low_rank", 0.6),
    "pivoted 0.8": ranked("pivoted_low_rank", 0.8),
    "pivoted 0.6": ranked("pivoted_low_rank", 0.6),
    "6:8": eight(6),
    "4:8": eight(4),
    "unstructured 0.5": sparse(0.5),
    "2:4": sparse(0.5, "2:4"),
    "dictionary 0.6": dictionary(0.6),
    "int4-g16 groups 0.5": groups("int4-g16", 0.5),
    "int4-g64 groups 0.5": groups("int4-g64", 0.5),
}
IN_MODEL = (
    "dense",
    "int4-g64",
    "int8",
    "int3-g64",
    "factors 0.6",
    "pivoted 0.6",
    "4:8",
    "int4-g16 groups 0.5",
    "dense",
)


class Mlp(nn.Module):
    """Gate, up and down as transformers calls them."""

    def __init__(self, make: Callable[[int, int], nn.Module], scale: int) -> None:
        super().__init__()
        self.gate_proj = make(FF // scale, D // scale)
        self.up_proj = make(FF // scale, D // scale)
        self.down_proj = make(D // scale, FF // scale)

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens one by one."""
        y: Tensor = self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))
        return y


class Layer(nn.Module):
    """The linears of a decoder layer, without attention between them."""

    def __init__(self, make: Callable[[int, int], nn.Module], scale: int) -> None:
        super().__init__()
        self.q_proj = make(D // scale, D // scale)
        self.k_proj = make(KV // scale, D // scale)
        self.v_proj = make(KV // scale, D // scale)
        self.o_proj = make(D // scale, D // scale)
        self.mlp = Mlp(make, scale)

    def forward(self, x: Tensor) -> Tensor:
        """Return the sum of both halves."""
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        width = k.shape[-1]
        q[..., :width] += k + v
        return x + self.o_proj(q) + self.mlp(x)

    def linears(self, x: Tensor, h: Tensor) -> None:
        """Compute the seven products alone; `x` [n, d] and `h` [n, d_ff]."""
        for linear in (self.q_proj, self.k_proj, self.v_proj):
            linear(x)
        self.o_proj(x)
        self.mlp.gate_proj(x)
        self.mlp.up_proj(x)
        self.mlp.down_proj(h)


def maker(form: Form, args: argparse.Namespace) -> Callable[[int, int], nn.Module]:
    """Return a function that makes a layer of a form for a shape."""
    generator = torch.Generator(args.device).manual_seed(0)
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32

    def make(d_out: int, d_in: int) -> nn.Module:
        component = None if form.component is None else form.component(d_out, d_in)
        product = Product((d_out, d_in), component)
        return random_layer(product, dtype=dtype, generator=generator)

    return make


def prepared(model: nn.Module) -> nn.Module:
    """Select the fast paths, as loading does."""
    optimize(model)
    share_inputs(model)
    return model.eval().requires_grad_(False)


def layers(args: argparse.Namespace) -> None:
    """Print the speed of every form relative to dense; both take turns."""
    print(f"\nseven linears, {COPIES} layers in one graph: speed relative to dense")
    print(f"{'':22}" + "".join(f"{f'{n} rows':>12}" for n in args.rows))
    dense = steps(FORMS["dense"], args)
    print(f"{'dense':22}" + "".join(f"{ms * 1e3:9.1f} us" for ms in map(alone, dense)))
    for name in [*list(FORMS)[1:], "dense"]:
        found = steps(FORMS[name], args)
        cells = [f"{ratio(d, f):11.2f}x" for d, f in zip(dense, found, strict=True)]
        print(f"{name:22}" + "".join(cells), flush=True)
        del found
        free()


def steps(form: Form, args: argparse.Namespace) -> list[Callable[[], Any]]:
    """Return calls of the linears of all layers, for every number of rows."""
    make, dtype = maker(form, args), torch.bfloat16 if args.device == "cuda" else torch.float32
    models: list[Any] = [prepared(Layer(make, args.scale)) for _ in range(COPIES)]
    found = []
    for n in args.rows:
        x = torch.randn(n, D // args.scale, device=args.device, dtype=dtype)
        h = torch.randn(n, FF // args.scale, device=args.device, dtype=dtype)

        def everything(x: Tensor = x, h: Tensor = h) -> None:
            for model in models:
                model.linears(x, h)

        found.append(record(everything, x.device))
    return found


def alone(step: Callable[[], Any]) -> float:
    """Return the median milliseconds of a layer."""
    return 1e3 * median(seconds(step) for _ in range(ROUNDS)) / COPIES


def ratio(dense: Callable[[], Any], step: Callable[[], Any]) -> float:
    """Return the median over rounds of the time of dense, relative to that of a step."""
    return median(seconds(dense) / seconds(step) for _ in range(ROUNDS))


def stream(args: argparse.Namespace) -> None:
    """Print time and memory of long inputs, all tokens at once and in tiles."""
    batch, length = (8, 4096) if args.scale == 1 else (2, 64)
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    x = torch.randn(batch, length, D // args.scale, device=args.device, dtype=dtype)
    print(f"\n{batch} x {length} tokens: ms, and MiB besides the result, of a layer and its MLP")
    for name in ("dense", "factors 0.6", "pivoted 0.6"):
        model: Any = prepared(Layer(maker(FORMS[name], args), args.scale))
        for tile in [None] if name == "dense" else [None, 2048, 4096, 8192, None]:
            if name != "dense":
                stream_low_rank(model, tile if args.scale == 1 or tile is None else 16)
            cells = []
            for part, module in {"layer": model, "mlp": model.mlp}.items():
                ms, mib = transient(module, x, args.device)
                cells.append(f"{part} {ms:8.2f} ms {mib:7.0f} MiB")
            print(f"{name:12} tile {tile!s:5} ", "   ".join(cells), flush=True)
        del model
        free()


def transient(module: nn.Module, x: Tensor, device: str) -> tuple[float, float]:
    """Return the milliseconds of a call, and the MiB that it needs besides its result."""
    module(x)
    if device == "cpu":
        return 0, 0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    y = module(x)
    mib = (torch.cuda.max_memory_allocated() - before - y.nbytes) / 2**20
    del y
    return 1e3 * median(seconds(lambda: module(x)) for _ in range(21)), mib


def model(args: argparse.Namespace) -> None:
    """Print the speed of a whole model in every form."""
    from transformers import LlamaConfig, LlamaForCausalLM

    s = args.scale
    config = LlamaConfig(
        hidden_size=D // s,
        intermediate_size=FF // s,
        num_hidden_layers=LAYERS if s == 1 else 2,
        num_attention_heads=32 if s == 1 else 4,
        num_key_value_heads=8 if s == 1 else 1,
        vocab_size=VOCABULARY // s,
        max_position_embeddings=8192,
    )
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    print(
        "\nprompts of 1,024 tokens, 32 new: prefill in tokens/s, decode in tokens/s, resident GiB"
    )
    for name in IN_MODEL:
        free()
        with torch.device("meta"):
            llama: Any = LlamaForCausalLM(config).to(dtype)
        make = maker(FORMS[name], args)
        for path, module in list(llama.named_modules()):
            if isinstance(module, nn.Linear) and path != "lm_head":
                llama.set_submodule(path, make(*module.weight.shape))
        fill(llama, args.device, dtype)
        prepared(llama)
        free()
        gib = torch.cuda.memory_allocated() / 2**30 if args.device == "cuda" else 0
        cells = [speed(llama, batch, args) for batch in (1, 16)]
        print(f"{name:22}{gib:6.2f} GiB  " + "  ".join(cells), flush=True)
        del llama


def fill(llama: Any, device: str, dtype: torch.dtype) -> None:
    """Give what is not a linear layer random contents on the device."""
    for module in llama.modules():
        for key, parameter in list(module._parameters.items()):
            if parameter is not None and parameter.is_meta:
                data = torch.randn(parameter.shape, device=device, dtype=dtype) * 0.02
                module._parameters[key] = nn.Parameter(data, requires_grad=False)
    rotary = type(llama.model.rotary_emb)
    llama.model.rotary_emb = rotary(llama.config)
    for module in llama.modules():
        for key, buffer in module._buffers.items():
            if buffer is not None and buffer.device.type != torch.device(device).type:
                module._buffers[key] = buffer.to(device)


def speed(llama: Any, batch: int, args: argparse.Namespace) -> str:
    """Return the speeds of reading prompts and of generating."""
    length, tokens = (1024, 32) if args.scale == 1 else (8, 4)
    prompt = torch.randint(100, (batch, length), device=args.device)
    kind = GraphDecoder if args.device == "cuda" else EagerDecoder
    decoder = kind(llama, prompt, tokens)
    times = []
    for _ in range(5 if args.device == "cuda" else 1):
        times.append([seconds(decoder.prefill), seconds(decoder.decode)])
    prefill, decode = (median(each[1:] or each) for each in zip(*times, strict=True))
    return f"{batch:2}: {batch * length / prefill:8.0f} {batch * tokens / decode:8.1f}"


def seconds(call: Callable[[], Any]) -> float:
    """Return the seconds of a call, on either device."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def free() -> None:
    """Give memory back."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@torch.no_grad()
def main() -> None:
    """Parse the command line and run the requested parts."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("parts", nargs="*", default=["layers", "stream", "model"])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 16, 64, 1024, 8192])
    parser.add_argument("--scale", type=int, default=1, help="divisor of all widths")
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args()
    if args.device == "cuda":
        print(torch.cuda.get_device_name(), torch.__version__)
    for part in args.parts:
        {"layers": layers, "stream": stream, "model": model}[part](args)


if __name__ == "__main__":
    main()
