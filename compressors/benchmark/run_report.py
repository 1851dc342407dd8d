"""Add the results of a benchmark to the report and the model card of a compressed checkpoint.

The report has a checksum, and is there twice: in the checkpoint, and next to it in the output
folder of the run. The card has none, and may have been edited: the section is added to it, or
replaces an earlier one.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lrc.compressors.benchmark.results import PHASES, failures, slower_models
from lrc.compressors.checkpoint import format as layout
from lrc.compressors.checkpoint.manifest import CHECKSUM, read_object, report_checksum
from lrc.compressors.io.files import write_text
from lrc.configs.errors import CheckpointError, UsageError

KEY = "speed"
"""Of the report."""
START, END = "<!-- lrc bench -->", "<!-- end of lrc bench -->"
SECTION = re.compile(f"\n*{START}.*?{END}\n*", re.DOTALL)
BEFORE = "\n## Load it\n"
"""The section of a card that follows."""


def read_report(folder: Path) -> dict[str, Any]:
    """Read the report of a checkpoint.

    Raises
    ------
    CheckpointError
        If it was damaged or edited.
    """
    path = folder / layout.REPORT
    report = read_object(path)
    if report.get(CHECKSUM) != report_checksum(folder, report):
        raise CheckpointError(
            f"{path}: has changed since it was written, or belongs to another checkpoint; "
            f"{layout.COPY_AGAIN}",
            code="changed-file",
        )
    return report


def find_reports(names: list[str]) -> dict[str, Path]:
    """Return the checkpoints among models whose reports can be extended.

    Raises
    ------
    UsageError
        If there is none.
    CheckpointError
        If a report was damaged or edited.
    """
    folders = {name: Path(name).expanduser() for name in names}
    found = {name: each for name, each in folders.items() if (each / layout.REPORT).is_file()}
    if not found:
        raise UsageError(
            "--report: adds to the reports of checkpoints that lrc compressed, and no model has "
            f"one ({layout.REPORT}); give the folder OUTPUT/checkpoint of a run"
        )
    for folder in found.values():
        read_report(folder)
    return found


def add_speed(folder: Path, name: str, benchmark: dict[str, Any]) -> list[Path]:
    """Write the results of one model into its report and card, in place of earlier ones.

    Parameters
    ----------
    folder : Path
        The checkpoint.
    name : str
        What `benchmark` calls it.
    benchmark : dict
        The JSON of `results_json`.

    Returns
    -------
    list of Path
        The files that were written.

    Raises
    ------
    CheckpointError, OutputError
    """
    report = read_report(folder)
    before = report[CHECKSUM]
    speed = results_of(name, benchmark)
    report[KEY] = speed
    report[CHECKSUM] = report_checksum(folder, report)
    text = json.dumps(report, indent=1, allow_nan=False) + "\n"
    files = {folder / layout.REPORT: text, **_cards(folder, speed)}
    output = folder.resolve().parent
    if _is_copy(output / "report.json", before):
        files |= {**_cards(output, speed), output / "report.json": text}
    for path, content in files.items():
        write_text(path, content)
    return [*files]


def results_of(name: str, benchmark: dict[str, Any]) -> dict[str, Any]:
    """Return a benchmark reduced to one model and the dense one."""
    kept = {name, benchmark["against"]}
    return {
        **benchmark,
        "models": [each for each in benchmark["models"] if each["name"] in kept],
        "results": [each for each in benchmark["results"] if each["model"] in kept],
    }


def section(speed: dict[str, Any]) -> str:
    """Return the section of a card about the speed of its model."""
    environment, settings = speed["environment"], speed["settings"]
    threads = f", {environment['threads']} threads" if environment["device"] == "cpu" else ""
    head = ["mode", "batch", "prompt", "new tokens", "model"]
    head += [f"{phase} tokens/s{ratio}" for phase in PHASES for ratio in ("", ", of dense")]
    lines = [
        START,
        "## Speed",
        "",
        f"Measured by `lrc bench` on {environment['device']}{threads}, {settings['dtype']}; "
        "medians. A ratio below 1 is slower than dense.",
        "",
        f"| {' | '.join(head)} |",
        "|---" * len(head) + "|",
        *_rows(speed),
        "",
        *(f"**{line}**\n" for line in _slower(speed)),
        *(f"{line}\n" for line in _slow_forms(speed)),
        END,
    ]
    return "\n".join(lines)


def _rows(speed: dict[str, Any]) -> Iterator[str]:
    for each in speed["results"]:
        if each["repeated"]:
            continue
        point = [each["mode"], each["batch"], f"{each['prompt']:,}", f"{each['tokens']:,}"]
        cells = [*point, "dense" if each["model"] == speed["against"] else "this model"]
        for phase in PHASES:
            found = each[phase]
            if found is None:
                cells += ["failed", ""]
                continue
            ratio = "" if found["ratio"] is None else f"{found['ratio']:.2f}x"
            words = {"slower": " slower", "equal": " within noise"}
            cells += [f"{found['median']:,.1f}", ratio + words.get(found["verdict"] or "", "")]
        yield f"| {' | '.join(map(str, cells))} |"


def _slower(speed: dict[str, Any]) -> Iterator[str]:
    yield from (f"{each}." for each in failures(speed))
    if not any(each[p] and each[p]["verdict"] for each in speed["results"] for p in PHASES):
        yield "Not compared with the dense model."
        return
    found = slower_models(speed)
    for each in found:
        places = "; ".join(each.places)
        yield f"Slower than dense in {len(each.places)} of {each.compared} measurements: {places}."
    if not found:
        yield "In no measurement slower than dense."


def _slow_forms(speed: dict[str, Any]) -> Iterator[str]:
    for model in speed["models"]:
        for each in model["slow_forms"]:
            yield (
                f"No fast path: {each['form']} in {each['layers']} layers, such as "
                f"`{each['example']}` ({each['reason']})."
            )


def _cards(folder: Path, speed: dict[str, Any]) -> dict[Path, str]:
    """Return the card of a folder with the section; nothing if there is no card."""
    path = folder / "README.md"
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return {}
    return {path: with_section(text, section(speed))}


def with_section(card: str, new: str) -> str:
    """Return a card with a new section about speed, in place of an earlier one."""
    if SECTION.search(card):
        return SECTION.sub(lambda _: f"\n\n{new}\n\n", card, count=1)
    before, found, after = card.partition(BEFORE)
    rest = f"\n{found.lstrip()}{after}" if found else ""
    return f"{before.rstrip()}\n\n{new}\n{rest}"


def _is_copy(path: Path, checksum: str) -> bool:
    """Return whether a file is the report with this checksum."""
    try:
        return path.is_file() and read_object(path).get(CHECKSUM) == checksum
    except CheckpointError:
        return False
