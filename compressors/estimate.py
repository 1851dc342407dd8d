"""How long, how much memory and how much disk a plan will take; from shapes and two small probes.

Rough by design: within a factor of two where the machine is otherwise idle. The probes are a
matrix product and a symmetric eigenproblem of the sizes that matter, run for a fraction of a
second on the device that will be used.
"""

import time
from dataclasses import dataclass

import psutil
import torch

from lrc.compressors.methods.base import CodedMethod
from lrc.compressors.methods.table import METHODS
from lrc.compressors.planning.rate_distortion import arguments, families_of, wanted
from lrc.compressors.planning.required_statistics import collected
from lrc.compressors.planning.weight_groups import ratios_of, units_of
from lrc.compressors.prepare import Prepared
from lrc.compressors.slicing import METHODS as SLICERS
from lrc.configs.quantize import Quantize

PROBE = 512
# In forward passes over the layers: a backward pass runs them again and takes two for the
# gradients; compensation runs them as they were and as they become, once to measure every group of
# an attention or MLP block, and once to go on.
BACKWARD_PASSES, COMPENSATION_PASSES = 3, 5
# Eigenvalues alone take about a third of what they take with their vectors.
VALUES_ONLY = 1 / 3
GIB = 2**30


@dataclass(frozen=True)
class Estimate:
    """Seconds a stage, and peaks in bytes. What depends on data unread so far is not in it."""

    seconds: dict[str, float]
    memory_bytes: int
    disk_bytes: int
    not_estimated: list[str]


def estimate(prepared: Prepared, device: str) -> Estimate:
    """Estimate a run on `device`."""
    recipe, plan = prepared.recipe, prepared.plan
    products, eigenproblems = _probe(device)
    in_layers = sum(m.numel() for layer in prepared.architecture.layers for m in layer.parameters())
    in_dense = sum(m.numel() for layer in prepared.dense.layers for m in layer.parameters())
    n_layers = len(prepared.architecture.layers)
    planned = [m for m in plan.matrices if m.factored]
    needs = {m.name: collected(m, recipe) for m in planned}
    measured = [m for m in planned if needs[m.name]]
    # Linears of one module with one input width mostly share their input: counted once.
    inputs = {
        (m.name.rpartition(".")[0], m.shape[1]) for m in measured if "inputs" in needs[m.name]
    }
    gram = sum(width**2 for _, width in inputs)
    gradients = [m for m in measured if "gradients" in needs[m.name]]
    outputs = sum(m.shape[0] ** 2 for m in gradients)
    backward = bool(gradients) or any("row_fisher" in needs[m.name] for m in measured)
    compensates = any(each.compensate is not None for each in recipe.works.values())
    slices = recipe.stages_of("slice").values()
    sliced = any(SLICERS[each.method].reads_text for each in slices)
    reads = measured or compensates or sliced
    tokens = recipe.calibration.samples * recipe.calibration.length if reads else 0

    seconds = {}
    if slices:
        seconds["slice"] = tokens * 2 * in_dense / products
        seconds["slice"] *= sum(
            SLICERS[each.method].passes(each, config)
            for each, config in zip(slices, prepared.sliced, strict=True)
        )
    if measured:
        passes = 1 + (BACKWARD_PASSES if backward else 0)
        seconds["calibrate"] = tokens * 2 * (passes * in_layers + gram + outputs) / products
    curves, solutions = coded_work(prepared)
    plain = ["sparse"], ["integers"], ["group_sparse"]
    spectral = [m for m in planned if METHODS[m.method].forms not in plain]
    pending = [min(m.shape) for m in spectral if m.pending]
    if pending or curves:
        spectra = VALUES_ONLY * sum(s**3 / eigenproblems for s in pending)
        seconds["allocate"] = spectra + 2 * curves / products
    small = [(min(m.shape), max(m.shape)) for m in spectral]
    if planned:
        seconds["decompose"] = sum(s**3 / eigenproblems for s, _ in small) + sum(
            2 * s * b * (s + b) / (products / 2) for s, b in small
        )
        seconds["decompose"] += 2 * solutions / products
    if compensates:
        seconds["decompose"] += COMPENSATION_PASSES * tokens * 2 * in_layers / products
    seconds["save"] = plan.compressed_bytes / 0.5e9
    not_estimated = []
    judged = 0
    for spec in recipe.evaluate.perplexity:
        if spec.windows:
            judged += spec.windows * spec.window
        else:
            not_estimated.append(f"perplexity on the whole of {spec.name}")
    not_estimated += [f"task {name}" for name in recipe.evaluate.tasks.names]
    if judged:
        models = 1 + recipe.evaluate.dense + len(recipe.evaluate.baselines)
        seconds["evaluate"] = models * judged * 2 * plan.dense_parameters / products

    hidden = _width(prepared) * tokens * 4
    layer = 4 * max(in_layers, in_dense) // n_layers
    statistics = 4 * (gram + outputs)
    whole = plan.dense_parameters * (4 if device == "cpu" else prepared.source.dtype.itemsize)
    evaluates = bool(recipe.evaluate.perplexity or recipe.evaluate.tasks.names)
    calibrating = min(hidden, int(recipe.calibration.memory_limit_gib * GIB)) + layer
    calibrating += 4 * max((w for _, w in inputs), default=0) ** 2 * 3
    now = psutil.Process().memory_info().rss
    converted = plan.dense_bytes if plan.source_quantized else 0
    converted += sum(cut.bytes[1] for cut in plan.slices)
    # Snapshots of the hidden states: the one that is kept and the one that replaces it.
    disk = statistics + 2 * hidden + plan.bits // 8 + plan.compressed_bytes + converted
    memory = now + max(calibrating, whole if evaluates else 0, plan.compressed_bytes)
    return Estimate(seconds, memory, disk, not_estimated)


