"""Steps of `gguf_table` that call llama.cpp: each runs in a process of its own.

llama.cpp ends its process where it finds a fault. A step is therefore started by `run_step`, which
reports how the process ended, with its output. Processor code that uses AMX has ended processes on
some machines; a step that a signal ends is repeated with code without it.
"""

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

WITHOUT_AMX = "zen4"
"""CPU code with all instructions of ``sapphirerapids`` except AMX."""
SHOWN = 3000
"""Characters of output that are shown of a process that fails."""


class StepError(RuntimeError):
    """A process has failed; the message has its output."""

    def __init__(self, what: str, code: int, output: str) -> None:
        self.by_signal = code < 0
        ended = signal.Signals(-code).name if self.by_signal else f"exit code {code}"
        if code == -signal.SIGKILL:
            ended += ", as the kernel sends when memory is used up"
        super().__init__(f"{what}: {ended}\n{output[-SHOWN:]}")


def run_step(step: str, log: Path, variant: str | None, **options: Any) -> str:
    """Run a step in a process; return what to tell about it, usually nothing.

    Parameters
    ----------
    step : str
        Name of a function in `STEPS`.
    log : Path
        File for the output of the process.
    variant : str or None
        CPU code of llama.cpp; None for its own choice, and `WITHOUT_AMX` if a signal ends that.
    **options
        Arguments of the step that JSON represents.

    Raises
    ------
    StepError
        If the process fails.
    """
    try:
        _start(step, log, {**options, "variant": variant})
    except StepError as error:
        if not error.by_signal or variant is not None:
            raise
        print(f"{error}\nrepeated with CPU code {WITHOUT_AMX}", flush=True)
        _start(step, log, {**options, "variant": WITHOUT_AMX})
        return f", with CPU code {WITHOUT_AMX}"
    return ""


def _start(step: str, log: Path, options: dict[str, Any]) -> None:
    # The fault handler prints where a signal ended the process, in a worker thread too.
    command = [sys.executable, "-X", "faulthandler", "-m", __name__, step, json.dumps(options)]
    with log.open("a", encoding="utf-8") as file:
        start = file.tell()
        code = subprocess.run(
            command, stdout=file, stderr=subprocess.STDOUT, check=False
        ).returncode
    if code:
        raise StepError(step, code, log.read_bytes()[start:].decode(errors="replace"))


def _library(folder: str, variant: str | None) -> Any:
    from tests.llama_library import LlamaCpp

    library = LlamaCpp(Path(folder), variant)
    maps = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    code = sorted({Path(line.split()[-1]).stem for line in maps if "libggml-cpu-" in line})
    print(f"CPU code {', '.join(code)}", flush=True)
    return library


def prepare(
    library: str,
    variant: str | None,
    dense: str,
    windows: dict[str, Any],
    importance: dict[str, Any] | None,
) -> None:
    """Write the tokens of the evaluation and, unless None, the importance matrix."""
    import torch
    from tests.benchmarks.llama_cpp import tokenized
    from tests.benchmarks.llama_quantize import mean_squares

    llama = _library(library, variant)  # receives the log as long as it exists
    with llama.open(Path(dense)) as model:
        np.save(windows["file"], tokenized(model, windows["text"], *windows["shape"]))
        if importance is not None:
            found = tokenized(model, importance["text"], *importance["shape"])
            device = "cuda" if torch.cuda.is_available() else "cpu"
            folder = Path(importance["model"])
            np.savez(importance["file"], **mean_squares(folder, found, device=device))


def quantize(
    library: str,
    variant: str | None,
    source: str,
    target: str,
    kind: str,
    importance: str | None,
    threads: int,
) -> None:
    """Write a file of a type of llama.cpp."""
    from tests.benchmarks.llama_quantize import TYPES

    matrix = dict(np.load(importance)) if importance is not None else None
    llama = _library(library, variant)
    llama.quantize(Path(source), Path(target), int(TYPES[kind]), matrix, threads=threads)


def perplexity(
    library: str, variant: str | None, file: str, windows: str, threads: int, target: str
) -> None:
    """Write the perplexity of a file on windows, and the number of predicted tokens."""
    import torch
    from tests.benchmarks.llama_cpp import perplexity as measured

    torch.set_num_threads(threads)
    tokens, path = np.load(windows), Path(file)
    llama = _library(library, variant)
    with llama.open(path) as model:
        logits = (model.logits(window.tolist(), threads=threads) for window in tokens)
        loss = measured(logits, tokens)
    if not math.isfinite(loss):
        raise ValueError(f"{file} has perplexity {loss}")
    facts = {
        "bytes": path.stat().st_size,
        "perplexity": loss,
        "tokens": tokens.size - len(tokens),
        "variant": variant,
    }
    Path(target).write_text(json.dumps(facts), encoding="utf-8")


def speed(
    library: str,
    variant: str | None,
    files: dict[str, str],
    windows: str,
    threads: int,
    rounds: int,
    deadline: float,
    target: str,
) -> None:
    """Write the speed of all files, which alternate in every round, after every round.

    No round starts after the deadline, in seconds since 1970.
    """
    from tests.benchmarks.llama_cpp import alternating

    window = np.load(windows)[0]
    paths = [Path(file) for file in files.values()]
    measured = alternating(_library(library, variant), paths, window, rounds, threads)
    for done, found in enumerate(measured, start=1):
        rows = {
            row: {"prompt": prompt, "generated": generated}
            for row, (prompt, generated) in zip(files, found, strict=True)
        }
        facts = {"threads": threads, "rounds": done, "variant": variant, "rows": rows}
        unfinished = Path(f"{target}.partial")
        unfinished.write_text(json.dumps(facts), encoding="utf-8")
        unfinished.replace(target)
        if time.time() > deadline:
            break


STEPS: dict[str, Callable[..., None]] = {
    "prepare": prepare,
    "quantize": quantize,
    "perplexity": perplexity,
    "speed": speed,
}

if __name__ == "__main__":
    options = json.loads(sys.argv[2])
    os.environ["OMP_NUM_THREADS"] = str(options.get("threads", os.cpu_count()))
    STEPS[sys.argv[1]](**options)
