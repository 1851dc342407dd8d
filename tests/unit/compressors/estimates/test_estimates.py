"""Estimates as arithmetic, against bytes that are counted independently or were really used."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.estimated_recipes import COMPENSATED, INNER, KFAC, LAYERS, LENGTH, MIXED, SAMPLES, WIDTH

from lrc.compressors.calibrate.activation_cache import ActivationCache
from lrc.compressors.calibrate.batch_size import BATCH_TOKENS, MIN_BATCHES
from lrc.compressors.calibrate.calibration_context import CalibrationContext
from lrc.compressors.calibrate.calibration_passes import HEAD_BYTES, HEAD_TENSORS, head_tokens
from lrc.compressors.calibrate.layer_executor import batches
from lrc.compressors.distributed.processes import Processes
from lrc.compressors.estimates.buffers import Buffers
from lrc.compressors.estimates.disk_space import disk_space
from lrc.compressors.estimates.estimate import place_buffers
from lrc.compressors.estimates.memory_peaks import (
    PINNED,
    RECORDINGS,
    STREAMS,
    WORKSPACE,
    memory_peaks,
)
from lrc.compressors.estimates.workload import Workload
from lrc.compressors.io.disk_use import DiskUse, used_disk
from lrc.compressors.io.journal import Journal
from lrc.compressors.io.machine import Machine
from lrc.compressors.pipeline import compress
from lrc.compressors.prepare import Prepared
from lrc.configs.load import load_recipe


def test_statistics_are_counted_as_the_methods_need_them(
    prepared: Callable[..., Prepared],
) -> None:
    heads = WIDTH // 2  # of keys and values together with half of the heads
    diagonals = WIDTH + 2 * heads + WIDTH + 2 * INNER + WIDTH
    # Inputs of q k v, o, gate up, and down or its image; outputs, or images of gate and up.
    narrow = [*[WIDTH] * 4, WIDTH, heads, heads, *[WIDTH] * 4]
    whole = [*[WIDTH] * 3, INNER, WIDTH, heads, heads, WIDTH, INNER, INNER, WIDTH]
    plain = 3 * WIDTH + INNER + diagonals
    for recipe, sides in ((KFAC, narrow), (MIXED, whole)):
        work = Workload(prepared(recipe), "cpu")
        in_memory = 4 * (plain + sum(n**2 for n in sides))
        assert work.sum_bytes == [in_memory] * LAYERS
        on_disk = 4 * (plain + sum(n * (n + 1) // 2 for n in sides))
        assert work.statistics_bytes == [on_disk] * LAYERS


def test_buffers_are_the_bytes_of_the_tensors(
    prepared: Callable[..., Prepared], tmp_path: Path
) -> None:
    recipe = prepared(KFAC)
    work = Workload(recipe, "cpu")
    context = CalibrationContext(
        recipe.architecture,
        reader=None,  # type: ignore[arg-type]  # nothing is read
        windows=lambda: torch.zeros(SAMPLES, LENGTH, dtype=torch.int64),
        journal=Journal(tmp_path),
        device="cpu",
        memory_limit_gib=1.0,
        seed=0,
        on_step=lambda *_: None,
    )
    states = ActivationCache(context, "states", (SAMPLES, LENGTH, WIDTH))
    assert work.states == states.tensor.nbytes
    assert work.checkpoints == [states.tensor.nbytes // 2] * LAYERS  # in bfloat16
    assert Workload(prepared(COMPENSATED), "cpu").checkpoints == []


def test_buffers_are_placed_on_the_gpu_then_on_the_host_then_on_the_disk() -> None:
    buffers = Buffers(free_gpu=1000, limit=300)
    buffers.add(150)  # at most 15 % of what is free
    buffers.add(150)
    buffers.add(301)
    assert (buffers.gpu, buffers.host, buffers.disk) == (150, 150, 301)
    buffers.add_checkpoints([100] * 4)  # one fits into 15 % of 850
    assert (buffers.gpu, buffers.host, buffers.disk) == (250, 450, 301)


def test_fewer_logits_of_a_large_vocabulary_exist_at_once() -> None:
    for vocabulary in (32_000, 128_256, 262_144):
        n_bytes = 4 * HEAD_TENSORS * vocabulary
        tokens = head_tokens("cuda", vocabulary)
        assert tokens == 2048 or tokens * n_bytes <= HEAD_BYTES < (tokens + 1) * n_bytes
    assert head_tokens("cuda", 32_000) == 2048
    assert head_tokens("cuda", 2**40) == 1


def test_compensation_keeps_the_states_of_two_models_within_half_the_limit_each(
    prepared: Callable[..., Prepared],
) -> None:
    calibration = {"samples": SAMPLES, "length": LENGTH}
    states = SAMPLES * LENGTH * WIDTH * 4
    for limit, place in ((2.1, "host"), (1.9, "disk")):
        options = {**calibration, "memory_limit_gib": limit * states / 2**30}
        work = Workload(prepared(COMPENSATED, calibration=options), "cpu")
        assert getattr(place_buffers(work, free=0)["compress"], place) == 2 * states


@pytest.mark.parametrize("stages", [KFAC, MIXED, COMPENSATED], ids=["kfac", "mixed", "svd-llm"])
def test_the_files_of_a_run_take_the_estimated_space(
    stages: list[dict[str, Any]], written: Callable[..., Path]
) -> None:
    report = compress(load_recipe(written(stages)), Machine("cpu"))
    expected = report["estimate"]
    assert expected["peak"]["disk_bytes"] == max(expected["disk_bytes"].values())
    actual = report["memory"]["peak_disk_bytes"]
    assert expected["peak"]["disk_bytes"] == pytest.approx(actual, rel=0.2)
    assert {*report["timing"]["seconds"]} <= {*expected["seconds"]} | {"allocate", "evaluate"}


def test_logits_of_a_backward_pass_count(prepared: Callable[..., Prepared]) -> None:
    peaks = []
    for stages in ([{"decompose": {"method": "svd-llm", "keep": 0.6}}], KFAC):
        work = Workload(prepared(stages), "cpu")
        peaks.append(memory_peaks(work, place_buffers(work, 0), 0)["calibrate"][0])
    logits = LENGTH * 512 * 4  # of a batch, which is one of so few windows
    states = SAMPLES * LENGTH * WIDTH * 4
    assert peaks[1] - peaks[0] >= 3 * logits + states


def test_memory_of_a_gpu_includes_what_is_kept_between_stages(
    prepared: Callable[..., Prepared],
) -> None:
    quantize = [{"quantize": {"method": "gptq", "bits": 4, "group_size": 32}}]
    work = Workload(prepared(quantize), "cuda")
    peaks = memory_peaks(work, place_buffers(work, 2**37), 2**37)
    recorded = WORKSPACE * min(STREAMS, RECORDINGS * 7 * LAYERS)
    assert peaks["save"][1] == WORKSPACE + recorded  # which needs no other memory of the GPU
    assert peaks["compress"][1] > WORKSPACE + recorded
    low_rank = Workload(prepared(KFAC), "cuda")  # records nothing
    peaks = memory_peaks(low_rank, place_buffers(low_rank, 2**37), 2**37)
    assert peaks["save"][1] == WORKSPACE
    # The results of all layers wait to be written if nothing has been at the end of a stage.
    every, none = (
        memory_peaks(low_rank, {}, 2**37, {"calibrate": share})["calibrate"][0]
        for share in (1.0, 0.0)
    )
    sums = low_rank.statistics_bytes[0] // 2
    assert every - none == pytest.approx(PINNED * sums * (LAYERS - 2), rel=0.01)


def test_several_processes_delete_statistics_after_the_last_layer(
    prepared: Callable[..., Prepared],
) -> None:
    recipe = prepared([{"quantize": {"method": "gptq", "bits": 4, "group_size": 32}}])
    one, two = (Workload(recipe, "cpu", n) for n in (1, 2))
    found = [disk_space(work, {}, {"calibrate": 1.0})["compress"] for work in (one, two)]
    assert found[1] - found[0] == sum(one.results[1:])


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_a_process_has_as_many_windows_as_the_executor_gives_it(
    prepared: Callable[..., Prepared], processes: int
) -> None:
    for samples in (4, 16, 70):
        recipe = prepared(KFAC, calibration={"samples": samples, "length": LENGTH})
        few = max(1, samples // MIN_BATCHES) * LENGTH
        every = batches(torch.zeros(samples, LENGTH), min(BATCH_TOKENS["cpu"], few))
        shares = [len(Processes(rank, processes).block(len(every))) for rank in range(processes)]
        work = Workload(recipe, "cpu", processes)
        assert work.window_share == pytest.approx(max(shares) / len(every))


def test_linked_files_count_once(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(bytes(8192))
    (tmp_path / "b").hardlink_to(tmp_path / "a")
    use = DiskUse(tmp_path)
    use.look()
    assert used_disk(tmp_path) == use.peak == 8192
    (tmp_path / "a").unlink()
    (tmp_path / "b").unlink()
    use.look()
    assert (used_disk(tmp_path), use.peak) == (0, 8192)
