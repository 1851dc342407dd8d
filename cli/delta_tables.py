"""The sizes and errors of a delta, as a table."""

from math import prod
from typing import Any

from lrc.cli.quality import OUT, new_table
from lrc.cli.tables import LAYER_NUMBER
from lrc.compressors.io.natural_order import natural
from lrc.configs.size import size_text


def print_delta(facts: dict[str, Any], *, every: bool = False) -> None:
    """Print the facts of a delta, with the error of every tensor if it has just been made.

    Tensors that differ only in the number of their layer share a row, unless `every` is set.
    """
    alike: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for each in sorted(facts["tensors"], key=lambda each: natural(each["name"])):
        name = each["name"] if every else LAYER_NUMBER.sub(".*.", each["name"], count=1)
        shape = " x ".join(map(str, each["shape"]))
        alike.setdefault((name, shape, each["codec"]), []).append(each)
    measured = all("relative_error" in each for each in facts["tensors"])
    columns = ("tensor", "layers", "shape", "stored", "bits/number", "largest error")
    title = f"{facts['path']} ({facts['method']['method']}, {facts['kind']})"
    table = new_table(title, *(columns if measured else columns[:-1]))
    for (name, shape, codec), group in alike.items():
        bits = sum(each["bits"] for each in group)
        numbers = sum(prod(each["shape"]) for each in group)
        cells = [str(len(group)), shape, codec.replace("_", " "), f"{bits / numbers:.3f}"]
        if measured:
            cells.append(f"{max(each['relative_error'] for each in group):.1%}")
        table.add_row(name, *cells)
    OUT.print(table)
    sizes = facts["sizes"]
    OUT.print(
        f"{sizes['numbers']:,} numbers in {size_text(sizes['bits'] // 8)}: "
        f"{sizes['bits_per_number']:.3f} bits each, {sizes['ratio']:.1f} times smaller than in 16 "
        f"bits; all files {size_text(facts['file_bytes'])}; relative error "
        f"{sizes['relative_error']:.1%}"
        + (f", {sizes['weighted_error']:.1%} as calibrated" if "weighted_error" in sizes else "")
    )
