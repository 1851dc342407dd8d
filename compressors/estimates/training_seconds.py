"""Seconds of stages that train what compression has left in floating point."""

from lrc.compressors.estimates.machine_rates import MachineRates
from lrc.compressors.estimates.workload import Workload, numbers
from lrc.compressors.heal.budget import JUDGEMENTS
from lrc.compressors.planning.plan import TrainingRecord

EFFICIENCY = 0.75
"""Of products in a model, relative to one large product."""
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
    held_out = JUDGEMENTS * int(record.options["held_out"])
    length = int(record.options["length"] or work.calibration.window)
    a_pass = _pass(work, rates, length)
    if record.method == "block":
        # Hidden states of the dense and of the trained model pass through every layer.
        passes = record.passes * tokens + held_out + 2 * int(record.options["samples"]) * length
        return passes * a_pass + steps * len(work.layers) * LAYER_STEP[work.kind]
    seconds = START[work.kind] + (record.passes * tokens + 2 * held_out) * a_pass
    seconds += (tokens + held_out) * _logits(work, rates)
    integers = sum(numbers(task) for task in work.tasks if task.quantize is not None)
    updated = work.plan.compressed_parameters if _trains_most(record) else 0
    return seconds + steps * (DEQUANTIZATION * integers + UPDATE * updated) / rates.elementwise


def _pass(work: Workload, rates: MachineRates, length: int) -> float:
    """Return the seconds of a token of a window in a forward pass through all layers."""
    layers = work.layers
    attention = 4 * length * work.width * len(layers)
    products = (2 * work.used_share * sum(layers) + attention) / (EFFICIENCY * rates.products)
    return products + ELEMENTWISE[work.kind] * work.width * len(layers) / rates.elementwise


def _logits(work: Workload, rates: MachineRates) -> float:
    """Return the seconds of a token from the last layer to the gradient at it."""
    head = work.heads or work.embedding
    products = HEADS * 2 * head / (EFFICIENCY * rates.products)
    return products + LOGIT_OPERATIONS[work.kind] * work.vocabulary / rates.elementwise


def _trains_most(record: TrainingRecord) -> bool:
    """Return whether the optimizer has averages of about as many numbers as the model has."""
    return record.options.get("train", "scales") in ("all", "factors", "values")
