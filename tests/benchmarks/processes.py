"""Time `lrc compress` in one and in several processes, and compare the checkpoints.

usage: python tests/benchmarks/processes.py [--preset llama-3-8b] [--layers 8] [--method kfac] ...
       python tests/benchmarks/processes.py --runs one last --layers 2
       python tests/benchmarks/processes.py --kills 10 --preset tiny --device cpu

The random model and its text are those of shapes.py. Runs are processes of their own, started with
the environment and the module path of this one: one process, then several with
``torch.distributed.run``, one per GPU, then one process on the last GPU; ``--runs`` selects some of
them. Prints one JSON object per run: seconds per stage, how many times faster than the first run
each stage is, peak memory of the first process, and which files of the checkpoint have other bytes
than those of the first run.

With ``--kills``, one of several processes is killed at random moments instead; each time, a single
process continues the run.
"""

import argparse
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import shapes
import torch
from run_folder import run_folder

from lrc.cli import console
from lrc.compressors.io.machine import Machine, release_memory
from lrc.configs.yaml_text import write_yaml

IGNORED = ("lrc/report.json", "README.md")  # they contain measured seconds and memory
LAUNCHER = "torch.distributed.run"
RUNS = ("one", "several", "last")
LOG_LINES = 80
"""Of a run that fails, that are shown: the error is above the traceback of the launcher."""
ENDING_SECONDS = 20
"""Time in which a run that is interrupted must end."""


def hashes(checkpoint: Path) -> dict[str, str]:
    """Return the SHA-256 of every file that must be the same."""
    return {
        str(f.relative_to(checkpoint)): hashlib.sha256(f.read_bytes()).hexdigest()
        for f in sorted(checkpoint.rglob("*"))
        if f.is_file() and str(f.relative_to(checkpoint)) not in IGNORED
    }


class Runs:
    """Runs of one recipe in its folder."""

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        self._folder, self._set = folder, args.set
        self.output = folder / "run"
        self._verbose, self._log = args.verbose, folder / "log.txt"
        own = str(Path(__file__).parent)
        paths = [path for path in sys.path if path and path != own]
        self._environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
        # Of every process in every run: on a CPU, the last digits depend on it.
        self._environment["OMP_NUM_THREADS"] = str(args.threads)

    def start(self, processes: int, device: str) -> "subprocess.Popen[bytes]":
        """Start a run; what is in the output folder is used."""
        command = [sys.executable]
        if processes > 1:
            # A port of its own: a run that was killed may still hold the default one.
            port = random.randint(20_000, 30_000)
            command += ["-m", LAUNCHER, f"--nproc-per-node={processes}", f"--master-port={port}"]
        command += ["-m", "lrc", "compress", str(self._folder / "recipe.yaml")]
        command += [f"--device={device}", f"output={self.output}", *self._set]
        with self._log.open("w") as log:
            errors = sys.stderr if self._verbose else log
            return subprocess.Popen(
                command, env=self._environment, stdout=subprocess.DEVNULL, stderr=errors
            )

    def finish(self, processes: int, device: str) -> tuple[float, dict[str, Any]]:
        """Run to the end; return the seconds of everything, and the report."""
        begun = time.monotonic()
        run = self.start(processes, device)
        try:
            code = run.wait()
        except BaseException:  # it would go on using the device, and the files of the next run
            run.terminate()
            with suppress(subprocess.TimeoutExpired):
                run.wait(ENDING_SECONDS)
            run.kill()
            raise
        if code:
            last = self._log.read_text(errors="replace").splitlines()[-LOG_LINES:]
            failed = f"a run of {processes} processes on {device} ended with exit code {code}"
            sys.exit("\n".join([*last, failed]))
        report: dict[str, Any] = json.loads((self.output / "report.json").read_text())
        return time.monotonic() - begun, report


def prepare(args: argparse.Namespace, folder: Path) -> None:
    """Make the model, the text and the recipe."""
    sizes = dict(zip(shapes.SIZES, shapes.PRESETS[args.preset], strict=True))
    sizes["num_hidden_layers"] = args.layers or sizes["num_hidden_layers"]
    layers, device = sizes["num_hidden_layers"], Machine(args.device).chosen
    (folder / "model").mkdir()
    shapes.RandomModel.llama(sizes, device, layers).save(folder / "model")
    loaded = shapes.recipe_of(args, str(folder / "model"), folder)
    n_tokens = 3 * args.samples * args.length  # windows start anywhere
    shapes.write_text(folder / "text.txt", str(folder / "model"), n_tokens)
    recipe = json.loads(loaded.recipe.model_dump_json(exclude_unset=True))
    (folder / "recipe.yaml").write_text(write_yaml(recipe))
    release_memory()


