"""Compare GGUF files of lrc with those of llama.cpp's own quantizer: one table, made in pieces.

usage: python -m tests.benchmarks.gguf_table MODEL OUTPUT --train TEXT.jsonl --test TEXT.jsonl
           [--library FOLDER] [--seconds N] [--rows PATTERN ...] [--threads 4] [--rounds 7] ...

MODEL is a folder of safetensors. Rows of lrc are compressed on the GPU, if there is one, with
`--samples` windows of `--length` tokens of `--train`, and exported. Rows of llama.cpp are made from
the model in bfloat16, without and with an importance matrix of as many tokens of the same text.
llama.cpp then measures the perplexity of every file on disjoint windows of `--test`. Rows run side
by side, each on `--threads` cores. When all are finished, their speed is measured, the files one
after the other in every round; the medians are recorded.

Everything is below OUTPUT: rows/NAME.json for every finished row, speed.json, and the files. The
same command continues with what is missing, and prints the table of what is there. After N seconds
no further row starts, and compressions stop with their state saved.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from tests.benchmarks.llama_cpp import alternating, perplexity, tokenized
from tests.benchmarks.llama_quantize import TYPES, mean_squares
from tests.llama_library import FOLDER, LlamaCpp, why_missing

LRC = [sys.executable, "-m", "lrc"]
DAY = 86400.0
SAVED = 75
"""Exit code of `lrc compress` after a signal: stopped with the state saved."""
GPTQ = {"method": "gptq", "bits": 4, "group_size": 32, "embeddings": "int8", "compensate": {}}


def _joint(keep: float) -> list[str]:
    return ["gguf.yaml", f"stages.0.decompose.keep={keep}"]


OURS = {
    "lrc int4-g32": ["gptq.yaml", f"stages.0.quantize={json.dumps(GPTQ)}"],
    "lrc gguf 4.5": _joint(0.282),
    "lrc gguf 4.6": _joint(0.2895),
    "lrc gguf 5.5": _joint(0.345),
    "lrc gguf 6.5": _joint(0.407),
}
"""Row -> recipe and overrides; the numbers are bits per weight, of which 4.5 is the minimum.

4.6 and 5.5 are the sizes of Q3_K_M and Q4_K_M where rows are no multiples of 256.
"""
THEIRS = ("Q4_0", "IQ4_NL", "Q3_K_S", "Q3_K_M", "Q4_K_S", "Q4_K_M", "Q5_0", "Q5_K_M", "Q6_K")
EXACT = ("BF16", "Q8_0")
"""Types that are made without an importance matrix only."""


@dataclass(frozen=True)
class Task:
    """What all rows share."""

    model: Path
    output: Path
    library: Path
    train: str
    samples: int
    length: int
    threads: int
    deadline: float
    tokenizer: str | None
    """GGUF file of the same model from which the tokenizer is copied."""

    @property
    def dense(self) -> Path:
        """The model in bfloat16, from which llama.cpp quantizes."""
        return self.output / "files" / "BF16.gguf"

    def file(self, row: str) -> Path:
        """Return the GGUF file of a row."""
        return self.output / "files" / f"{row.replace(' ', '-')}.gguf"

    def result(self, row: str) -> Path:
        """Return the file with the measurements of a row."""
        return self.output / "rows" / f"{row.replace(' ', '-')}.json"


def every_row() -> list[str]:
    """Return the names of the rows, those that take longest first."""
    imatrix = [f"{each} imatrix" for each in THEIRS]
    return [*OURS, *EXACT, *imatrix, *THEIRS]


def main() -> None:
    """Make what is missing until the time is up, then print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--train", required=True)
    parser.add_argument("--test", required=True)
    parser.add_argument("--library", type=Path, default=FOLDER, help="of llama.cpp")
    parser.add_argument("--tokenizer", metavar="FILE", help="as of lrc export")
    parser.add_argument("--seconds", type=float, default=DAY)
    parser.add_argument("--rows", nargs="+", default=["*"], metavar="PATTERN")
    parser.add_argument("--samples", type=int, default=128, help="calibration windows")
    parser.add_argument("--length", type=int, default=1024, help="their tokens")
    parser.add_argument("--windows", type=int, default=64, help="evaluation windows")
    parser.add_argument("--window", type=int, default=512, help="their tokens")
    parser.add_argument("--threads", type=int, default=4, help="cores per row")
    parser.add_argument("--rounds", type=int, default=7, help="of the measurement of speed")
    parser.add_argument("--speed-threads", type=int, default=1)
    asked = parser.parse_args()
    if (reason := why_missing(asked.library)) is not None:
        sys.exit(reason)
    task = Task(
        asked.model.resolve(),
        asked.output.resolve(),
        asked.library.resolve(),
        asked.train,
        asked.samples,
        asked.length,
        asked.threads,
        time.time() + asked.seconds,
        asked.tokenizer,
    )
    for folder in ("files", "rows", "runs"):
        (task.output / folder).mkdir(parents=True, exist_ok=True)
    rows = [row for row in every_row() if any(fnmatchcase(row, each) for each in asked.rows)]
    if missing := [row for row in rows if not task.result(row).is_file()]:
        _prepare(task, asked.test, asked.windows, asked.window, missing)
        _make_all(task, missing)
    finished = [row for row in rows if task.result(row).is_file()]
    if asked.rounds and len(finished) == len(rows):
        _measure_speed(task, rows, asked.rounds, asked.speed_threads)
    _print(task, finished)


