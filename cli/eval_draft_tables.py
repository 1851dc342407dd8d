"""The results of `lrc eval --draft` as tables."""

from typing import Any

from lrc.cli.quality import OUT, new_table
from lrc.configs.size import size_text


def print_drafting(found: dict[str, Any]) -> None:
    """Print acceptance by text and position, speeds, exactness and memory."""
    drafts = found["settings"]["drafts"]
    positions = [f"draft {i + 1}" for i in range(drafts)]
    columns = ("text", "rounds", "accepted", *positions, "tokens per round")
    table = new_table(f"{found['drafter']} drafts for {found['parent']}", *columns)
    for name, entry in found["acceptance"].items():
        rates = ["" if each is None else f"{each:.1%}" for each in entry["by_position"]]
        cells = (f"{entry['rounds']:,}", f"{entry['rate']:.1%}", *rates)
        table.add_row(name, *cells, f"{entry['tokens_per_round']:.2f}")
    OUT.print(table)
    table = new_table("tokens per second, without the prompt", "", "parent", "with drafter", "")
    for entry in found["speed"]:
        speeds = (f"{entry[f'{who}_tokens_per_second']:.1f}" for who in ("parent", "pair"))
        table.add_row(entry["loop"], *speeds, f"{entry['ratio']:.2f}x")
    OUT.print(table)
    for loop, entry in found["exact"].items():
        OUT.print(f"{loop}: {exactness(entry)}", markup=False)
    memory = {name: size_text(size) for name, size in found["memory"].items()}
    OUT.print(
        f"weights: parent {memory['parent']}, drafter {memory['drafter']}, of which "
        f"{memory['shared']} are those of the parent; together {memory['together']}"
    )


def exactness(entry: dict[str, Any]) -> str:
    """Return in words whether the pair writes what the parent writes."""
    texts, differ = entry["texts"], entry["differ"]
    if not differ:
        return f"the same tokens as the parent alone in all {texts} texts"
    ties = sum(each["tie"] for each in differ)
    text = f"{len(differ)} of {texts} texts differ from those of the parent alone"
    if ties == len(differ):
        largest = max(differ, key=lambda each: each["gap"])
        return (
            f"{text}, where its two most likely tokens are equal up to rounding (logits differ by "
            f"at most {largest['gap']:.2g}; their precision is {largest['rounding']:.2g})"
        )
    return f"{text}, {len(differ) - ties} of them by more than rounding explains"
