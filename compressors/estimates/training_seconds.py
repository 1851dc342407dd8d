"""Seconds of stages that train what compression has left in floating point."""

import math

from lrc.compressors.calibrate.batch_size import BATCH_TOKENS
from lrc.compressors.estimates.machine_rates import EFFICIENCY, MachineRates
from lrc.compressors.estimates.workload import Workload, numbers
from lrc.compressors.heal.budget import JUDGEMENTS
from lrc.compressors.planning.plan import TrainingRecord

ELEMENTWISE = {"cpu": 60, "cuda": 30}
"""Elementwise operations on hidden states in a pass through a layer; half of the bytes on a GPU,
where they are in 16 bits."""
LOGIT_OPERATIONS = {"cpu": 30, "cuda": 12}
"""Elementwise operations on the logits of both models; one kernel unites those of a GPU."""
HEADS = 3
"""Products with the output embedding: of both models, and for the gradient of one."""
DEQUANTIZATION = 30
"""Elementwise operations on a matrix of integers, to unpack it and to add up the gradients of its
scales."""
UPDATE = 12
"""Elementwise operations of a step of the optimizer."""
START = {"cpu": 1.0, "cuda": 8.0}
"""Seconds until the first step, of which those of a GPU compile kernels and record it (H200)."""
LAYER_STEP = {"cpu": 0.0, "cuda": 0.01}
"""Seconds to start the operations of a step that fits a layer of any size (H200)."""


def training_seconds(work: Workload, rates: MachineRates, record: TrainingRecord) -> float:
    """Return the seconds of a stage; one of several processes computes."""
    if record.minutes is not None:
        return 60 * record.minutes
    tokens, steps = record.tokens or 0, record.steps or 0
    options = record.options
    batch, held_out = int(options["batch"]), int(options["held_out"])
    length = int(options["length"] or work.calibration.window)
    if record.method == "block":
        # Hidden states of the dense and of the trained model pass through every layer.
        windows = min(int(options["samples"]), steps * batch)
        passes = record.passes * tokens + JUDGEMENTS * held_out + 2 * windows * length
        seconds = passes * _pass(work, rates.products, rates.elementwise, length)
        return seconds + steps * len(work.layers) * LAYER_STEP[work.kind]
    speed = rates.model_products if work.kind == "cuda" else rates.products
    budgets = len(work.plan.elastic)
    measured = measurements(steps, separate=bool(options["cross_entropy"] or budgets))
    measured *= max(1, budgets)
    passes = record.passes + bool(options["checkpointing"])
    seconds = START[work.kind] + (passes * tokens + 2 * measured * held_out) * _pass(
        work, speed, rates.elementwise, length
    )
    seconds += (tokens + measured * held_out) * _logits(work, speed, rates.elementwise)
    together = int(options["micro_batch"] or max(1, BATCH_TOKENS[work.kind] // length))
    unpacked = steps * math.ceil(batch / min(batch, together))
    unpacked += measured * math.ceil(held_out / (min(batch, together) * length))
    integers = sum(numbers(task) for task in work.tasks if task.quantize is not None)
    updated = work.plan.compressed_parameters if _trains_most(record) else 0
    operations = unpacked * DEQUANTIZATION * integers + steps * UPDATE * updated
    return seconds + operations / rates.elementwise


def measurements(steps: int, *, separate: bool) -> int:
    """Return how often the loss on held-out text is measured, see `StepBudget.is_judged`.

    Before the first step, about `JUDGEMENTS` times, and after the last one; and before and after
    once more if the terms of the loss are reported in `separate` numbers.
    """
    return 1 + math.ceil(steps / max(1, steps // JUDGEMENTS)) + 2 * separate


def _pass(work: Workload, speed: float, elementwise: float, length: int) -> float:
    """Return the seconds of a token of a window in a forward pass through all layers.

    `speed` is that of products, and `elementwise` that of other operations.
    """
    products = work.pass_operations(work.layers, length) / (EFFICIENCY * speed)
    return products + ELEMENTWISE[work.kind] * work.width * len(work.layers) / elementwise


def _logits(work: Workload, speed: float, elementwise: float) -> float:
    """Return the seconds of a token from the last layer to the gradient at it."""
    head = work.heads or work.embedding
    products = HEADS * 2 * head / (EFFICIENCY * speed)
    return products + LOGIT_OPERATIONS[work.kind] * work.vocabulary / elementwise


def _trains_most(record: TrainingRecord) -> bool:
    """Return whether the optimizer has averages of about as many numbers as the model has."""
    return record.options.get("train", "scales") in ("all", "factors", "values")
