"""Estimates as arithmetic, against bytes that are counted independently or were really used."""

import json
import math
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny_experts import tiny_experts
from transformers import LlamaForCausalLM

from lrc.compressors.calibrate.activation_cache import ActivationCache
from lrc.compressors.calibrate.batch_size import BATCH_TOKENS, MIN_BATCHES
from lrc.compressors.calibrate.calibration_context import CalibrationContext
from lrc.compressors.calibrate.calibration_passes import HEAD_BYTES, HEAD_TENSORS, head_tokens
from lrc.compressors.calibrate.layer_executor import batches
from lrc.compressors.distributed.processes import Processes
from lrc.compressors.estimates import estimate as estimates
from lrc.compressors.estimates import stage_seconds as seconds_of_stages
from lrc.compressors.estimates.buffers import Buffers
from lrc.compressors.estimates.disk_space import disk_space
from lrc.compressors.estimates.estimate import Estimate, estimate, place_buffers, refuse_too_large
from lrc.compressors.estimates.fixed_size_work import (
    OPERATION_SECONDS,
    OPERATIONS,
    curve_seconds,
    solution_seconds,
)
from lrc.compressors.estimates.machine_rates import MachineRates
from lrc.compressors.estimates.memory_peaks import (
    PINNED,
    RECORDINGS,
    STREAMS,
    WORKSPACE,
    memory_peaks,
)
from lrc.compressors.estimates.stage_seconds import stage_seconds
from lrc.compressors.estimates.workload import Workload
from lrc.compressors.io.disk_use import DiskUse, used_disk
from lrc.compressors.io.journal import Journal
from lrc.compressors.io.machine import Machine
from lrc.compressors.pipeline import compress
from lrc.compressors.prepare import Prepared, prepare
from lrc.compressors.stages import STAGES
from lrc.configs.errors import RecipeError
from lrc.configs.load import load_recipe
from lrc.configs.recipe import Perplexity
from lrc.configs.task_data import EvaluationTask

WIDTH, INNER, LAYERS, SAMPLES, LENGTH = 128, 320, 3, 4, 64
KFAC = [{"decompose": {"method": "kfac", "keep": 0.6, "allocation": "uniform"}}]
MIXED = [{"decompose": {"method": "mixed", "keep": 0.6}}]
COMPENSATED = [{"decompose": {"method": "svd-llm", "keep": 0.6, "compensate": {}}}]
TEXT = Perplexity(source="python-docs")
RATES = MachineRates(1e9, 1e9, 1e9, ((100, 1e-2), (200, 8e-2)), 1e9, 1e9)


