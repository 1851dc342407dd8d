"""AutoRound: rounding learned by signed gradient descent, block by block."""

from importlib import import_module
from importlib.metadata import version

from compressed_model import (
    Calibrated,
    Compressed,
    integer_bits,
    layer_linears,
    layer_parameters,
    parse_scheme,
)


def auto_round(
    calibrated: Calibrated,
    *,
    scheme: str = "int4-g64",
    symmetric: bool = True,
    iters: int = 200,
    batch_size: int = 8,
) -> Compressed:
    """Quantize with `auto_round.AutoRound`; other options have its default values."""
    bits, group = parse_scheme(scheme)
    samples, length = calibrated.windows.shape
    program = import_module("auto_round").AutoRound(
        calibrated.model,
        calibrated.tokenizer,
        bits=bits,
        group_size=group,
        sym=symmetric,
        iters=iters,
        batch_size=batch_size,
        nsamples=samples,
        seqlen=length,
        dataset=calibrated.batches(batch_size),
        enable_torch_compile=False,
    )
    model, _ = program.quantize()
    weights = layer_parameters(model)
    counted = {
        name: integer_bits(weights[name], scheme, symmetric=symmetric)
        for name in layer_linears(calibrated.model)
    }
    return Compressed(f"auto-round {version('auto-round')}", weights, counted)
