"""Measure the loss by quantization in the outputs of single matrices, on real activations.

usage: python tests/benchmarks/rounding.py MODEL TEXT.jsonl [--layers 2 15 28]
           [--schemes int4-g64 ...]
           [--windows 4] [--length 1024] [--keep 0.8]

MODEL is a folder that transformers loads, TEXT a file of rows {"text": ...}. Prints, for every
scheme, ``tr(E H E^T) / tr(W H W^T)`` as the geometric mean over the linears of the layers: of the
whole weight to the nearest and by GPTQ, with the number of linears where GPTQ loses more (none
should), and of a whitened SVD at `keep` as two factors in every balance and as pivot rows. Without
--layers all layers are taken, and whole weights alone.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from lrc.compressors.layers import ComponentConfig, QuantizationArgs, WeightConfig
from lrc.compressors.layers.pivot_rows import pivot_rows
from lrc.compressors.solvers.factor_balancing import Balance
from lrc.compressors.solvers.gptq import gptq
from lrc.compressors.solvers.linalg import weighted_error
from lrc.compressors.solvers.moments import Moment
from lrc.compressors.solvers.quantize_factors import quantize_low_rank, quantize_pivoted
from lrc.compressors.solvers.quantized_matrix import round_to_nearest
from lrc.compressors.solvers.spectrum import spectrum

DTYPE = torch.bfloat16
BALANCES: tuple[Balance, ...] = ("first", "quarter", "even", "rotated")


def main() -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("text", type=Path)
    parser.add_argument("--layers", type=int, nargs="+")
    parser.add_argument("--schemes", nargs="+", default=["int8", "int4-g64", "int3-g64"])
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--keep", type=float, default=0.8)
    args = parser.parse_args()
    rows: dict[str, dict[str, list[float]]] = {scheme: {} for scheme in args.schemes}
    worse = dict.fromkeys(args.schemes, 0)
    for _, W, H in measured(args):
        for written in args.schemes:
            found = losses(
                W, H, QuantizationArgs.parse(written), args.keep if args.layers else None
            )
            worse[written] += found["GPTQ"] > found["nearest"] * (1 + 1e-9)
            for way, loss in found.items():
                rows[written].setdefault(way, []).append(loss)
    for written, ways in rows.items():
        means = {way: torch.tensor(each).log().mean().exp() for way, each in ways.items()}
        cells = ", ".join(f"{way} {float(mean):.3g}" for way, mean in means.items())
        count = len(next(iter(ways.values())))
        print(f"{written}, {count} linears: {cells}; GPTQ loses more in {worse[written]}")


def measured(args: argparse.Namespace) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yield name, weight and second moment of the inputs of the selected linears."""
    model: Any = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    texts = [json.loads(line)["text"] for line in args.text.read_text().splitlines()[:400]]
    count = args.windows * args.length
    ids = tokenizer("\n\n".join(texts), return_tensors="pt").input_ids[0, :count]
    layers = model.model.layers
    numbers = range(len(layers)) if args.layers is None else args.layers
    linears = {
        f"{number}.{name}": module
        for number in numbers
        for name, module in layers[number].named_modules()
        if isinstance(module, nn.Linear)
    }
    moments: dict[str, Tensor] = {}

    def note(name: str, x: Tensor) -> None:
        x = x.flatten(0, -2)
        moments[name] = moments.get(name, torch.zeros(())) + x.T @ x

    for name, module in linears.items():
        module.register_forward_pre_hook(lambda _, inputs, name=name: note(name, inputs[0]))
    with torch.no_grad():
        for window in ids.view(args.windows, args.length):
            model(window[None], use_cache=False)
    for name, module in linears.items():
        yield name, module.weight.detach().double(), moments.pop(name).double()


def losses(W: Tensor, H: Tensor, scheme: QuantizationArgs, keep: float | None) -> dict[str, float]:
    """Return the squared error by every way of quantization, relative to that of removing `W`."""
    whole = weighted_error(W, 0 * W, H)
    found = {
        "nearest": weighted_error(W, round_to_nearest(W, scheme, dtype=DTYPE, H=H).weight(), H),
        "GPTQ": weighted_error(W, gptq(W, H, scheme, dtype=DTYPE).weight(), H),
    }
    if keep is not None:
        group = scheme.group_size or 1
        curve = spectrum(W, Moment.of(H), damp=1e-6)
        for kind in ("low_rank", "pivoted_low_rank"):
            within = keep * W.numel() * 16
            fitting = [
                rank
                for rank in range(group, min(W.shape) + 1, group)
                if low_rank_config(W, kind, rank).stored_bits(16) <= within
            ]
            if not fitting:
                continue
            factors = curve.truncate(fitting[-1])
            if kind == "low_rank":
                for balance in BALANCES:
                    pair = quantize_low_rank(
                        W, factors.B, factors.A, H, scheme, dtype=DTYPE, balance=balance
                    )
                    found[f"low_rank, {balance}"] = pair.error
            else:
                parts = pivot_rows(factors.B, factors.A)
                pivoted = quantize_pivoted(W, *parts, H, scheme, dtype=DTYPE)
                found["pivoted_low_rank"] = pivoted.error
    return {way: loss / whole for way, loss in found.items()}


def low_rank_config(W: Tensor, kind: str, rank: int) -> WeightConfig:
    """Return the configuration of a weight as one component of a rank."""
    return WeightConfig((W.shape[0], W.shape[1]), (ComponentConfig(kind, {"rank": rank}),))


if __name__ == "__main__":
    main()