def _prepare(task: Task, test: str, count: int, length: int, missing: list[str]) -> None:
    """Write what rows share: the dense file, the windows, and the importance matrix."""
    if not task.dense.is_file():
        _export(task, task.model, task.dense, *_as("bf16"))
    windows, importance = task.output / "windows.npy", task.output / "importance.npz"
    library = LlamaCpp(task.library)  # receives the log as long as it exists
    with library.open(task.dense) as model:
        if not windows.is_file():
            np.save(windows, tokenized(model, test, count, length))
        if any("imatrix" in row for row in missing) and not importance.is_file():
            found = tokenized(model, task.train, task.samples, task.length)
            device = "cuda" if torch.cuda.is_available() else "cpu"
            np.savez(importance, **mean_squares(task.model, found, device=device))
            print(f"importance: {found.size} tokens", flush=True)


def _export(task: Task, source: Path, target: Path, *options: str) -> None:
    command = [*LRC, "export", str(source), str(target), "--format", "gguf", *options]
    _run([*command, "--tokenizer", task.tokenizer] if task.tokenizer else command)


def _as(name: str) -> list[str]:
    return ["--type", name, "--embedding-type", name]


def _make_all(task: Task, rows: list[str]) -> None:
    """Make rows side by side; one that fails is reported and does not end the others.

    Each has a process of its own, because llama.cpp ends its process where it finds a fault.
    """
    jobs = max(1, (os.cpu_count() or 1) // task.threads)
    with ThreadPoolExecutor(jobs) as pool:
        for row, told in zip(rows, pool.map(partial(_alone, task), rows), strict=True):
            print(f"{row}: {told}", flush=True)


def _alone(task: Task, row: str) -> str:
    """Make and measure a row in a new process; return what to tell about it."""
    try:
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:  # CUDA survives no fork
            return pool.submit(_row, task, row).result()
    except BrokenProcessPool as error:
        return f"failed: {error}"


def _row(task: Task, row: str) -> str:
    """Make and measure a row; return what to tell about it."""
    os.environ["OMP_NUM_THREADS"] = str(task.threads)
    torch.set_num_threads(task.threads)
    started = time.time()
    try:
        if started > task.deadline or not (task.file(row).is_file() or _make(task, row)):
            return "time is up; the same command continues"
        made = time.time()
        windows = np.load(task.output / "windows.npy")
        library = LlamaCpp(task.library)
        with library.open(task.file(row)) as model:
            loss = perplexity(
                (model.logits(window.tolist(), threads=task.threads) for window in windows),
                windows,
            )
    except Exception:
        return f"failed\n{traceback.format_exc()}"
    facts = {
        "bytes": task.file(row).stat().st_size,
        "perplexity": loss,
        "tokens": windows.size - len(windows),
        "seconds": {"make": made - started, "evaluate": time.time() - made},
    }
    task.result(row).write_text(json.dumps(facts))
    return f"{facts['bytes'] / 2**20:.1f} MiB, perplexity {loss:.3f}, {time.time() - started:.0f} s"


def _make(task: Task, row: str) -> bool:
    """Write the file of a row; return False if the time is up."""
    target = task.file(row)
    unfinished = target.with_name(f"partial-{target.name}")
    unfinished.unlink(missing_ok=True)
    if row in OURS:
        recipe, *changes = OURS[row]
        run = task.output / "runs" / target.stem
        calibration = {"source": task.train, "samples": task.samples, "length": task.length}
        command = [
            *(*LRC, "compress", str(Path("recipes") / recipe), f"model={task.model}"),
            *(f"calibration={json.dumps(calibration)}", "evaluate={}", f"output={run}", *changes),
        ]
        if not _run(command, task.deadline):
            return False
        _export(task, run / "checkpoint", unfinished)
    else:
        name, _, kind = row.partition(" ")
        importance = dict(np.load(task.output / "importance.npz")) if kind else None
        LlamaCpp(task.library).quantize(
            task.dense, unfinished, int(TYPES[name]), importance, threads=task.threads
        )
    unfinished.rename(target)
    return True


def _run(command: list[str], deadline: float | None = None) -> bool:
    """Run a command; at the deadline, let it save its state, and return False."""
    left = None if deadline is None else max(1, deadline - time.time())
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        try:
            output, _ = process.communicate(timeout=left)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGTERM)
            output, _ = process.communicate()
    if process.returncode not in {0, SAVED}:
        raise RuntimeError(f"{' '.join(command)}\n{output.decode()[-4000:]}")
    return process.returncode == 0