@pytest.fixture(scope="module")
def model_folder(
    tiny_llama: Callable[..., LlamaForCausalLM],
    make_tokenizer: Callable[..., Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    folder = tmp_path_factory.mktemp("models") / "wide"
    model = tiny_llama(hidden_size=WIDTH, intermediate_size=INNER, num_hidden_layers=LAYERS)
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def written(
    model_folder: Path, tiny_recipe: Callable[..., Path], tmp_path: Path
) -> Callable[..., Path]:
    """Write a recipe for the model."""

    def write(stages: list[dict[str, Any]], **changes: Any) -> Path:
        return tiny_recipe(model_folder, tmp_path / "run", stages=stages, **changes)

    return write


@pytest.fixture
def prepared(written: Callable[..., Path]) -> Callable[..., Prepared]:
    return lambda *given, **changes: prepare(load_recipe(written(*given, **changes)).recipe, STAGES)


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


def test_small_matrices_take_the_time_to_start_their_operations_on_a_gpu(
    prepared: Callable[..., Prepared],
) -> None:
    fast = MachineRates(1e18, 1e18, 1e18, ((100, 1e-9), (200, 8e-9)), 1e18, 1e18)
    recipe = prepared(MIXED)
    on_cpu, on_gpu = (stage_seconds(Workload(recipe, kind), fast) for kind in ("cpu", "cuda"))
    assert on_cpu["allocate"] < 1e-3
    # Of each layer the curves of q and o, k and v, gate and up are made together.
    sizes = on_gpu["allocate"] / (4 * LAYERS * OPERATIONS * OPERATION_SECONDS["cuda"])
    assert sizes > 100  # products with the metric


@pytest.mark.parametrize(("method", "masks"), [("sparse", True), ("dictionary", False)])
def test_searches_for_masks_take_elementwise_operations_besides_products(
    prepared: Callable[..., Prepared], method: str, masks: bool
) -> None:
    recipe = prepared([{"decompose": {"method": method, "keep": 0.7}}])
    never = MachineRates(math.inf, math.inf, math.inf, ((100, 1e-9), (200, 8e-9)), 1.0, math.inf)
    work = Workload(recipe, "cpu")
    numbers = sum(math.prod(task.shape) for task in work.tasks)
    assert (curve_seconds(work, never) > OPERATIONS * numbers) is masks
    assert (solution_seconds(work, never) > OPERATIONS * numbers) is masks


def test_several_processes_delete_statistics_after_the_last_layer(
    prepared: Callable[..., Prepared],
) -> None:
    recipe = prepared([{"quantize": {"method": "gptq", "bits": 4, "group_size": 32}}])
    one, two = (Workload(recipe, "cpu", n) for n in (1, 2))
    found = [disk_space(work, {}, {"calibrate": 1.0})["compress"] for work in (one, two)]
    assert found[1] - found[0] == sum(one.results[1:])


def test_time_is_proportional_to_the_text_and_inverse_to_the_speed(
    prepared: Callable[..., Prepared],
) -> None:
    few, many = (
        Workload(prepared(KFAC, calibration={"samples": n, "length": 64}), "cpu")
        for n in (100, 200)
    )
    rates = MachineRates(1e6, 1e6, 1e6, ((100, 1e-2), (200, 8e-2)), 1e6, 1e12)
    once, twice = (stage_seconds(work, rates)["calibrate"] for work in (few, many))
    assert twice / once == pytest.approx(2, rel=0.2)  # the trace and reading do not grow
    slower = MachineRates(5e5, 5e5, 5e5, ((100, 2e-2), (200, 16e-2)), 5e5, 1e12)
    assert stage_seconds(few, slower)["calibrate"] / once == pytest.approx(2, rel=0.01)


def test_runs_without_calibration_take_the_time_of_what_they_convert_read_round_and_write(
    prepared: Callable[..., Prepared], monkeypatch: pytest.MonkeyPatch
) -> None:
    stages = [{"quantize": {"method": "rtn", "bits": 8, "embeddings": "int8"}}]
    work = Workload(prepared(stages, evaluate={"perplexity": [], "baselines": []}), "cpu")
    monkeypatch.setattr(Workload, "stored_type", "Q4_1")
    monkeypatch.setattr(seconds_of_stages, "dequantizing_rate", {"Q4_1": 2.0}.get)
    rates = replace(RATES, disk=3.0, rounding=5.0, reading=7.0, hashing=11.0)
    found, plan = stage_seconds(work, rates), work.plan
    linears = sum(linear.d_out * linear.d_in for linear in work.architecture.linears)
    rounded = linears + work.embedding
    assert found.keys() == {"convert", "compress", "save"}
    assert found["convert"] == plan.dense_bytes / 3 + plan.dense_parameters / 2
    written = sum(work.results) / 3
    assert found["compress"] == pytest.approx(rounded / 5 + 2 * rounded / 7 + written)
    assert found["save"] == pytest.approx(plan.compressed_bytes * (1 / 3 + 1 / 7 + 1 / 11))


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


@pytest.mark.parametrize("stages", [KFAC, MIXED, COMPENSATED], ids=["kfac", "mixed", "svd-llm"])
def test_two_processes_need_half_of_what_is_divided(
    prepared: Callable[..., Prepared], stages: list[dict[str, Any]]
) -> None:
    text = [{"source": "python-docs", "window": 64, "windows": 8}]
    recipe = prepared(
        stages, calibration={"samples": 64, "length": LENGTH}, evaluate={"perplexity": text}
    )
    one, two = (Workload(recipe, "cpu", n) for n in (1, 2))
    assert two.states == one.states / 2
    assert two.scored_share == 1 / 2
    slow = MachineRates(1e6, 1e6, 1e6, ((100, 1.0), (200, 8.0)), 1e6, 1e12)
    alone, each = (stage_seconds(work, slow) for work in (one, two))
    assert alone.keys() == each.keys()
    faster = {stage: alone[stage] / each[stage] for stage in alone.keys() - {"save"}}
    assert each["save"] == alone["save"]  # one small file
    assert all(1.2 < times < 2.01 for times in faster.values()), faster
    if stages != COMPENSATED:  # two of three layers
        assert faster["compress"] == pytest.approx(1.5, rel=0.01)


def test_processes_share_the_cores_of_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 4 * torch.get_num_threads())
    assert RATES.shared(4) == RATES
    assert RATES.shared(8).products == RATES.products / 2
    assert RATES.shared(8).eigenvectors(100) == 2 * RATES.eigenvectors(100)


@pytest.fixture
def known_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimates, "measure_rates", lambda *_: RATES)


