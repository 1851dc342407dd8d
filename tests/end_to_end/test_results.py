"""Every kind of result is resized, trained, saved and loaded, also as a model with another head."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    CompressedTensorsConfig,
)

from lrc.cli.inspect import describe
from lrc.compressors.layers import CompressedLinear
from lrc.configs.errors import CheckpointError

BLOCKS = {"slice": {"method": "slicegpt", "keep": 0.9, "width_multiple": 1, "rotations": "block"}}
LOW_RANK = {"decompose": {"method": "svd-llm", "keep": 0.6}}


def rtn(**options: Any) -> dict[str, Any]:
    return {"quantize": {"method": "rtn", **options}}


KINDS: dict[str, tuple[bool, list[dict[str, Any]]]] = {
    "low rank": (False, [LOW_RANK]),
    "low rank, tied": (True, [LOW_RANK]),
    "shared": (False, [{"decompose": {"method": "basis-sharing", "keep": 0.8}}]),
    "new biases": (True, [{"decompose": {"method": "lord", "keep": 0.6}}]),
    "zero points": (False, [rtn(bits=4, symmetric=False)]),
    "uneven": (False, [{"slice": {"method": "modegpt", "keep": 0.88, "uniform": False}}]),
    "blocks": (False, [BLOCKS]),
    "blocks, low rank, tied": (True, [BLOCKS, LOW_RANK]),
    "embedding": (True, [rtn(embeddings="int8")]),
    "embedding and head": (False, [rtn(embeddings="int8", lm_head="int8")]),
    "blocks, embedding": (True, [BLOCKS, rtn(embeddings="int8", lm_head="int8")]),
    "integers": (False, [rtn()]),
    "integers of MLPs": (True, [rtn(targets=["*.mlp.*"])]),
    "integer head": (False, [rtn(targets=[], lm_head="int8")]),
}
"""Whether the head of the source is tied, and the stages."""
PLAIN = [kind for kind in KINDS if kind.startswith("integer")]
EVALUATED = ["shared", "new biases", "uneven", "blocks, embedding", "integers", "integer head"]
PACKED_ROWS = [kind for kind in KINDS if "embedding" in kind]
RESIZABLE = [kind for kind in KINDS if kind not in PLAIN + PACKED_ROWS]
DISK = dict.fromkeys(["model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head"], "cpu")
DISK |= {"model.layers.0": "disk", "model.layers.1": "cpu"}
TOKENS = torch.arange(2, 30)[None]
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def results(compressed: Callable[..., Any]) -> Callable[[str], Path]:
    """Run the recipe of a kind once, and return its checkpoint."""
    stages = {kind: each for kind, (_, each) in KINDS.items()}
    made = {tied: compressed(stages, tie_word_embeddings=tied) for tied in (True, False)}
    return lambda kind: made[KINDS[kind][0]](kind)


def load(folder: Path, kind: Any = AutoModelForCausalLM, **options: Any) -> Any:
    return kind.from_pretrained(folder, dtype=torch.float32, **options).eval()


@torch.no_grad()
def output_of(model: Any) -> Tensor:
    found: Tensor = model(TOKENS)[0]
    return found


def states_of(model: Any) -> Tensor:
    """Return the output of the decoder after the whole model has been called.

    compressed-tensors expands integers at the first call of the whole model.
    """
    output_of(model)
    return output_of(model.base_model)


@pytest.mark.parametrize("size", [520, 500])
@pytest.mark.parametrize("kind", RESIZABLE)
def test_another_vocabulary_is_saved_and_loaded(kind, size, results, tmp_path) -> None:
    model = load(results(kind))
    before = output_of(model)
    model.resize_token_embeddings(size)
    resized = output_of(model)
    common = min(size, 512)
    torch.testing.assert_close(resized[..., :common], before[..., :common])
    model.save_pretrained(tmp_path / "first")
    again = load(tmp_path / "first")
    assert again.config.vocab_size == size
    assert torch.equal(output_of(again), resized)
    again.save_pretrained(tmp_path / "second")
    assert torch.equal(output_of(load(tmp_path / "second")), resized)


@pytest.mark.parametrize("change", [{"new_num_tokens": 520}, {"pad_to_multiple_of": 100}], ids=str)
@pytest.mark.parametrize("kind", PACKED_ROWS)
def test_packed_rows_are_not_resized(kind, change, results) -> None:
    model = load(results(kind))
    before = output_of(model)
    for same in ({}, {"new_num_tokens": 512}, {"pad_to_multiple_of": 64}):
        assert model.resize_token_embeddings(**same) is model.get_input_embeddings()
    with pytest.raises(CheckpointError, match=r"model\.dequantize\(\) first") as refused:
        model.resize_token_embeddings(**change)
    assert refused.value.code == "quantized-embedding"
    assert torch.equal(output_of(model), before)
    if "blocks" in kind:
        return
    model.dequantize()
    model.resize_token_embeddings(520)
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    assert output_of(model).shape[-1] == 520
    assert (head.weight is embedding.weight) == KINDS[kind][0]


@pytest.mark.parametrize("kind", [*RESIZABLE, *PACKED_ROWS])
def test_a_trained_step_is_saved_and_loaded(kind, results, tmp_path) -> None:
    model = load(results(kind)).train()
    before = output_of(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    model(TOKENS, labels=TOKENS).loss.backward()
    torch.optim.SGD(trained, lr=0.01).step()
    after = output_of(model)
    assert not torch.equal(after, before)
    model.save_pretrained(tmp_path)
    assert torch.equal(output_of(load(tmp_path)), after)


def test_tables_are_those_of_the_saved_model(results, tmp_path) -> None:
    model = load(results("low rank"))
    name = "model.layers.0.mlp.up_proj"
    model.set_submodule(name, model.get_submodule(name).to_dense())
    del model.model.layers[1]
    model.config.num_hidden_layers = 1
    expected = output_of(model)
    model.save_pretrained(tmp_path)
    block = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert len(block["modules"]) == 6
    assert name not in block["modules"]
    # The dense layer shares no product any more; measured 1.4e-6, of logits up to 5.
    torch.testing.assert_close(output_of(load(tmp_path)), expected, rtol=0, atol=5e-5)


@pytest.mark.parametrize("kind", [k for k in RESIZABLE + PACKED_ROWS if "blocks" not in k])
def test_a_dequantized_model_is_saved_and_loaded(kind, results, tmp_path) -> None:
    model = load(results(kind))
    expected = output_of(model)
    model.dequantize()
    assert not any(isinstance(module, CompressedLinear) for module in model.modules())
    torch.testing.assert_close(output_of(model), expected, rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(output_of(load(tmp_path)), expected, rtol=1e-4, atol=1e-4)


def test_dequantizing_takes_a_dtype(results) -> None:
    model = load(results("low rank"))
    model.dequantize(dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


# PEFT asks for an attribute that the newest transformers has renamed.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:You passed `quantization_config`:UserWarning")
@pytest.mark.parametrize("kind", PLAIN)
def test_integers_are_expanded_while_loading_as_the_readme_says(kind, results, tmp_path) -> None:
    expected = output_of(load(results(kind)))
    expanded = CompressedTensorsConfig(dequantize=True)
    options = {"device_map": DISK, "offload_folder": tmp_path / "offload"}
    offloaded = load(results(kind), quantization_config=expanded, **options)
    torch.testing.assert_close(output_of(offloaded), expected)
    model = load(results(kind), quantization_config=expanded)
    model.resize_token_embeddings(520)
    config = peft.LoraConfig(r=2, target_modules=["up_proj"], task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(model, config)
    adapted(TOKENS, labels=TOKENS).loss.backward()
    merged = adapted.merge_and_unload()
    merged.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    again = output_of(load(tmp_path))
    torch.testing.assert_close(again[..., :512], expected)


@pytest.mark.parametrize("kind", KINDS)
def test_the_decoder_alone_is_loaded_saved_and_loaded(kind, results, tmp_path) -> None:
    expected = states_of(load(results(kind)))
    decoder = load(results(kind), AutoModel)
    assert torch.equal(output_of(decoder), expected)
    decoder.save_pretrained(tmp_path)
    assert torch.equal(output_of(load(tmp_path, AutoModel)), expected)
    if kind == "integer head":  # which is not there any more, but in its config
        return
    assert torch.equal(states_of(load(tmp_path)), expected)


# Both classes hold the decoder under the same name and have a linear layer for scores.
@pytest.mark.parametrize(
    ("kind", "head"),
    [
        *((kind, AutoModelForSequenceClassification) for kind in KINDS),
        ("low rank", AutoModelForTokenClassification),
        ("blocks, embedding", AutoModelForTokenClassification),
    ],
)
def test_classifiers_start_from_it_and_are_saved(kind, head, results, tmp_path) -> None:
    model = load(results(kind), head, num_labels=3)
    assert torch.equal(states_of(model), states_of(load(results(kind))))
    scores = output_of(model)
    assert scores.shape[-1] == 3
    model.save_pretrained(tmp_path)
    assert torch.equal(output_of(load(tmp_path, head)), scores)
    assert torch.equal(states_of(load(tmp_path)), states_of(model))


@pytest.mark.parametrize("kind", ["low rank", "embedding", "blocks"])
def test_a_class_that_holds_the_decoder_under_another_name_is_refused(kind, results) -> None:
    """There a Llama is called `transformer`: transformers would start from random weights."""
    with pytest.raises(CheckpointError, match="LlamaForQuestionAnswering"):
        load(results(kind), AutoModelForQuestionAnswering)


def test_a_saved_decoder_is_inspected(results, tmp_path) -> None:
    model = load(results("embedding and head"), AutoModel)
    model.save_pretrained(tmp_path)
    names = {module["name"] for module in describe(tmp_path, verify=False)["modules"]}
    assert {"embed_tokens", "layers.0.mlp.up_proj"} <= names
    assert "lm_head" not in names


# lm-eval hands the checkpoint's own block to transformers, which says that it was there already.
@pytest.mark.filterwarnings("ignore:You passed `quantization_config`:UserWarning")
@pytest.mark.parametrize("kind", EVALUATED)
def test_lm_eval_scores_it_as_transformers_predicts(kind, results) -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    folder = results(kind)
    harness = HFLM(pretrained=str(folder), dtype="float32", device="cpu", batch_size=1)
    context, continuation = "The statement", " is executed"
    request = Instance("loglikelihood", {}, (context, continuation), 0)
    ((score, _),) = harness.loglikelihood([request], disable_tqdm=True)
    encode = AutoTokenizer.from_pretrained(folder)
    ids = torch.tensor([encode(context + continuation)["input_ids"]])
    start = len(encode(context)["input_ids"])
    with torch.no_grad():
        logprobs = load(folder)(ids).logits[0, start - 1 : -1].log_softmax(-1)
    expected = logprobs.gather(1, ids[0, start:, None]).sum()
    assert score == pytest.approx(float(expected), abs=1e-3)
