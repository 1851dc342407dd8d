"""vLLM with the plugin predicts what transformers predicts. Skipped where vLLM is not installed."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lrc.configs.errors import CheckpointError

# Before vLLM reads them: one process, so that errors can be seen, and little memory.
os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}
os.environ |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}
vllm = pytest.importorskip("vllm")
pytestmark = pytest.mark.filterwarnings("ignore")


def svd(*targets: str, **options: Any) -> dict[str, Any]:
    return {"decompose": {"method": "svd", "keep": 0.6, "targets": [*targets], **options}}


def rtn(*targets: str, **options: Any) -> dict[str, Any]:
    return {"quantize": {"method": "rtn", "targets": [*targets], **options}}


ALL = "*"
KINDS: dict[str, list[dict[str, Any]]] = {
    "low rank": [svd(ALL)],
    # Different forms within q, k, v and within gate, up.
    "mixed": [
        svd("*.q_proj", "*.up_proj", storage="pivoted_low_rank"),
        rtn("*.v_proj", "*.down_proj", bits=4, symmetric=False),
    ],
    "correction": [rtn(ALL, bits=4, group_size=32, low_rank_correction={"rank": 4})],
    "sparse, embedding": [
        {"decompose": {"method": "magnitude", "keep": 0.8, "targets": ["*.mlp.*"]}},
        rtn("*.q_proj", bits=8, embeddings="int8"),
    ],
    # For which vLLM has no kernel, or not for layers that it fuses.
    "plain": [rtn("*.self_attn.*", bits=8), rtn("*.up_proj", bits=4, group_size=32)],
}
SERVED = {"served": [rtn(ALL, bits=4, group_size=32, serve="vllm-cpu")]}
PROMPTS = [[7, 5, 300, 12, 44, 91, 6, 23, 18, 19, 250], [3, 9, 4]]


@pytest.fixture(scope="module")
def checkpoint(compressed: Callable[..., Any]) -> Any:
    """Run the recipe of a kind once, and return its checkpoint."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2}  # heads of 32
    return compressed(KINDS | SERVED, **sizes, num_key_value_heads=1)


def engine(folder: Path, dtype: str = "float32") -> Any:
    options = {"quantization": "lrc"} if "plain" in str(folder) else {}
    return vllm.LLM(
        str(folder),
        dtype=dtype,
        enforce_eager=True,
        max_model_len=64,
        max_num_seqs=2,
        seed=0,
        **options,
    )


def generated(llm: Any, **options: Any) -> list[Any]:
    prompts = [{"prompt_token_ids": prompt} for prompt in PROMPTS]
    sampling = vllm.SamplingParams(temperature=0, ignore_eos=True, **options)
    return [each.outputs[0] for each in llm.generate(prompts, sampling, use_tqdm=False)]


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_and_probabilities_are_those_of_transformers(kind, checkpoint) -> None:
    found = generated(engine(checkpoint(kind)), max_tokens=8, logprobs=1)
    model = AutoModelForCausalLM.from_pretrained(checkpoint(kind), dtype=torch.float32).eval()
    for prompt, output in zip(PROMPTS, found, strict=True):
        ids = torch.tensor([prompt])
        expected = model.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=None)
        assert output.token_ids == expected[0, len(prompt) :].tolist()
        compare(model, expected, output, atol=1e-3)


def compare(model: Any, tokens: torch.Tensor, output: Any, atol: float) -> None:
    """Compare the log-probabilities of the last tokens with those of an output of vLLM."""
    count = len(output.token_ids)
    with torch.no_grad():
        logprobs = model(tokens).logits.log_softmax(-1)[0, -count - 1 : -1]
    chosen = logprobs.gather(1, tokens[0, -count:, None])[:, 0].float()
    theirs = [
        steps[token].logprob for token, steps in zip(output.token_ids, output.logprobs, strict=True)
    ]
    torch.testing.assert_close(torch.tensor(theirs), chosen, rtol=0, atol=atol)


def test_what_is_planned_for_cpus_runs_in_the_kernels_of_vllm(checkpoint) -> None:
    """These multiply in 16 bits, so that the most probable token may be another one."""
    folder = checkpoint("served")
    llm = engine(folder, "bfloat16")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for prompt, output in zip(PROMPTS, generated(llm, max_tokens=8, logprobs=1), strict=True):
        tokens = torch.tensor([[*prompt, *output.token_ids]])
        compare(model, tokens, output, atol=0.1)


def test_a_missing_tensor_is_an_error(checkpoint, tmp_path) -> None:
    for file in checkpoint("low rank").glob("*.json"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(checkpoint("low rank") / "model.safetensors")
    name = "model.layers.1.self_attn.k_proj.low_rank.b.weight"
    del tensors[name]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"layers\.1\.self_attn\.k_proj: .*low_rank\.b"):
        engine(tmp_path)
