"""Compare vLLM with transformers on checkpoints: greedy tokens, and perplexity.

    python tests/benchmarks/vllm_check.py --text FILE CHECKPOINT...

Both run in float32 by default, so that rounding changes no token. vLLM has kernels for integers in
16 bits only: test them with ``--dtype``, and with ``--reference float32`` for transformers. For
every checkpoint, a process generates with transformers one prompt at a time and with vLLM all
prompts, which differ in length, in one batch; and measures the perplexity of windows of the text.
With ``--server``, the OpenAI server of vLLM continues the same prompts too, in one request. Prints
a Markdown table; exit code 1 if a token differs or the perplexity differs by more than 0.1 %.
"""

import argparse
import json
import math
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR"}
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")

import lrc  # noqa: F401  # registers the format with transformers

PROMPTS = (
    "A compiler is a program that",
    "The three most important things to know about the history of the city of Rome are that it "
    "was founded on seven hills, that it ruled the Mediterranean for centuries, and that",
)
LARGEST_DIFFERENCE = 1e-3  # of the perplexities, relative
START_SECONDS = 600  # that the server may take to load a model
EXTRA = 16  # room for tokens after a window


def check(
    folder: Path,
    text: str,
    tokens: int,
    window: int,
    windows: int,
    *,
    dtype: str,
    reference: str,
    eager: bool,
    quantization: str | None,
) -> None:
    """Compare one checkpoint; print a JSON record as the last line."""
    import vllm

    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    prompts = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    ids = tokenizer(text)["input_ids"][: window * windows]
    rows = [ids[start : start + window] for start in range(0, len(ids), window)]

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, reference)).eval()
    expected, nats = [], []
    with torch.no_grad():
        for prompt in prompts:
            found = model.generate(
                torch.tensor([prompt]), max_new_tokens=tokens, do_sample=False, eos_token_id=None
            )
            expected.append(found[0, len(prompt) :].tolist())
        for row in rows:
            logits = model(torch.tensor([row])).logits[0, :-1].float()
            nats.append(torch.nn.functional.cross_entropy(logits, torch.tensor(row[1:])))
    theirs = math.exp(float(torch.stack(nats).mean()))
    del model

    start = time.perf_counter()
    llm = vllm.LLM(
        str(folder),
        dtype=dtype,
        enforce_eager=eager,
        quantization=quantization,
        max_model_len=window + EXTRA,
        max_num_seqs=4,
    )
    seconds = time.perf_counter() - start
    greedy = vllm.SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    requests = [{"prompt_token_ids": prompt} for prompt in prompts]
    outputs = [each.outputs[0].token_ids for each in llm.generate(requests, greedy)]
    scored = vllm.SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    results = llm.generate([{"prompt_token_ids": row} for row in rows], scored)
    logprobs = [
        [
            steps[token].logprob
            for token, steps in zip(row[1:], each.prompt_logprobs[1:], strict=True)
        ]
        for row, each in zip(rows, results, strict=True)
    ]
    ours = math.exp(-sum(map(sum, logprobs)) / sum(map(len, logprobs)))
    record = {
        "name": folder.parent.name if folder.name == "checkpoint" else folder.name,
        "equal": equal(outputs, expected),
        "expected": expected,
        "transformers": theirs,
        "vllm": ours,
        "seconds": seconds,
    }
    print(json.dumps(record))


def equal(found: list[list[int]], expected: list[list[int]]) -> int:
    """Return how many tokens of several texts are as expected."""
    return sum(
        a == b
        for ours, theirs in zip(found, expected, strict=True)
        for a, b in zip(ours, theirs, strict=True)
    )


