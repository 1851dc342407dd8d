import pytest
import torch

from lrc.compressors.heal.held_out import (
    TOKENS_PER_SECOND,
    TextRequest,
    TrainingText,
    repetition_warning,
    split,
)
from lrc.configs.errors import DataError
from lrc.configs.heal import Block, Distill, HealBase
from lrc.configs.recipe import Calibration


def request(options: HealBase) -> TextRequest:
    return TextRequest("stages[1].heal", options, Calibration(length=8), 1, seed=3, device="cpu")


def distill(**options: int) -> TextRequest:
    return request(Distill(method="distill", batch=2, **options))


WINDOWS = torch.arange(160).view(20, 8)


def test_held_out_windows_are_never_trained_on_and_evenly_spaced() -> None:
    training, held_out = split(WINDOWS, distill(held_out=32, steps=100))
    assert held_out[:, 0].tolist() == [0, 40, 80, 120]
    assert len(training) == 16
    assert {*training.flatten().tolist()}.isdisjoint(held_out.flatten().tolist())


def test_no_more_windows_are_taken_than_are_trained_on() -> None:
    wanted = distill(held_out=32, steps=3)
    training, _ = split(WINDOWS, wanted)
    assert len(training) == wanted.wanted == 6
    assert torch.equal(training, split(WINDOWS, wanted)[0])
    block = request(Block(method="block", batch=2, samples=5, held_out=32))
    assert len(split(WINDOWS, block)[0]) == 5


@pytest.mark.parametrize(("n_windows", "remedy"), [(4, "at most 24"), (1, "heal.length")])
def test_a_text_that_leaves_nothing_to_train_on_is_refused(n_windows: int, remedy: str) -> None:
    with pytest.raises(DataError, match=remedy) as raised:
        split(WINDOWS[:n_windows], distill(held_out=32))
    assert "stages[1].heal.held_out" in str(raised.value)


def test_tokens_are_rounded_up_to_whole_steps() -> None:
    options = Distill(method="distill", batch=2, tokens=33)
    assert options.number_of_steps(8) == 3
    assert Distill(method="distill").number_of_steps(8) == 150
    assert Block(method="block").number_of_steps(8) == 100
    assert Block(method="block", steps=0).number_of_steps(8) == 0
    assert Block(method="block", minutes=2).number_of_steps(8) is None


def test_limited_time_reads_text_by_its_length() -> None:
    short, long = (request(Distill(method="distill", minutes=m)).wanted for m in (0.001, 1.0))
    assert 0 < short < long
    assert long == 60 * TOKENS_PER_SECOND["cpu"] // 8
    assert request(Block(method="block", minutes=1.0, samples=5)).wanted == 5


def test_repetition_is_judged_by_the_steps_that_limited_time_allowed() -> None:
    limited = request(Distill(method="distill", batch=2, minutes=1.0, held_out=32))
    text = TrainingText(*split(WINDOWS, limited), {"source": "mine"})
    assert repetition_warning(limited, text) is None  # nobody knows yet
    assert repetition_warning(limited, text, 10) is None
    assert "3.8 times" in str(repetition_warning(limited, text, 30))
