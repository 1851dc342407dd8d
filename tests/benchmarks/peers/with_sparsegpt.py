"""SparseGPT, by the authors' code: https://github.com/IST-DASLab/sparsegpt."""

from argparse import Namespace
from importlib import import_module

from compressed_model import Calibrated, Compressed, layer_linears, layer_parameters, sparse_bits
from research_code import commit, give_positions, import_folder


def sparsegpt(
    calibrated: Calibrated, *, code: str, sparsity: float = 0.5, prunen: int = 0, prunem: int = 0
) -> Compressed:
    """Prune with `llama_sequential` of llama.py; other options have its default values."""
    import_folder(code)
    llama, model = import_module("llama"), calibrated.model
    model.seqlen = calibrated.windows.shape[1]
    llama.args = Namespace(
        nsamples=len(calibrated.windows),
        sparsity=sparsity,
        prunen=prunen,
        prunem=prunem,
        percdamp=0.01,
        blocksize=128,
        wbits=16,
        minlayer=-1,
        maxlayer=1000,
        prune_only="",
        invert=False,
        true_sequential=False,
    )
    give_positions(model)
    llama.llama_sequential(model, [(row[None],) for row in calibrated.windows], calibrated.device)
    weights = layer_parameters(model)
    bits = {name: sparse_bits(weights[name]) for name in layer_linears(model)}
    return Compressed(f"sparsegpt {commit(code)}", weights, bits)
