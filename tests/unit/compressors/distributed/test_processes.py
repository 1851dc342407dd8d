"""How processes divide work, and that sums do not depend on their number."""

from collections import Counter
from pathlib import Path

import pytest
import torch
from tests.forked_processes import Forked
from torch import Tensor

from lrc.compressors.distributed.launch import join
from lrc.compressors.distributed.processes import ALONE, OrderedSum, Processes

# Newer Pythons warn of any fork with threads; those of torch are idle.
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")

BATCHES = 5


@pytest.mark.parametrize("size", [1, 2, 3, 8])
@pytest.mark.parametrize("count", [0, 2, 5, 16])
def test_every_number_belongs_to_one_process(size, count):
    everyone = [Processes(rank, size) for rank in range(size)]
    for divide in (Processes.block, Processes.turn):
        parts = [divide(each, count) for each in everyone]
        assert sorted(n for part in parts for n in part) == list(range(count))
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
    blocks = [n for each in everyone for n in each.block(count)]
    assert blocks == list(range(count))


def test_costs_are_balanced():
    costs = [16.0, 1.0, 1.0, 16.0, 14.0, 14.0, 4.0]
    owners = Processes(0, 2).owners(costs)
    totals = Counter[int]()
    for owner, cost in zip(owners, costs, strict=True):
        totals[owner] += cost
    assert max(totals.values()) <= 36  # of 66
    assert ALONE.owners(costs) == [0] * len(costs)


def batch(number: int) -> Tensor:
    """Return numbers of very different size, of which the order of addition changes the sum."""
    generator = torch.Generator().manual_seed(number)
    return torch.randn(50, generator=generator) * 10 ** torch.randn(50, generator=generator)


def sums(processes: Processes) -> dict[str, Tensor]:
    """Return the sums of all batches, by both ways to add them; in the last process only."""
    ordered = OrderedSum(processes, BATCHES)
    for number in processes.turn(BATCHES):
        ordered.add_({"in turn": batch(number)})
    running: dict[str, Tensor] = {}
    counts = Counter[str]()
    with processes.continued(running, counts):
        for number in processes.block(BATCHES):
            running["blocks"] = running.get("blocks", torch.zeros(50)) + batch(number)
            counts["batches"] += 1
    found = running | {"count": torch.tensor(counts["batches"])}
    return found | ordered.total()


@pytest.mark.parametrize("size", [2, 3])
def test_sums_do_not_depend_on_the_number_of_processes(size, tmp_path: Path):
    def work() -> None:
        processes = join("cpu")
        found = sums(processes)
        assert processes.gather(processes.rank) == list(range(size))
        assert processes.agree(processes.rank) == 0
        odd = {"odd": torch.arange(3, dtype=torch.int16), "one": torch.tensor(2.5).bfloat16()}
        empty = dict[str, Tensor]()
        moved, fact = processes.exchange(1, odd if processes.rank == 1 else empty, processes.rank)
        assert fact == 1
        assert all(torch.equal(moved[key], tensor) for key, tensor in odd.items())
        if processes.last:
            torch.save(found, tmp_path / "found")
        processes.barrier()

    forked = Forked(tmp_path, [work] * size)
    assert forked.wait() == [0] * size, forked.printed(0)
    found, alone = torch.load(tmp_path / "found"), sums(ALONE)
    assert found.keys() == alone.keys() == {"in turn", "blocks", "count"}
    assert all(torch.equal(found[key], alone[key]) for key in alone)
    backwards = sum(batch(number) for number in reversed(range(BATCHES)))
    assert not torch.equal(alone["in turn"], backwards)  # the order matters
