"""Wanda, by the authors' code: https://github.com/locuslab/wanda."""

from argparse import Namespace
from importlib import import_module

from compressed_model import Calibrated, Compressed, layer_linears, layer_parameters, sparse_bits
from research_code import commit, give_positions, import_folder


def wanda(
    calibrated: Calibrated, *, code: str, sparsity: float = 0.5, prunen: int = 0, prunem: int = 0
) -> Compressed:
    """Prune with `prune_wanda` of lib/prune.py; other options have its default values."""
    import_folder(code)
    prune = import_module("lib.prune")
    prune.get_loaders = lambda *_, **__: ([(row[None],) for row in calibrated.windows], None)
    model = calibrated.model.to(calibrated.device)
    model.seqlen, model.hf_device_map = calibrated.windows.shape[1], {}
    args = Namespace(
        nsamples=len(calibrated.windows), seed=0, sparsity_ratio=sparsity, use_variant=False
    )
    give_positions(model)
    prune.prune_wanda(
        args, model, calibrated.tokenizer, calibrated.device, prune_n=prunen, prune_m=prunem
    )
    weights = layer_parameters(model)
    bits = {name: sparse_bits(weights[name]) for name in layer_linears(model)}
    return Compressed(f"wanda {commit(code)}", weights, bits)
