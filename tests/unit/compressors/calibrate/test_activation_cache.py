"""Buffers of hidden states, of one process and of several."""

from dataclasses import replace

import torch

from lrc.compressors.calibrate.activation_cache import ActivationCache, cache_files
from lrc.compressors.calibrate.calibration_context import CalibrationContext
from lrc.compressors.distributed.processes import Processes
from lrc.compressors.io.journal import Journal

SHAPE = (5, 3, 4)


def test_processes_continue_from_the_snapshot_of_a_single_one(architecture, reader, tmp_path):
    journal = Journal(tmp_path)
    journal.work.mkdir()
    context = CalibrationContext(
        architecture,
        reader,
        lambda: torch.zeros(5, 3, dtype=torch.int64),
        journal,
        device="cpu",
        memory_limit_gib=1.0,
        seed=0,
        on_step=lambda *_: None,
    )
    alone = ActivationCache(context, "states", SHAPE)
    alone.tensor.copy_(torch.arange(60.0).view(SHAPE))
    alone.done = 2
    alone.save()
    for rank, (first, count) in enumerate([(0, 2), (2, 3)]):
        # On disk: each process has a file of its own.
        one = replace(context, processes=Processes(rank, 2), memory_limit_gib=0.0)
        cache = ActivationCache(one, "states", (count, *SHAPE[1:]), first)
        assert cache.resume()
        assert cache.done == 2
        assert torch.equal(cache.tensor, alone.tensor[first : first + count])
        cache.finish_layer(save=True)
        assert cache.done == 3
    files = {path.name for path in journal.work.iterdir()}
    assert files == {"states-0002.f32", "states.live", "states-1.live"}
    assert files <= {*cache_files(journal)}
