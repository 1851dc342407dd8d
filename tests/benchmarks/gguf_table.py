"""Compare GGUF files of lrc with those of llama.cpp's own quantizer: one table, made in pieces.

usage: python -m tests.benchmarks.gguf_table MODEL OUTPUT --train TEXT.jsonl --test TEXT.jsonl
           [--library FOLDER] [--cpu-variant NAME] [--seconds N] [--speed-seconds M]
           [--rows PATTERN ...] [--threads 4] [--rounds 5] ...

MODEL is a folder of safetensors, or a GGUF file, which is converted. Rows of lrc are compressed on
the GPU, if there is one, with `--samples` windows of `--length` tokens of `--train`, and exported.
Rows of llama.cpp are made from the model in bfloat16, without and with an importance matrix of as
many tokens of the same text. llama.cpp then measures the perplexity of every file on disjoint
windows of `--test`. Rows run side by side, each on `--threads` cores; one that fails is reported,
and the others go on. Then the speed of all files is measured in one process, the files one after
the other in every round; the medians are recorded after every round.

Everything is below OUTPUT: rows/NAME.json for every finished row, speed.json, logs, and the files.
The same command continues with what is missing, and prints the table of what is there. After N
seconds, less those of `--speed-seconds`, no further row starts, and compressions stop with their
state saved; after N seconds no further round of the speed starts. The exit code is 1 if a row has
failed.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path

from tests.benchmarks.gguf_steps import StepError, run_step
from tests.benchmarks.model_folder import as_folder
from tests.llama_library import FOLDER, variants, why_missing

LRC = [sys.executable, "-m", "lrc"]
DAY = 86400.0
SAVED = 75
"""Exit code of `lrc compress` after a signal: stopped with the state saved."""
GPTQ = {"method": "gptq", "bits": 4, "group_size": 32, "embeddings": "int8", "compensate": {}}


def _joint(keep: float) -> list[str]:
    return ["gguf.yaml", f"stages.0.decompose.keep={keep}"]


OURS = {
    "lrc int4-g32": ["gptq.yaml", f"stages.0.quantize={json.dumps(GPTQ)}"],
    "lrc gguf 3.5": _joint(0.219),
    "lrc gguf 4": _joint(0.25),
    "lrc gguf 4 head8": _joint(0.25),
    "lrc gguf 4.5": _joint(0.282),
    "lrc gguf 4.6": _joint(0.2895),
    "lrc gguf 5": _joint(0.314),
    "lrc gguf 5 head8": _joint(0.314),
    "lrc gguf 5.5": _joint(0.345),
    "lrc gguf 6.5": _joint(0.407),
}
"""Row -> recipe and overrides; the numbers are bits per weight, of which 3.44 is the minimum.

Matrices whose rows are no multiples of 256 take 4.5 at least. If most are such, 4.6 and 5.5 are the
sizes of Q3_K_M and Q4_K_M.
"""
ENDS = {
    "lrc int4-g32": ("int4-g32", "int5-g32"),
    "lrc gguf 3.5": ("int3-g16-s256", "int6-g16-s256"),
    "lrc gguf 4": ("int4-g32", "int6-g16-s256"),
    "lrc gguf 4 head8": ("int4-g32", "int8-g32"),
    "lrc gguf 4.5": ("int4-g32", "int6-g16-s256"),
    "lrc gguf 4.6": ("int4-g32", "int6-g16-s256"),
    "lrc gguf 5": ("int5-g32", "int6-g16-s256"),
    "lrc gguf 5 head8": ("int5-g32", "int8-g32"),
    "lrc gguf 5.5": ("int5-g32", "int6-g16-s256"),
    "lrc gguf 6.5": ("int6-g16-s256", "int6-g16-s256"),
}
"""Row -> formats of embedding and head of a model whose head is not tied; a tied one has int8.