def compare(args: argparse.Namespace, runs: Runs) -> bool:
    """Print a JSON object for every run; return whether all checkpoints are the same."""
    several, on_gpu = args.processes, args.device.startswith("cuda")
    last = f"cuda:{torch.cuda.device_count() - 1}" if on_gpu else args.device
    plan = {
        "one": (1, "cuda:0" if on_gpu else args.device, "one process"),
        "several": (several, "cuda" if on_gpu else args.device, f"{several} processes"),
        "last": (1, last, "last GPU"),
    }
    first: dict[str, Any] = {}
    same = True
    for wanted in args.runs:
        processes, device, name = plan[wanted]
        shutil.rmtree(runs.output, ignore_errors=True)
        total, report = runs.finish(processes, device)
        stages = report["timing"]["seconds"]
        seconds = {**stages, "stages": sum(stages.values()), "with imports": total}
        files = hashes(runs.output / "checkpoint")
        first = first or {"seconds": seconds, "files": files}
        faster = {k: round(first["seconds"][k] / v, 2) for k, v in seconds.items() if v > 0}
        differing = [n for n in first["files"] if files.get(n) != first["files"][n]]
        same &= not differing
        rounded = {key: round(value, 2) for key, value in seconds.items()}
        facts = {"run": name, "device": device, "seconds": rounded, "times faster": faster}
        facts["memory"] = {"estimate": report["estimate"]["peak"], "actual": report["memory"]}
        print(json.dumps({**facts, "files that differ": differing}), flush=True)
    return same


def kill(args: argparse.Namespace, runs: Runs) -> bool:
    """Print a JSON object for every kill; return whether all checkpoints are the same."""
    duration, _ = runs.finish(args.processes, args.device)
    expected, same = hashes(runs.output / "checkpoint"), True
    draw = random.Random(0)
    for number in range(args.kills):
        shutil.rmtree(runs.output)
        launcher = runs.start(args.processes, args.device)
        time.sleep(draw.uniform(0.1, 0.95) * duration)
        victim = draw.choice(children(launcher.pid) or [0])
        if victim:
            with suppress(ProcessLookupError):
                os.kill(victim, signal.SIGKILL)
        killed = time.monotonic()
        code = launcher.wait()
        ended = time.monotonic() - killed
        runs.finish(1, f"{args.device}:0" if args.device == "cuda" else args.device)
        equal = hashes(runs.output / "checkpoint") == expected
        same &= equal
        facts = {"kill": number, "exit code": code, "seconds until all ended": round(ended, 1)}
        print(json.dumps({**facts, "equal": equal}), flush=True)
    return same


def children(process: int) -> list[int]:
    """Return the ids of the processes that a process has started (Linux)."""
    listed = Path(f"/proc/{process}/task/{process}/children")
    return [int(found) for found in re.findall(r"\d+", listed.read_text())]


def main() -> None:
    """Parse the command line, run, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--preset", choices=shapes.PRESETS, default="llama-3-8b")
    parser.add_argument("--layers", type=int, help="fewer (or more) layers than the preset has")
    parser.add_argument("--method", default="kfac")
    parser.add_argument("--keep", type=float, default=0.8)
    parser.add_argument("--samples", type=int, default=128, help="calibration windows")
    parser.add_argument("--length", type=int, default=1024, help="tokens a window")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override")
    parser.add_argument("--compensate", action="store_true", help="with error compensation")
    parser.add_argument("--evaluate", type=int, metavar="WINDOWS", help="evaluate, too")
    parser.add_argument("--device", default="cuda", help="cuda or cpu")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of every process")
    parser.add_argument("--runs", nargs="+", choices=RUNS, help="by default all; on a CPU no last")
    parser.add_argument("--kills", type=int, default=0)
    parser.add_argument("--folder", help="an existing one, in which a temporary one is made")
    parser.add_argument("--verbose", action="store_true", help="show what the runs print")
    args = parser.parse_args()
    args.runs = args.runs or (RUNS if args.device.startswith("cuda") else RUNS[:-1])
    with run_folder("processes", args.folder) as folder:
        prepare(args, folder)
        runs = Runs(args, folder)
        same = kill(args, runs) if args.kills else compare(args, runs)
    sys.exit(not same)


if __name__ == "__main__":
    with console.quiet_libraries():
        console.quiet_transformers()
        main()