def coded_work(prepared: Prepared) -> tuple[int, int]:
    """Count the multiply-adds of methods without spectra: for curves, and to solve what is chosen.

    Of forms that an allocation has still to choose from, the dearest counts.
    """
    curves = solutions = 0
    for unit in units_of(m for m in prepared.plan.matrices if m.factored):
        m = unit.first
        options = prepared.recipe.works[m.stage]
        if isinstance(options, Quantize):
            continue
        shape = len(unit.members) * m.shape[0], m.shape[1]
        dearest = 0
        for part in METHODS[options.method].parts:
            if not isinstance(part, CodedMethod) or not wanted(part, options):
                continue
            if m.sizes is not None and m.form != part.form:
                continue
            own = arguments(options, part)
            if m.pending:
                looked_at = [
                    sizes for _, run in families_of(unit, part.form, options) for sizes in run
                ]
                curves += part.work(*shape, looked_at, curve=True, **own)
            there = unit.in_form(part.form).at_ratio(ratios_of(options, part.form)[0])
            step = there.step_within(m.bits / m.source_bits, "bits")
            solved = [m.sizes or there.sizes_at(step)] if step else []
            dearest = max(dearest, part.work(*shape, solved, curve=False, **own))
        solutions += dearest
    return curves, solutions


def _width(prepared: Prepared) -> int:
    config = prepared.source.config.get_text_config()
    return int(getattr(config, "hidden_size", 0) or 0)


def _probe(device: str) -> tuple[float, float]:
    """Return float32 operations a second, and n^3 a second of a float64 eigenproblem."""
    a = torch.randn(2 * PROBE, 2 * PROBE, device=device)
    s = torch.randn(PROBE, PROBE, dtype=torch.float64, device=device)
    products = 2 * (2 * PROBE) ** 3 / _best_of(lambda: a @ a, device)
    eigenproblems = PROBE**3 / _best_of(lambda: torch.linalg.eigh(s + s.T), device)
    return products, eigenproblems


def _best_of(run: object, device: str, tries: int = 4) -> float:
    times = []
    for _ in range(tries):  # the first pays for start-up
        start = time.perf_counter()
        run()  # type: ignore[operator]
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times)
