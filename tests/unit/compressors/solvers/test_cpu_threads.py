"""Short operations use one thread each, and the number of threads comes back."""

from collections.abc import Iterator

import pytest
import torch

from lrc.compressors.solvers.cpu_threads import map_in_threads, one_thread

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_parts_are_computed_by_one_thread_each_and_returned_in_order() -> None:
    def work(number: int) -> tuple[int, int, bool]:
        return number, torch.get_num_threads(), torch.is_grad_enabled()

    assert map_in_threads(work, range(7), CPU) == [(number, 1, False) for number in range(7)]
    assert torch.get_num_threads() == 2


def test_an_error_is_raised_and_the_threads_come_back() -> None:
    with pytest.raises(ZeroDivisionError):
        map_in_threads(lambda number: 1 // number, [1, 0], CPU)
    with pytest.raises(KeyError), one_thread(CPU):
        raise KeyError
    assert torch.get_num_threads() == 2