llama.cpp stores an embedding that is not tied in the type of most matrices, and the head as Q6_K.
With a head of 8 bits and half a bit less in the layers, the file has the same size.
"""
SMALL = ("Q3_K_S", "Q3_K_M", "IQ4_XS", "Q4_0", "IQ4_NL", "Q4_K_S", "Q4_K_M")
THEIRS = (*SMALL, "Q5_0", "Q5_K_S", "Q5_K_M", "Q6_K")
EXACT = ("BF16", "Q8_0")
"""Types that are made without an importance matrix only."""


@dataclass(frozen=True)
class Task:
    """What all rows share."""

    model: Path
    output: Path
    library: Path
    variant: str | None
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

    @property
    def windows(self) -> Path:
        """Tokens of the evaluation."""
        return self.output / "windows.npy"

    @property
    def importance(self) -> Path:
        """The importance matrix."""
        return self.output / "importance.npz"

    def ours(self) -> list[str]:
        """Return the rows of lrc that differ for this model."""
        return [row for row in OURS if not (self.tied and row.endswith("head8"))]

    def file(self, row: str) -> Path:
        """Return the GGUF file of a row."""
        return self.output / "files" / f"{row.replace(' ', '-')}.gguf"

    def result(self, row: str) -> Path:
        """Return the file with the measurements of a row."""
        return self.output / "rows" / f"{row.replace(' ', '-')}.json"

    @cached_property
    def tied(self) -> bool:
        """Whether the head is the embedding."""
        config = json.loads((self.model / "config.json").read_text(encoding="utf-8"))
        return bool(config.get("tie_word_embeddings", False))

    def step(self, step: str, log: str, **options: object) -> str:
        """Run a step with llama.cpp in a process; return what to tell about it."""
        paths = {
            key: str(each) if isinstance(each, Path) else each for key, each in options.items()
        }
        file = self.output / "logs" / f"{log.replace(' ', '-')}.log"
        return run_step(step, file, self.variant, library=str(self.library), **paths)


def every_row(task: Task) -> list[str]:
    """Return the names of the rows, those that take longest first."""
    imatrix = [f"{each} imatrix" for each in THEIRS]
    return [*task.ours(), *EXACT, *imatrix, *THEIRS]


def main() -> int:
    """Make what is missing until the time is up, then print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--train", required=True)
    parser.add_argument("--test", required=True)
    parser.add_argument("--library", type=Path, default=FOLDER, help="of llama.cpp")
    parser.add_argument("--cpu-variant", metavar="NAME", help="CPU code, such as icelake")
    parser.add_argument("--tokenizer", metavar="FILE", help="as of lrc export")
    parser.add_argument("--seconds", type=float, default=DAY)
    parser.add_argument("--speed-seconds", type=float, default=0, help="of them, kept for speed")
    parser.add_argument("--rows", nargs="+", default=["*"], metavar="PATTERN")
    parser.add_argument("--samples", type=int, default=128, help="calibration windows")
    parser.add_argument("--length", type=int, default=1024, help="their tokens")
    parser.add_argument("--windows", type=int, default=64, help="evaluation windows")
    parser.add_argument("--window", type=int, default=512, help="their tokens")
    parser.add_argument("--threads", type=int, default=4, help="cores per row")
    parser.add_argument("--rounds", type=int, default=5, help="of the measurement of speed")
    parser.add_argument("--speed-threads", type=int, default=1)
    asked = parser.parse_args()
    if (reason := why_missing(asked.library)) is not None:
        sys.exit(reason)
    if asked.cpu_variant is not None and asked.cpu_variant not in variants(asked.library):
        parser.error(f"--cpu-variant: must be one of {', '.join(variants(asked.library))}")
    task = Task(
        as_folder(asked.model, asked.output / "model").resolve(),
        asked.output.resolve(),
        asked.library.resolve(),
        asked.cpu_variant,
        asked.train,
        asked.samples,
        asked.length,
        asked.threads,
        time.time() + asked.seconds - asked.speed_seconds,
        asked.tokenizer or (str(asked.model) if asked.model.suffix == ".gguf" else None),
    )
    for folder in ("files", "rows", "runs", "logs"):
        (task.output / folder).mkdir(parents=True, exist_ok=True)
    rows = [row for row in every_row(task) if any(fnmatchcase(row, each) for each in asked.rows)]
    if missing := [row for row in rows if not task.result(row).is_file()]:
        try:
            _prepare(task, asked.test, [asked.windows, asked.window], missing)
        except StepError as error:
            sys.exit(f"nothing can be measured: {error}")
        _make_all(task, missing)
    finished = [row for row in rows if task.result(row).is_file()]
    failed = len(finished) < len(rows)
    deadline = task.deadline + asked.speed_seconds
    _print(task, finished)
    if asked.rounds and finished and time.time() < deadline:
        try:
            _measure_speed(task, finished, asked.rounds, asked.speed_threads, deadline)
        except StepError as error:
            print(f"speed: failed: {error}", flush=True)
            failed = True
    _print(task, finished)
    return int(failed)


def _prepare(task: Task, test: str, shape: list[int], missing: list[str]) -> None:
    """Write what rows share: the dense file, the windows, and the importance matrix."""
    if not task.dense.is_file():
        _export(task, task.model, task.dense, *_as("bf16"))
    needed = any("imatrix" in row for row in missing) and not task.importance.is_file()
    if task.windows.is_file() and not needed:
        return
    importance = {
        "file": str(task.importance),
        "text": task.train,
        "shape": [task.samples, task.length],
        "model": str(task.model),
    }
    task.step(
        "prepare",
        "prepare",
        dense=task.dense,
        windows={"file": str(task.windows), "text": test, "shape": shape},
        importance=importance if needed else None,
    )


def _export(task: Task, source: Path, target: Path, *options: str) -> None:
    command = [*LRC, "export", str(source), str(target), "--format", "gguf", *options]
    _run([*command, "--tokenizer", task.tokenizer] if task.tokenizer else command, task.threads)


