"""Sizes of models in memory, measured and estimated."""

from pathlib import Path
from typing import Any

import torch

from lrc.compressors.benchmark.memory import Meter, estimate_bytes, fit_together, weight_bytes
from lrc.compressors.checkpoint.reader import load_checkpoint, read_contents
from lrc.compressors.io.machine import Machine
from lrc.compressors.pipeline import compress
from lrc.configs.load import load_recipe


def test_tied_weights_count_once(tiny_llama: Any) -> None:
    tied, untied = (tiny_llama(tie_word_embeddings=tied) for tied in (True, False))
    buffers = sum(buffer.nbytes for buffer in tied.buffers())
    parameters = sum(parameter.nbytes for parameter in tied.parameters())
    assert weight_bytes(tied) == parameters + buffers
    assert weight_bytes(untied) - weight_bytes(tied) == 512 * 32 * 4


def test_the_estimate_is_what_loading_takes(
    tiny_model_folder: Path, tiny_recipe: Any, tmp_path: Path
) -> None:
    """Of a dense model in both precisions, one with factors, and a plain one of integers."""
    stages = {
        "factors": [{"decompose": {"method": "svd", "keep": 0.6}}],
        "integers": [{"quantize": {"method": "rtn", "bits": 4, "group_size": 16}}],
        "asymmetric": [{"quantize": {"method": "rtn", "bits": 4, "symmetric": False}}],
    }
    folders = [tiny_model_folder]
    for name, each in stages.items():
        recipe = tiny_recipe(tiny_model_folder, tmp_path / name, stages=each)
        compress(load_recipe(recipe), Machine("cpu"))
        folders.append(tmp_path / name / "checkpoint")
    for folder in folders:
        for dtype in (torch.float32, torch.bfloat16):
            expected = estimate_bytes(read_contents(folder), dtype)
            model = load_checkpoint(folder, dtype=dtype)
            found = sum(parameter.nbytes for parameter in model.parameters())
            found += sum(b.nbytes for n, b in model.named_buffers() if "inv_freq" not in n)
            # A plain checkpoint keeps its scales after it has been expanded.
            assert 0.9 * expected <= found <= 1.2 * expected, (folder, dtype)


def test_the_peak_counts_what_was_freed_again() -> None:
    meter = Meter("cpu")
    with meter.peak() as peak:
        held = torch.ones(2**22)  # 16 MiB; written, so that its pages exist
        passing = torch.ones(2**24)
        passing.add_(1)
        del passing
    assert peak.grown > 60 * 2**20
    with meter.peak() as nothing:
        pass
    assert nothing.grown < 8 * 2**20
    assert held.numel() == 2**22
    assert meter.used() > 0
    assert meter.available() > 0


def test_models_fit_if_there_is_room_to_run_them() -> None:
    assert fit_together([100], 125)
    assert not fit_together([100], 124)
    assert not fit_together([60, 60], 140)
