"""Text that the dense model writes where a text is shorter than the training."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from lrc.compressors.heal.extended_text import extended, random_pieces
from lrc.compressors.heal.held_out import TrainingText
from lrc.compressors.heal.text_request import text_requests
from lrc.compressors.io.journal import Journal
from lrc.configs.heal import Distill
from lrc.configs.recipe import Calibration

WINDOWS = torch.arange(160).view(20, 8)


@pytest.mark.parametrize("bos", [None, 0])
def test_pieces_are_those_of_random_places(bos: int | None) -> None:
    pieces = random_pieces(WINDOWS, 500, seed=1, bos=bos)
    assert not torch.equal(pieces, random_pieces(WINDOWS, 500, seed=2, bos=bos))
    if bos is not None:
        assert not pieces[:, 0].any()
        pieces = pieces[:, 1:]
    assert torch.equal(pieces, pieces[:, :1] + torch.arange(4))  # consecutive numbers
    places = (pieces[:, 0] % 8).unique().tolist()
    assert places == [*range(bos is not None, 5)]  # never over the end of a window
    assert len((pieces[:, 0] // 8).unique()) == 20


def test_every_window_of_the_text_is_used_once_and_the_others_are_written_once(
    tmp_path: Path,
) -> None:
    calls = []

    def write(starts: Tensor, length: int) -> Tensor:
        calls.append(starts)
        return torch.cat([starts, torch.full((len(starts), length - starts.shape[1]), 7)], dim=1)

    journal = Journal(tmp_path)
    text = TrainingText(WINDOWS, WINDOWS[:0], {"source": "mine", "training_tokens": 160})

    def found(steps: int) -> TrainingText:
        options = Distill(method="distill", batch=2, steps=steps, extend=True)
        (request,) = text_requests(
            "stages[1].heal", options, Calibration(length=8), stage=1, seed=3, device="cpu"
        )
        return extended(text, request, journal, bos=None, continue_=write)

    assert found(10) is text
    longer = found(13)
    assert torch.equal(longer.training[:20], WINDOWS)
    assert longer.training.shape == (26, 8)
    assert torch.equal(longer.training[20:, :4], calls[0])
    assert longer.facts == {"source": "mine", "training_tokens": 208, "written_tokens": 48}
    assert torch.equal(found(13).training, longer.training)
    assert len(calls) == 1  # a run that is continued trains on the same text
