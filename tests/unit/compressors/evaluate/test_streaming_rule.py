"""When models are evaluated one layer at a time."""

import pytest

from lrc.compressors.evaluate.streaming_rule import FRACTION, ModelBytes, streams, why_too_large
from lrc.compressors.io import machine
from lrc.configs.recipe import Evaluate

TEXT = {"perplexity": ["c4"]}


@pytest.mark.parametrize(
    ("options", "needed"),
    [
        (TEXT, 130),  # both models, whose predictions are compared
        ({**TEXT, "kl_tokens": 0}, 100),  # one after the other
        ({**TEXT, "dense": False}, 100),  # the dense model, for its baselines
        ({**TEXT, "dense": False, "baselines": []}, 30),
        ({"tasks": ["arc_easy"]}, 0),  # nothing that can be streamed
    ],
)
def test_auto_streams_where_the_models_that_are_needed_together_do_not_fit(options, needed):
    sizes = ModelBytes(dense=100, compressed=30)
    assert sizes.needed(Evaluate(**options)) == needed
    enough = needed / FRACTION
    assert not streams(Evaluate(**options), sizes, enough + 1)
    assert streams(Evaluate(**options), sizes, max(0, enough - 1)) == (needed > 0)


def test_always_and_never_do_not_depend_on_the_memory():
    sizes = ModelBytes(100, 30)
    for free in (0, 10**6):
        assert streams(Evaluate(**TEXT, streaming="always"), sizes, free)
        assert not streams(Evaluate(**TEXT, streaming="never"), sizes, free)
        assert not streams(Evaluate(streaming="always"), sizes, free)


def test_tasks_are_refused_with_the_sizes_and_the_remedy(monkeypatch):
    monkeypatch.setattr(machine.psutil, "virtual_memory", lambda: Available)
    assert why_too_large(3 * 2**30, "dense", "cpu") is None
    reason = why_too_large(3 * 2**30 + 1, "dense", "cpu")
    assert "the dense model does not fit" in reason
    assert "at least 3.0 GiB, and 3.0 GiB are free" in reason
    assert "remove the tasks" in reason


class Available:
    available = 3 * 2**30
