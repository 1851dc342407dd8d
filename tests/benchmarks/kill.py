"""Kill `lrc compress` at random moments on a real model; every checkpoint must be the same bytes.

usage: python tests/benchmarks/kill.py RECIPE FOLDER [KILLS] [KEY=VALUE ...]

Each round runs the recipe until SIGKILL at a random moment, then again until it finishes.
"""

import hashlib
import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

IGNORED = ("lrc/report.json", "README.md")  # they hold measured seconds and memory


def hashes(checkpoint: Path) -> dict[str, str]:
    """SHA-256 of every file that must not depend on interruptions."""
    return {
        str(f.relative_to(checkpoint)): hashlib.sha256(f.read_bytes()).hexdigest()
        for f in sorted(checkpoint.rglob("*"))
        if f.is_file() and str(f.relative_to(checkpoint)) not in IGNORED
    }


def main(recipe: str, folder: str, kills: int, overrides: list[str]) -> None:
    """Run undisturbed once, then `kills` disturbed rounds; print one line per round."""
    output = Path(folder) / "run"
    command = [
        sys.executable,
        "-m",
        "lrc",
        "compress",
        recipe,
        "-q",
        f"output={output}",
        *overrides,
    ]
    shutil.rmtree(output, ignore_errors=True)
    start = time.monotonic()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    duration = time.monotonic() - start
    expected = hashes(output / "checkpoint")
    print(f"undisturbed: {duration:.0f} s, {len(expected)} files", flush=True)
    rng, same = random.Random(0), 0
    for number in range(kills):
        shutil.rmtree(output)
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        time.sleep(rng.uniform(0.05, 0.95) * duration)
        process.send_signal(signal.SIGKILL)
        killed = process.wait() == -signal.SIGKILL
        done = sorted(p.name for p in (output / "work").glob("*")) if output.exists() else []
        layers = (
            len(list((output / "work").glob("statistics/inputs*"))),
            len(list((output / "work").glob("compressed/layer*"))),
        )
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        equal = hashes(output / "checkpoint") == expected
        same += killed and equal
        facts = {"round": number, "killed": killed, "equal": equal, "layers_done": layers}
        print(json.dumps(facts | {"work": done}), flush=True)
    print(f"{same} of {kills} killed runs ended with the bytes of the undisturbed one")
    sys.exit(same != kills)


if __name__ == "__main__":
    rest = sys.argv[3:]
    count = int(rest.pop(0)) if rest and rest[0].isdecimal() else 20
    main(sys.argv[1], sys.argv[2], count, rest)
