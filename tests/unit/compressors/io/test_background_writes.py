"""Writes in threads: bounded, complete at the end, and their errors are not lost."""

from collections.abc import Callable
from threading import Event, Lock

import pytest

from lrc.compressors.io import background_writes
from lrc.compressors.io.background_writes import BackgroundWrites


@pytest.fixture(autouse=True)
def in_background(monkeypatch):
    monkeypatch.setattr(background_writes, "DEVICE_TYPES", {"cpu"})


def test_no_more_is_written_at_once_than_there_is_room_for(monkeypatch):
    monkeypatch.setattr(background_writes, "BYTES", 10)
    monkeypatch.setattr(background_writes, "THREADS", 4)
    lock, held, most, done = Lock(), [0], [0], list[int]()

    def write(number: int, size: int) -> None:
        with lock:
            done.append(number)
            held[0] -= size

    def prepare(number: int, size: int) -> Callable[[], None]:
        with lock:
            held[0] += size
            most[0] = max(most[0], held[0])
        return lambda: write(number, size)

    sizes = [4, 3, 12, 5, 5, 1, 9, 2]
    with BackgroundWrites("cpu") as writes:
        for number, size in enumerate(sizes):
            writes.add(size, lambda number=number, size=size: prepare(number, size))
    assert sorted(done) == list(range(len(sizes)))
    assert most[0] <= 12  # the largest one, which is alone


def fail() -> None:
    raise OSError("full")


def test_an_error_of_a_write_is_raised_by_the_next_wait():
    writes = BackgroundWrites("cpu")
    writes.add(1, lambda: fail)
    with pytest.raises(OSError, match="full"):
        writes.finish()
    writes.add(1, lambda: fail)
    with pytest.raises(OSError, match="full"), writes:
        pass


def test_another_error_waits_for_writes_and_is_not_replaced():
    begun, done = Event(), list[int]()

    def slow() -> None:
        begun.wait(10)
        done.append(1)

    def work() -> None:
        with BackgroundWrites("cpu") as writes:
            writes.add(1, lambda: slow)
            writes.add(1, lambda: fail)
            begun.set()
            raise KeyError

    with pytest.raises(KeyError):
        work()
    assert done == [1]


def test_nothing_is_in_the_background_of_a_cpu(monkeypatch):
    monkeypatch.setattr(background_writes, "DEVICE_TYPES", {"cuda"})
    done = list[int]()
    with BackgroundWrites("cpu") as writes:
        writes.add(1, lambda: lambda: done.append(1))
        assert done == [1]