@contextmanager
def server(folder: Path, window: int, options: list[str]) -> Iterator[str]:
    """Run the OpenAI server of vLLM with these options; yield its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    command += ["--served-model-name", "checkpoint", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--max-model-len", str(window + EXTRA), "--max-num-seqs", "4", *options]
    address = f"http://127.0.0.1:{port}"
    environment = {k: v for k, v in os.environ.items() if k != "VLLM_ENABLE_V1_MULTIPROCESSING"}
    with (
        tempfile.TemporaryFile() as log,
        subprocess.Popen(command, env=environment, stdout=log, stderr=log) as process,
    ):
        try:
            end = time.monotonic() + START_SECONDS
            while True:
                try:
                    urllib.request.urlopen(f"{address}/health", timeout=5).close()
                    break
                except OSError as error:
                    if process.poll() is not None or time.monotonic() > end:
                        log.seek(0)
                        text = log.read().decode(errors="replace")[-4000:]
                        raise RuntimeError(f"the server did not start:\n{text}") from error
                    time.sleep(2)
            yield address
        finally:
            process.terminate()


def served_tokens(address: str, tokens: int) -> list[list[int]]:
    """Return the greedy tokens of all prompts, requested as text at once."""
    values = {"model": "checkpoint", "prompt": PROMPTS, "max_tokens": tokens, "temperature": 0}
    values |= {"ignore_eos": True, "return_token_ids": True}
    request = urllib.request.Request(
        f"{address}/v1/completions",
        json.dumps(values).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=START_SECONDS) as answer:
        choices = json.load(answer)["choices"]
    return [each["token_ids"] for each in sorted(choices, key=lambda each: each["index"])]


def main() -> int:
    """Check every folder in its own process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--text", type=Path, required=True, help="a .txt file, or .jsonl with text")
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--windows", type=int, default=4)
    dtypes = ["float32", "bfloat16", "float16"]
    parser.add_argument("--dtype", default="float32", choices=dtypes)
    parser.add_argument("--reference", choices=dtypes, help="of transformers, if another")
    parser.add_argument("--compile", action="store_true", help="without enforce_eager")
    parser.add_argument("--quantization", help="`lrc`: plain checkpoints by the plugin, too")
    parser.add_argument("--server", action="store_true", help="test the OpenAI server too")
    parser.add_argument("--here", action="store_true", help="one folder, in this process")
    options = parser.parse_args()
    if options.here:
        text = options.text.read_text(encoding="utf-8")
        if options.text.suffix == ".jsonl":
            text = "\n\n".join(json.loads(line)["text"] for line in text.splitlines()[:200])
        sizes = (options.tokens, options.window, options.windows)
        dtypes = {"dtype": options.dtype, "reference": options.reference or options.dtype}
        check(
            options.folders[0],
            text,
            *sizes,
            **dtypes,
            eager=not options.compile,
            quantization=options.quantization,
        )
        return 0
    parts = [f"{name} {version(name)}" for name in ("torch", "transformers", "lrc-compress")]
    print(
        f"vLLM {vllm_version()}, {', '.join(parts)}, {os.cpu_count()} CPU cores, {options.dtype}"
        f"{f', transformers in {options.reference}' if options.reference else ''}\n"
    )
    print("| checkpoint | equal tokens | server | perplexity, transformers | vLLM | load, s |")
    print("|---|---|---|---|---|---|", flush=True)
    failed = 0
    for folder in options.folders:
        arguments = [*sys.argv[1:]]
        for other in options.folders:
            arguments.remove(str(other))
        command = [sys.executable, __file__, "--here", *arguments, str(folder)]
        ended = subprocess.run(command, capture_output=True, text=True, check=False)
        lines = ended.stdout.splitlines()
        if ended.returncode or not lines:
            failed += 1
            print(f"| {folder} | failed | | | | |\n{ended.stderr[-4000:]}", flush=True)
            continue
        r = json.loads(lines[-1])
        difference = abs(r["vllm"] / r["transformers"] - 1)
        counts, total = [r["equal"]], sum(map(len, r["expected"]))
        if options.server:
            given = ["--dtype", options.dtype]
            given += [] if options.compile else ["--enforce-eager"]
            given += ["--quantization", options.quantization] if options.quantization else []
            with server(folder, options.window, given) as address:
                counts.append(equal(served_tokens(address, options.tokens), r["expected"]))
        failed += min(counts) < total or difference > LARGEST_DIFFERENCE
        cells = [f"{count} of {total}" for count in counts] + [""] * (not options.server)
        print(
            f"| {r['name']} | {' | '.join(cells)} | {r['transformers']:.4f} "
            f"| {r['vllm']:.4f} | {r['seconds']:.0f} |",
            flush=True,
        )
        warnings = [line for line in ended.stderr.splitlines() if "has no kernel" in line]
        print(*warnings, sep="\n", end="\n" * bool(warnings), flush=True)
    return int(failed > 0)


def vllm_version() -> str:
    """Return the version, under either name of the package."""
    import vllm

    return str(vllm.__version__)


if __name__ == "__main__":
    sys.exit(main())