def _measure_speed(task: Task, rows: list[str], rounds: int, threads: int) -> None:
    """Measure one file of every combination of block types, on an otherwise idle machine."""
    target = task.output / "speed.json"
    timed = [row for row in rows if not row.endswith(" imatrix") and task.file(row).is_file()]
    known = json.loads(target.read_text())["rows"] if target.is_file() else {}
    if not timed or {*timed} <= {*known} or time.time() > task.deadline:
        return
    window = np.load(task.output / "windows.npy")[0]
    files = [task.file(row) for row in timed]
    found = alternating(LlamaCpp(task.library), files, window, rounds, threads)
    speeds = {
        row: {"prompt": prompt, "generated": generated}
        for row, (prompt, generated) in zip(timed, found, strict=True)
    }
    target.write_text(json.dumps({"threads": threads, "rounds": rounds, "rows": speeds}))


def _print(task: Task, rows: list[str]) -> None:
    path = task.output / "speed.json"
    measured = json.loads(path.read_text()) if path.is_file() else {"threads": 0, "rows": {}}
    print(f"speed: threads {measured['threads']}; prompt and generated in tokens/s")
    print("| file | MiB | perplexity | prompt | generated |\n|---|---|---|---|---|")
    facts = {row: json.loads(task.result(row).read_text()) for row in rows}
    for row in sorted(facts, key=lambda row: facts[row]["bytes"]):
        speed = measured["rows"].get(row)
        cells = [f"{facts[row]['bytes'] / 2**20:.1f}", f"{facts[row]['perplexity']:.3f}"]
        cells += [f"{speed[key]:.0f}" if speed else "" for key in ("prompt", "generated")]
        print(f"| {row} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
