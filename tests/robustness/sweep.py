"""Check model families one by one, each in a forked process with a time limit.

``python -m tests.robustness.sweep --table docs/models.md`` checks all families that transformers
knows and writes the tables of the documentation. With names of families, only these are checked,
and their rows replaced.
"""

import argparse
import gc
import json
import os
import resource
import select
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path

from tests.robustness.family_check import FamilyCheck, Outcome
from tests.robustness.table import with_outcomes
from tests.robustness.tiny_models import causal_families

CPU_SECONDS, SECONDS = 60, 300.0
"""Limits of one family; the second one matters on a busy machine."""


class Child:
    """A process that checks one family, which may crash or hang."""

    def __init__(self, family: str) -> None:
        self.family, self.end, self._received = family, time.monotonic() + SECONDS, b""
        self.pipe, write = os.pipe()
        self._id = os.fork()
        if self._id == 0:
            _check(family, write)
        os.close(write)

    def read(self) -> bool:
        """Read what has arrived; return whether that was the end."""
        part = os.read(self.pipe, 1 << 16)
        self._received += part
        return not part

    def ended(self) -> Outcome:
        """End the process if it has not ended, and return the outcome."""
        os.close(self.pipe)
        late = time.monotonic() > self.end
        if late:
            os.kill(self._id, signal.SIGKILL)
        _, status = os.waitpid(self._id, 0)
        if self._received and not late:
            return Outcome(**json.loads(self._received))
        how = "no end in time" if late or status == signal.SIGXCPU else f"ended with {status}"
        return Outcome(self.family, status="failed", failures=[how])


def outcomes(families: Iterable[str], jobs: int = 1) -> Iterator[Outcome]:
    """Check families in several processes at a time; yield what becomes of each."""
    waiting, running = list(families)[::-1], list[Child]()
    while waiting or running:
        while waiting and len(running) < jobs:
            running.append(Child(waiting.pop()))
        left = max(0.0, min(child.end for child in running) - time.monotonic())
        ready, _, _ = select.select([child.pipe for child in running], [], [], left)
        for child in list(running):
            if (child.pipe in ready and child.read()) or time.monotonic() > child.end:
                running.remove(child)
                yield child.ended()


def _check(family: str, write: int) -> None:
    """Check a family in this process, a child, and end it."""
    try:
        resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
        if not os.environ.get("LRC_SWEEP_TRACEBACKS"):
            silent = os.open(os.devnull, os.O_WRONLY)
            os.dup2(silent, 1)
            os.dup2(silent, 2)
        with tempfile.TemporaryDirectory() as folder, open(write, "w", encoding="utf-8") as pipe:
            warnings.simplefilter("ignore")
            json.dump(asdict(FamilyCheck(family, Path(folder)).run()), pipe)
    finally:
        sys.stdout.flush()
        os._exit(0)


def warm_up() -> None:
    """Check a family in this process, so that its children need not import and compile it all."""
    with tempfile.TemporaryDirectory() as folder:
        outcome = FamilyCheck("llama", Path(folder)).run()
    assert outcome.status == "served", outcome
    gc.collect()
    gc.freeze()  # the pipeline collects garbage after every stage: leave out what is here now


def main() -> None:
    """Run the sweep."""
    import torch
    from transformers.utils import logging

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("families", nargs="*", help="names (model_type); all if left out")
    parser.add_argument("--table", type=Path, help="page whose tables are updated")
    parser.add_argument("--json", type=Path, help="file for the outcomes, one JSON object a line")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    warm_up()
    found = []
    start = time.monotonic()
    for outcome in outcomes(options.families or sorted(causal_families()), options.jobs):
        found.append(outcome)
        notes = [outcome.reason, outcome.drop and f"drop: {outcome.drop}", *outcome.failures]
        text = " | ".join(note[:300] for note in notes if note)
        print(f"{outcome.status:<9} {outcome.seconds:5.1f} s  {outcome.family}  {text}", flush=True)
    counts = [f"{sum(o.status == s for o in found)} {s}" for s in sorted({o.status for o in found})]
    print(f"{', '.join(counts)} in {time.monotonic() - start:.0f} s")
    if options.json:
        options.json.write_text("".join(json.dumps(asdict(o)) + "\n" for o in found))
    if options.table:
        page = options.table.read_text(encoding="utf-8")
        page = with_outcomes(page, found, everything=not options.families)
        options.table.write_text(page, encoding="utf-8")
    sys.exit(any(outcome.status == "failed" for outcome in found))


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