def _as(name: str) -> list[str]:
    return ["--type", name, "--embedding-type", name]


def _make_all(task: Task, rows: list[str]) -> None:
    """Make rows side by side; one that fails is reported and does not end the others."""
    jobs = max(1, (os.cpu_count() or 1) // task.threads)
    with ThreadPoolExecutor(jobs) as pool:
        running = {pool.submit(_row, task, row): row for row in rows}
        for each in as_completed(running):
            print(f"{running[each]}: {each.result()}", flush=True)


def _row(task: Task, row: str) -> str:
    """Make and measure a row; return what to tell about it."""
    started = time.time()
    try:
        if started > task.deadline or not (task.file(row).is_file() or _make(task, row)):
            return "time is up; the same command continues"
        made = time.time()
        told = task.step(
            "perplexity",
            row,
            file=task.file(row),
            windows=task.windows,
            threads=task.threads,
            target=task.result(row),
        )
    except Exception as error:
        # Any fault of one row, reported with its place, so that the other rows go on.
        return f"failed: {error if isinstance(error, StepError) else traceback.format_exc()}"
    facts = json.loads(task.result(row).read_text())
    seconds = f"made in {made - started:.0f} s, evaluated in {time.time() - made:.0f} s"
    return f"{_mebibytes(facts)} MiB, perplexity {facts['perplexity']:.3f}, {seconds}{told}"


def _make(task: Task, row: str) -> bool:
    """Write the file of a row; return False if the time is up."""
    target = task.file(row)
    unfinished = target.with_name(f"partial-{target.name}")
    unfinished.unlink(missing_ok=True)
    if row in OURS:
        recipe, *changes = OURS[row]
        if not task.tied:
            stage = f"stages.0.{'quantize' if recipe == 'gptq.yaml' else 'decompose'}"
            keys = zip(("embeddings", "lm_head"), ENDS[row], strict=True)
            changes += [f"{stage}.{key}={scheme}" for key, scheme in keys]
        run = task.output / "runs" / target.stem
        calibration = {"source": task.train, "samples": task.samples, "length": task.length}
        command = [
            *(*LRC, "compress", str(Path("recipes") / recipe), f"model={task.model}"),
            *(f"calibration={json.dumps(calibration)}", "evaluate={}", f"output={run}", *changes),
        ]
        if not _run(command, task.threads, task.deadline):
            return False
        _export(task, run / "checkpoint", unfinished)
    else:
        kind, _, imatrix = row.partition(" ")
        task.step(
            "quantize",
            row,
            source=task.dense,
            target=unfinished,
            kind=kind,
            importance=task.importance if imatrix else None,
            threads=task.threads,
        )
    unfinished.rename(target)
    return True


def _run(command: list[str], threads: int, deadline: float | None = None) -> bool:
    """Run a command; at the deadline, let it save its state, and return False."""
    left = None if deadline is None else max(1, deadline - time.time())
    with subprocess.Popen(
        command,
        env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    ) as process:
        try:
            output, _ = process.communicate(timeout=left)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGTERM)
            output, _ = process.communicate()
    if process.returncode not in {0, SAVED}:
        raise StepError(" ".join(command), process.returncode, output.decode(errors="replace"))
    return process.returncode == 0


def _measure_speed(task: Task, rows: list[str], rounds: int, threads: int, deadline: float) -> None:
    """Measure all files in the same rounds, on an otherwise idle machine."""
    target = task.output / "speed.json"
    known = json.loads(target.read_text()) if target.is_file() else {"rows": {}, "rounds": 0}
    if {*rows} <= {*known["rows"]} and known["rounds"] >= rounds:
        return
    files = {row: str(task.file(row)) for row in rows}
    told = task.step(
        "speed",
        "speed",
        files=files,
        windows=task.windows,
        threads=threads,
        rounds=rounds,
        deadline=deadline,
        target=target,
    )
    if told:
        print(f"speed{told}", flush=True)


def _mebibytes(facts: dict[str, float]) -> str:
    return f"{facts['bytes'] / 2**20:.1f}"


def _print(task: Task, rows: list[str]) -> None:
    path = task.output / "speed.json"
    measured = json.loads(path.read_text()) if path.is_file() else None
    measured = measured or {"threads": 0, "rounds": 0, "rows": {}}
    how = f"{measured['threads']} threads, median of {measured['rounds']} rounds"
    print(f"speed: prompt and generated in tokens/s; {how}")
    print("| file | MiB | perplexity | prompt | generated |\n|---|---|---|---|---|")
    facts = {row: json.loads(task.result(row).read_text()) for row in rows}
    for row in sorted(facts, key=lambda row: facts[row]["bytes"]):
        speed = measured["rows"].get(row)
        cells = [_mebibytes(facts[row]), f"{facts[row]['perplexity']:.3f}"]
        cells += [f"{speed[key]:.0f}" if speed else "" for key in ("prompt", "generated")]
        print(f"| {row} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    sys.exit(main())