def _with_free(monkeypatch: pytest.MonkeyPatch, memory: int, disk: int) -> None:
    class Available:
        available = memory

    monkeypatch.setattr(estimates.psutil, "virtual_memory", lambda: Available)
    monkeypatch.setattr(estimates, "free_disk", lambda folder: disk)


@pytest.mark.usefixtures("known_rates")
def test_what_fits_is_not_refused(
    prepared: Callable[..., Prepared], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = prepared(KFAC)
    _with_free(monkeypatch, 2**40, 2**40)
    refuse_too_large(estimate(recipe, "cpu"), recipe, "cpu")


@pytest.mark.usefixtures("known_rates")
@pytest.mark.parametrize(
    ("stage", "changes", "where"),
    [
        ("calibrate", {}, "calibration.memory_limit_gib"),
        ("evaluate", {"perplexity": [TEXT]}, "evaluate.streaming"),
        ("evaluate", {"perplexity": [TEXT], "streaming": "always"}, "evaluate.perplexity"),
        ("evaluate", {"task": EvaluationTask(data="t.csv")}, "evaluate.task"),
    ],
)
def test_the_refusal_names_a_setting_that_the_recipe_can_use(
    stage: str,
    changes: dict[str, Any],
    where: str,
    prepared: Callable[..., Prepared],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe = prepared(KFAC)
    evaluate = recipe.recipe.evaluate.model_copy(update=changes)
    recipe = replace(recipe, recipe=recipe.recipe.model_copy(update={"evaluate": evaluate}))
    _with_free(monkeypatch, 2**40, 2**40)
    expected = Estimate({}, {"save": 1, stage: 2**50}, {}, {"save": 1}, [])
    with pytest.raises(RecipeError, match=r"1,048,576.0 GiB of host memory") as error:
        refuse_too_large(expected, recipe, "cpu")
    (problem,) = error.value.problems
    assert (problem.code, problem.where) == ("does-not-fit", where)


@pytest.mark.usefixtures("known_rates")
@pytest.mark.parametrize("command", ["plan", "compress"])
def test_commands_refuse_a_run_for_which_the_disk_is_too_small(
    command: str,
    lrc: Callable[..., Any],
    written: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe = written(KFAC)
    _with_free(monkeypatch, 2**40, 1000)
    ended = lrc(command, recipe)
    ended.refuses(2, "GiB of disk in", code="does-not-fit", where="output")
    left = {path.name for path in (tmp_path / "run").rglob("*")}
    assert left <= {"work", "lock", "run.json", "seconds.json"}


@pytest.mark.usefixtures("known_rates")
def test_plan_shows_estimates(lrc: Callable[..., Any], written: Callable[..., Path]) -> None:
    recipe = written(KFAC)
    shown = lrc("plan", recipe)
    assert shown.code == 0
    assert "estimate: calibrate" in shown.out
    values = json.loads(lrc("plan", recipe, "--json").out)["estimate"]
    assert values["peak"]["gpu_bytes"] is None
    assert values["peak"]["host_bytes"] == max(values["host_bytes"].values())
    assert values["processes"] == 1
    shown = lrc("plan", recipe, "--processes", 2)
    assert "of each of 2 processes" in " ".join(shown.out.split())
    refused = lrc("plan", recipe, "--processes", 200)
    assert refused.code == 2
    assert "calibration.samples: must be at least the number of processes, 200" in refused.err


@pytest.mark.usefixtures("known_rates")
def test_what_is_not_estimated_is_named(prepared: Callable[..., Prepared], tiny_text: Path) -> None:
    """As the only test, this one finds a task in the index of lm-eval, which takes seconds."""
    evaluate = {
        "perplexity": [{"source": str(tiny_text), "name": "all", "window": 64}],
        "tasks": ["piqa"],
        "generations": {"prompts": ["A"]},
    }
    found = estimate(prepared(KFAC, evaluate=evaluate), "cpu").not_estimated
    assert found == ["perplexity on the whole of all", "task piqa", "generated text"]


@pytest.mark.parametrize(
    "changes",
    [
        {"calibration": {"source": "self", "samples": 4, "length": 64}},
        {"stages": [*KFAC, {"heal": {"method": "distill", "extend": True}}]},
        {
            "stages": [
                *KFAC,
                {"heal": {"method": "block", "source": {"python-docs": 0.5, "self": 0.5}}},
            ]
        },
    ],
    ids=["calibration", "extend", "source"],
)
@pytest.mark.usefixtures("known_rates")
def test_sampling_text_is_not_estimated(
    prepared: Callable[..., Prepared], changes: dict[str, Any]
) -> None:
    stages = changes.get("stages", KFAC)
    written = "text that the dense model writes"
    others = {key: value for key, value in changes.items() if key != "stages"}
    assert estimate(prepared(stages, **others), "cpu").not_estimated == [written]
    assert estimate(prepared(KFAC), "cpu").not_estimated == []


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


def test_time_of_experts_counts_the_passes_over_the_text_and_the_experts_of_a_token(
    tiny_recipe: Callable[..., Path],
    make_tokenizer: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny_experts("mixtral", hidden_size=32, intermediate_size=32)
    model.save_pretrained(tmp_path / "source")
    make_tokenizer().save_pretrained(tmp_path / "source")
    recipe = load_recipe(tiny_recipe(tmp_path / "source", tmp_path / "run", stages=COMPENSATED))
    work = Workload(prepare(recipe.recipe, STAGES), "cpu")
    layer = model.model.layers[0]
    of_experts = sum(p.numel() for p in layer.mlp.experts.parameters())
    whole = sum(p.numel() for p in layer.parameters())
    assert work.used_share == pytest.approx(1 - of_experts / 2 / whole)  # two of four experts

    times = {}
    for together in (4, 2, 1):
        monkeypatch.setattr(seconds_of_stages, "EXPERT_BYTES", together * 2 * 4 * 32**2)
        times[together] = stage_seconds(work, RATES)["compress"]
    assert times[1] - times[4] == pytest.approx(3 * (times[2] - times[4]))
    assert times[2] > times[4]

    # Of two processes, each has half of the experts, and q and k or o and v, whose sizes are equal.
    assert seconds_of_stages._input_share(Workload(work.prepared, "cpu", 2)) == 0.5
