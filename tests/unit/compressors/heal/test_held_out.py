from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from lrc.compressors.heal.held_out import TrainingText, mixed, repetition_warning, split
from lrc.compressors.heal.text_request import TOKENS_PER_SECOND, TextRequest, text_requests
from lrc.configs.errors import DataError
from lrc.configs.heal import Block, Distill, HealBase
from lrc.configs.recipe import Calibration


def requests(options: HealBase, **calibration: Any) -> list[TextRequest]:
    recipe = Calibration(length=8, **calibration)
    where = "stages[1].heal"
    return text_requests(where, options, recipe, stage=1, seed=3, device="cpu")


def request(options: HealBase) -> TextRequest:
    (single,) = requests(options)
    return single


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


@pytest.mark.parametrize(
    ("n_windows", "remedy"), [(4, "at most 24"), (1, "heal.length"), (0, "heal.length")]
)
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
    text = text_of(limited, WINDOWS)
    assert repetition_warning(limited, text) is None  # nobody knows yet
    assert repetition_warning(limited, text, 10) is None
    assert "3.8 times" in str(repetition_warning(limited, text, 30))


def text_of(single: TextRequest, windows: Tensor) -> TrainingText:
    training, held_out = split(windows, single)
    facts = {
        "source": single.source,
        "text_tokens": windows.numel(),
        "training_tokens": training.numel(),
        "held_out_tokens": held_out.numel(),
    }
    return TrainingText(training, held_out, facts)


MIXTURE = {"c4": 0.75, "self": 0.25}


def test_a_mixture_has_its_fractions_of_training_and_held_out_windows() -> None:
    options = Distill(method="distill", batch=4, steps=8, held_out=64, source=MIXTURE)
    c4, own = both = requests(options, samples=6)
    assert [each.wanted for each in both] == [24, 8]
    assert [each.n_held_out for each in both] == [6, 2]
    assert (c4.available, own.available) == (30, 6)  # few are sampled
    texts = [text_of(c4, torch.arange(320).view(40, 8)), text_of(own, -torch.arange(48).view(6, 8))]
    text = mixed(both, texts)
    assert len(text.training) == 32
    assert int((text.training.sum(dim=1) > 0).sum()) == 24
    own_windows = (text.held_out < 0).any(dim=1)
    assert own_windows.tolist() == [False, False, True, False, False, False, True, False]
    # The windows that were sampled are trained on twice.
    assert len(text.training[24:].unique(dim=0)) == 4
    assert text.facts["source"] == "75 % c4, 25 % self"
    assert text.facts["training_tokens"] == 24 * 8 + 4 * 8
    assert [each["source"] for each in text.facts["texts"]] == ["c4", "self"]
    # Text without messages counts whole next to conversations.
    assert text.training_counted is None
    c4_counted = texts[0].training % 2 > 0, texts[0].held_out % 2 > 0
    chat = replace(texts[0], training_counted=c4_counted[0], held_out_counted=c4_counted[1])
    counted = mixed(both, [chat, texts[1]])
    assert counted.training_counted is not None
    assert counted.held_out_counted is not None
    assert torch.equal(counted.training_counted, (text.training % 2 > 0) | (text.training <= 0))
    assert torch.equal(counted.held_out_counted, (text.held_out % 2 > 0) | own_windows[:, None])
    assert repetition_warning(own, texts[1], 8) is None
    assert "calibration.samples" in str(repetition_warning(own, texts[1], 12))
    assert repetition_warning(c4, texts[0], 12) is None


def test_the_text_of_the_calibration_is_used_unless_another_is_given() -> None:
    options = Distill(method="distill", batch=4, steps=8)
    found = requests(options, source=MIXTURE)
    assert [(each.source, each.key) for each in found] == [
        ("c4", "calibration.source"),
        ("self", "calibration.source"),
    ]
    (other,) = requests(Distill(method="distill", source="wikitext2"), source=MIXTURE)
    assert (other.source, other.key) == ("wikitext2", "stages[1].heal.source")
