"""Time models side by side: tokens per second of reading a prompt and of generating.

usage: python tests/benchmarks/speed.py DENSE CHECKPOINT ... [--batch 1 16] [--prompt 1024]
           [--new 64] [--repeats 7] [--device auto] [--dtype bfloat16]

All models run in one process, the first again at the end: the difference between its two rows is
noise. Prefill is one forward of `prompt` tokens per row that fills the cache; decode is `new`
greedy steps of one token after it, plain forwards in eager mode, where small models at batch 1 wait
for kernel launches. Medians; a first run is not counted.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

import lrc  # noqa: F401  # registers the format


def main() -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 16])
    parser.add_argument("--prompt", type=int, default=1024)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = []
    print(
        "| model | batch | prefill tokens/s | decode tokens/s | peak GiB |\n|---|---|---|---|---|"
    )
    for folder in [*args.models, *args.models[:1]]:
        model: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=getattr(torch, args.dtype), device_map=args.device
        ).eval()
        for batch in args.batch:
            row = measure(model, batch, args) | {"model": str(folder)}
            rows.append(row)
            print(
                f"| {folder} | {batch} | {row['prefill']:,.0f} | {row['decode']:,.0f} | "
                f"{row['peak_bytes'] / 2**30:.2f} |",
                flush=True,
            )
        del model
    if args.json:
        args.json.write_text(json.dumps({"device": name(args.device), "rows": rows}, indent=1))


@torch.no_grad()
def measure(model: Any, batch: int, args: argparse.Namespace) -> dict[str, Any]:
    """Return tokens per second of both phases, and the peak GPU memory."""
    generator = torch.Generator().manual_seed(0)
    shape = (batch, args.prompt)
    prompt = torch.randint(5, model.config.vocab_size, shape, generator=generator).to(args.device)
    if args.device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()

    def prefill() -> Any:
        return model(prompt, use_cache=True, logits_to_keep=1)

    def decode(done: Any) -> None:
        cache, token = done.past_key_values, done.logits[:, -1:].argmax(-1)
        for _ in range(args.new):
            done = model(token, past_key_values=cache, use_cache=True)
            token = done.logits[:, -1:].argmax(-1)

    prefills, decodes = [], []
    for number in range(args.repeats + 1):
        seconds, done = timed(prefill, args.device)
        later, _ = timed(lambda done=done: decode(done), args.device)
        if number:
            prefills.append(seconds)
            decodes.append(later)
    peak = torch.cuda.max_memory_allocated() if args.device.startswith("cuda") else 0
    return {
        "batch": batch,
        "prefill": batch * args.prompt / statistics.median(prefills),
        "decode": batch * args.new / statistics.median(decodes),
        "peak_bytes": peak,
        "parameters": sum(p.numel() for p in model.parameters()),
    }


def timed(run: Callable[[], Any], device: str) -> tuple[float, Any]:
    """Return seconds and result of a call; wait for a GPU before and after it."""
    wait = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    wait()
    start = time.perf_counter()
    result = run()
    wait()
    return time.perf_counter() - start, result


def name(device: str) -> str:
    """Return the name of the device that was measured."""
    return torch.cuda.get_device_name() if device.startswith("cuda") else "cpu"


if __name__ == "__main__":
    main()
