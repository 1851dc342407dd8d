"""SVD-LLM, by the authors' code: https://github.com/AIoT-MLSys-Lab/SVD-LLM."""

from importlib import import_module

from compressed_model import Calibrated, Compressed, layer_linears
from research_code import commit, import_folder, leave_out


def svd_llm(calibrated: Calibrated, *, code: str, keep: float = 0.8) -> Compressed:
    """Factorize with step 1 of SVDLLM.py: `profle_svdllm` (so spelled), then `whitening`.

    Factors are rounded to bfloat16. The authors' `--ratio` is ``1 - keep``.
    """
    import_folder(code)
    leave_out("component.svd_mistral", "component.svd_opt", "evaluater")
    for module, name in (
        ("component.svd_mistral", "SVD_MistralAttention"),
        ("component.svd_mistral", "SVD_MistralMLP"),
        ("component.svd_opt", "SVDOPTDecoderLayer"),
    ):
        setattr(import_module(module), name, None)
    program, model = import_module("SVDLLM"), calibrated.model
    names = list(layer_linears(model))
    statistics = program.profle_svdllm("llama", model, calibrated.batches(8), calibrated.device)
    program.whitening("llama", model, statistics, keep, calibrated.device)
    weights, bits = {}, {}
    for name in names:
        parent, _, linear = name.removesuffix(".weight").rpartition(".")
        module, kind = model.get_submodule(parent), linear.removesuffix("_proj")
        U = getattr(module, f"{kind}_u_proj").weight.detach().bfloat16()
        V = getattr(module, f"{kind}_v_proj").weight.detach().bfloat16()
        weights[name] = U.float() @ V.float()
        bits[name] = 16 * (U.numel() + V.numel())
    return Compressed(f"SVD-LLM {commit(code)}", weights, bits)
