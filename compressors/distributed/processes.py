"""What the processes of a run exchange, and how they divide work.

Work is divided so that results do not depend on the number of processes. Every batch of windows is
computed by one process, and the sums over batches are added in the order of the batches, either

* by `Processes.continued`: every process has consecutive batches. It continues the running sums of
  the process before it and passes them on. No process waits for long, because it is as many layers
  behind the first one as there are processes before it.
* by `OrderedSum`: processes take batches in turn, and the total goes around.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

from lrc.compressors.distributed.watch import Watch
from lrc.configs.errors import ProcessLost

T = TypeVar("T")


class Processes:
    """The processes of a run, seen from one of them; by default, it is the only one.

    Every method that communicates must be called by all processes in the same order. All of them
    raise `ProcessLost` if another process has ended.

    Parameters
    ----------
    rank : int
        Number of this process.
    size : int
        Number of processes.
    device : str
        Where the tensors that are exchanged live.
    control : ProcessGroup, optional
        Group for Python objects, on the CPU; None for a single process.
    tensors : ProcessGroup, optional
        Group for tensors on the device; None for a single process.
    on_host : int, optional
        Number of processes on this host, by default all.
    """

    def __init__(
        self,
        rank: int = 0,
        size: int = 1,
        device: str = "cpu",
        control: Any = None,
        tensors: Any = None,
        on_host: int | None = None,
    ) -> None:
        self.rank, self.size, self.device = rank, size, device
        self.on_host = size if on_host is None else on_host
        self.watch: Watch | None = None
        self._control, self._tensors = control, tensors
        self._sent: list[tuple[Any, Tensor]] = []

    @property
    def alone(self) -> bool:
        """Whether there is one process."""
        return self.size == 1

    @property
    def first(self) -> bool:
        """Whether this process writes the results."""
        return self.rank == 0

    @property
    def last(self) -> bool:
        """Whether this process has the sums of all after `continued`."""
        return self.rank == self.size - 1

    def block(self, count: int) -> range:
        """Return consecutive numbers below `count`, those of this process."""
        ends = [count * rank // self.size for rank in (self.rank, self.rank + 1)]
        return range(*ends)

    def turn(self, count: int) -> range:
        """Return every `size`-th number below `count`, those of this process."""
        return range(self.rank, count, self.size)

    def owners(self, costs: Sequence[float]) -> list[int]:
        """Return the process of each piece of work, so that all have about the same total cost."""
        totals, owners = [0.0] * self.size, [0] * len(costs)
        for number in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
            owners[number] = totals.index(min(totals))
            totals[owners[number]] += costs[number]
        return owners

    def agree(self, value: T) -> T:
        """Return the value that the first process has."""
        return value if self.alone else self._broadcast_object(value, 0)

    def gather(self, value: T) -> list[T]:
        """Return the values of all processes."""
        if self.alone:
            return [value]
        found: list[Any] = [None] * self.size
        with _communication():
            dist.all_gather_object(found, value, group=self._control)
        return found

    def barrier(self) -> None:
        """Wait for all processes."""
        if not self.alone:
            self._finish_sending()
            with _communication():
                dist.barrier(group=self._control)

    @contextmanager
    def continued(self, sums: dict[str, Tensor], counts: Counter[str]) -> Iterator[None]:
        """Add to the sums and counts of the processes before this one inside the context.

        They are passed on at its end; only the last process then has those of all.
        """
        if not self.first:
            tensors, facts = self._receive(self.rank - 1)
            sums.update(tensors)
            counts.update(facts)
        yield
        if not self.last:
            self._send(self.rank + 1, sums, dict(counts))

    def exchange(
        self, owner: int, tensors: Mapping[str, Tensor], facts: T
    ) -> tuple[dict[str, Tensor], T]:
        """Return tensors and facts of the process `owner`; on its device if it is this process."""
        if self.alone:
            return dict(tensors), facts
        layout, facts = self._broadcast_object((_layout(tensors), facts), owner)
        mine = self.rank == owner
        found = {}
        for name, (shape, dtype) in layout.items():
            tensor = tensors[name].to(self.device) if mine else self._empty(shape, dtype)
            tensor = tensor.contiguous()
            with _communication():
                dist.broadcast(_bytes(tensor), owner, group=self._tensors)
            found[name] = tensors[name] if mine else tensor
        return found, facts

    def send(self, to: int, tensors: Mapping[str, Tensor]) -> None:
        """Send tensors to a process that calls `receive_like`; they must not be changed."""
        self._finish_sending()
        for tensor in tensors.values():
            content = _bytes(tensor.contiguous())
            with _communication():
                self._sent.append((dist.isend(content, to, group=self._tensors), content))

    def receive_like(self, source: int, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return tensors from a process that calls `send`, of the shapes of `tensors`."""
        found = {name: torch.empty_like(tensor) for name, tensor in tensors.items()}
        for tensor in found.values():
            with _communication():
                dist.recv(_bytes(tensor), source, group=self._tensors)
        return found

    def _send(self, to: int, tensors: Mapping[str, Tensor], facts: Any) -> None:
        with _communication():
            dist.send_object_list([(_layout(tensors), facts)], to, group=self._control)
        self.send(to, tensors)

    def _receive(self, source: int) -> tuple[dict[str, Tensor], Any]:
        box: list[Any] = [None]
        with _communication():
            dist.recv_object_list(box, source, group=self._control)
        layout, facts = box[0]
        empty = {name: self._empty(*each) for name, each in layout.items()}
        return self.receive_like(source, empty), facts

    def _finish_sending(self) -> None:
        with _communication():
            for work, _ in self._sent:
                work.wait()
        self._sent.clear()

    def _broadcast_object(self, value: T, owner: int) -> T:
        box = [value]
        with _communication():
            dist.broadcast_object_list(box, owner, group=self._control)
        return box[0]

    def _empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return torch.empty(list(shape), dtype=dtype, device=self.device)


ALONE = Processes()
"""A run in one process."""


class OrderedSum:
    """Sums of batches that processes compute in turn, added in the order of the batches.

    Parameters
    ----------
    processes : Processes
    n_batches : int
        Of all processes; this one computes those in ``processes.turn(n_batches)``.
    """

    def __init__(self, processes: Processes, n_batches: int) -> None:
        self._processes, self._n_batches = processes, n_batches
        self._number = processes.rank
        self._total: dict[str, Tensor] = {}

    def add_(self, sums: dict[str, Tensor]) -> None:
        """Add the sums of the next batch of this process; they are overwritten."""
        number, size = self._number, self._processes.size
        if number > 0:
            before = self._total
            if size > 1:
                before = self._processes.receive_like((number - 1) % size, sums)
            for key, total in before.items():
                sums[key] += total
        if size > 1 and number + 1 < self._n_batches:
            self._processes.send((number + 1) % size, sums)
        self._total = sums
        self._number += size

    def total(self) -> dict[str, Tensor]:
        """Return the sums of all batches, after the last one."""
        owner = (self._n_batches - 1) % self._processes.size
        return self._processes.exchange(owner, self._total, None)[0]


@contextmanager
def _communication() -> Iterator[None]:
    """Turn the errors of a lost connection into `ProcessLost`."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise ProcessLost("another process of the run has ended") from error


def _layout(tensors: Mapping[str, Tensor]) -> dict[str, tuple[list[int], torch.dtype]]:
    return {name: (list(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}


def _bytes(tensor: Tensor) -> Tensor:
    """Return the memory of a contiguous tensor: gloo does not know every dtype."""
    return tensor.view(-1).view(torch.uint8)
