"""llm-compressor: GPTQ, optionally after AWQ's scaling of channels."""

from importlib import import_module
from importlib.metadata import version

import torch
from compressed_model import (
    Calibrated,
    Compressed,
    integer_bits,
    layer_linears,
    layer_parameters,
    parse_scheme,
)


def llm_compressor(
    calibrated: Calibrated,
    *,
    scheme: str = "int4-g64",
    symmetric: bool = True,
    method: str = "gptq",
    observer: str | None = None,
    batch_size: int = 8,
) -> Compressed:
    """Quantize with `llmcompressor.oneshot`; other options have its default values.

    `method` is ``gptq`` (`GPTQModifier`), ``awq`` (`AWQModifier` and rounding to nearest) or
    ``rtn`` (rounding to nearest).
    """
    bits, group = parse_scheme(scheme)
    weights = {
        "num_bits": bits,
        "type": "int",
        "strategy": "group",
        "group_size": group,
        "symmetric": symmetric,
    }
    if observer is not None:
        weights["observer"] = observer
    config = {
        "ignore": ["lm_head"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    }
    rounding = import_module("llmcompressor.modifiers.quantization").QuantizationModifier
    if method == "gptq":
        recipe = [import_module("llmcompressor.modifiers.gptq").GPTQModifier(**config)]
    elif method == "awq":
        awq = import_module("llmcompressor.modifiers.transform.awq").AWQModifier()
        recipe = [awq, rounding(**config)]
    else:
        recipe = [rounding(**config)]
    model = calibrated.model
    import_module("llmcompressor").oneshot(
        model=model,
        recipe=recipe,
        dataset=calibrated.batches(batch_size),
        num_calibration_samples=len(calibrated.windows),
        max_seq_length=calibrated.windows.shape[1],
    )
    fake_quantize = import_module("compressed_tensors.quantization").fake_quantize
    found, counted = layer_parameters(model), {}
    for name, linear in layer_linears(model).items():
        found[name] = fake_quantize(
            linear.weight.data,
            linear.weight_scale.data,
            getattr(linear, "weight_zero_point", torch.zeros((), dtype=torch.int8)).data,
            linear.quantization_scheme.weights,
            getattr(linear, "weight_g_idx", None),
        ).cpu()
        counted[name] = integer_bits(found[name], scheme, symmetric=symmetric)
    return Compressed(f"llm-compressor {version('llmcompressor')}", found, counted)
