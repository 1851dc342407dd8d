"""What a folder of safetensors holds, compared with the model in its config."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForSequenceClassification

from lrc.compressors.models.architecture import Architecture, build
from lrc.compressors.models.source import Source, load_dense, locate
from lrc.compressors.models.source_check import check_contents
from lrc.compressors.models.weights import WeightReader
from lrc.configs.errors import ModelError
from lrc.configs.recipe import Model

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
FIRST, SECOND = (f"model-0000{n}-of-00002.safetensors" for n in (1, 2))
INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(tiny_llama, tmp_path) -> Path:
    tiny_llama().save_pretrained(tmp_path / "source")
    return tmp_path / "source"


@pytest.fixture
def tied(tiny_llama, tmp_path) -> Path:
    tiny_llama(tie_word_embeddings=True).save_pretrained(tmp_path / "tied")
    return tmp_path / "tied"


def check(folder: Path, **options: str) -> tuple[Source, Architecture, list[str]]:
    source = locate(Model(path=str(folder), **options))
    return check_contents(source, build(source))


def warnings(folder: Path, **options: str) -> list[str]:
    return check(folder, **options)[2]


def add(folder: Path, **tensors: Tensor | None) -> None:
    """Add or replace tensors; None removes one."""
    stored = {**load_file(folder / "model.safetensors"), **tensors}
    kept = {name: tensor for name, tensor in stored.items() if tensor is not None}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


def shard(folder: Path, index: dict[str, str] | None = None) -> dict[str, str]:
    """Split the file in two; return the index, which `index` changes."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    files = {name: (FIRST, SECOND)[number % 2] for number, name in enumerate(tensors)}
    for file in (FIRST, SECOND):
        save_file({n: t for n, t in tensors.items() if files[n] == file}, folder / file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": files | (index or {})}))
    return files


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_whole_model_gives_no_warnings(folder, tied):
    assert warnings(folder) == warnings(tied) == []
    shard(folder)
    assert warnings(folder) == []


COMPUTED = {
    "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
    "model.rotary_emb.original_inv_freq": torch.ones(4),
    "model.position_ids": torch.arange(9),
    "model.layers.0.self_attn.masked_bias": torch.tensor(-1e9),
    "model.layers.0.self_attn.bias": torch.ones(1, 1, 9, 9, dtype=torch.bool),
    "rope.freqs": torch.ones(4),
}


def test_stored_tables_that_are_computed_today_give_no_warning(folder):
    add(folder, **COMPUTED)
    assert warnings(folder) == []


WITHOUT_A_PLACE = {
    "next-token prediction": "mtp.layers.0.mlp.up_proj.weight",
    "a layer too many": "model.layers.2.mlp.up_proj.weight",
    "a bias that the config denies": "model.layers.0.self_attn.q_proj.bias",
    "a value head": "v_head.summary.weight",
    "an adapter inside": "model.layers.0.mlp.up_proj.lora_A.weight",
    "a scale": "model.layers.0.mlp.up_proj.weight_scale",
}


@pytest.mark.parametrize("case", WITHOUT_A_PLACE)
def test_tensors_without_a_place_are_named_and_counted(folder, case):
    add(folder, **{WITHOUT_A_PLACE[case]: torch.ones(7), "other": torch.ones(3)})
    (warning,) = warnings(folder)
    assert "without a place in LlamaForCausalLM are left out (2, 40 bytes)" in warning
    assert WITHOUT_A_PLACE[case] in warning


def test_tensors_that_transformers_leaves_out_silently_are_named_too(tmp_path):
    """The class lists them among the keys to ignore."""
    config = AutoConfig.for_model(
        "qwen3_next", vocab_size=64, hidden_size=32, num_hidden_layers=1, intermediate_size=48
    )
    config.num_attention_heads, config.num_key_value_heads, config.head_dim = 4, 2, 8
    config.mlp_only_layers, config.layer_types = [0], ["full_attention"]
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    assert warnings(tmp_path) == []
    add(tmp_path, **{"mtp.norm.weight": torch.ones(32)})
    (warning,) = warnings(tmp_path)
    assert "mtp.norm.weight" in warning


def test_an_own_head_beside_a_tied_config_is_kept(tied):
    own = torch.randn(512, 32)
    add(tied, **{HEAD: own})
    source, architecture, (warning,) = check(tied, dtype="float32")
    assert f"{HEAD} and {EMBEDDING} differ" in warning
    assert HEAD in architecture.stored_parameters()
    assert not architecture.model.config.tie_word_embeddings
    assert torch.equal(WeightReader(tied, architecture).read(HEAD), own)
    dense = load_dense(source, tied, dtype=torch.float32, device="cpu")
    assert torch.equal(dense.lm_head.weight, own)
    assert not torch.equal(dense.model.embed_tokens.weight, own)
    assert not dense.config.tie_word_embeddings


def test_a_copy_of_the_embedding_stays_tied(tied):
    add(tied, **{HEAD: load_file(tied / "model.safetensors")[EMBEDDING].clone()})
    _, architecture, found = check(tied)
    assert found == []
    assert architecture.model.config.tie_word_embeddings


def test_one_different_bit_in_a_large_head_unties(tied):
    own = load_file(tied / "model.safetensors")[EMBEDDING].clone()
    own[-1, -1] += 1
    add(tied, **{HEAD: own})
    assert len(warnings(tied)) == 1


def test_an_untied_model_without_a_head_is_an_error(folder):
    add(folder, **{HEAD: None})
    with pytest.raises(ModelError, match=r"lm_head.weight is missing.*set tie_word_embeddings"):
        check(folder)


def test_the_dense_model_is_never_completed_with_random_numbers(folder):
    source, _, _ = check(folder)
    add(folder, **{"model.layers.1.mlp.up_proj.weight": None})
    with pytest.raises(ModelError, match=r"finds no model\.layers\.1\.mlp\.up_proj\.weight"):
        load_dense(source, folder, dtype=torch.float32, device="cpu")


def test_two_names_for_one_parameter_must_agree(folder):
    name = "model.layers.1.mlp.up_proj.weight"
    tensor = load_file(folder / "model.safetensors")[name]
    bare = name.removeprefix("model.")
    add(folder, **{bare: tensor.clone()})
    assert warnings(folder) == []
    add(folder, **{bare: tensor + 1})
    with pytest.raises(ModelError, match=rf"{bare} and {name} differ|{name} and {bare} differ"):
        check(folder)


def test_one_tensor_in_two_shards_must_agree(folder):
    name = next(name for name, file in shard(folder).items() if file == FIRST)
    tensor = load_file(folder / FIRST)[name]
    second = load_file(folder / SECOND)
    save_file({**second, name: tensor}, folder / SECOND)
    assert warnings(folder) == []
    save_file({**second, name: tensor + 1}, folder / SECOND)
    with pytest.raises(ModelError, match=rf"{name} differs from that in {FIRST}"):
        check(folder)


def test_an_index_that_names_a_tensor_of_no_shard(folder):
    shard(folder, {"mtp.norm.weight": SECOND})
    with pytest.raises(ModelError, match=rf"{SECOND}: lacks mtp.norm.weight, one of 1"):
        check(folder)


@pytest.mark.parametrize("name", ["../x.safetensors", "/tmp/x.safetensors"])
def test_an_index_that_names_a_file_elsewhere(folder, name):
    shard(folder, {"mtp.norm.weight": name})
    with pytest.raises(ModelError, match="must be the name of a file in the folder"):
        check(folder)


def test_shards_without_their_index(folder):
    shard(folder)
    (folder / INDEX).unlink()
    with pytest.raises(ModelError, match=r"neither model\.safetensors nor model.*index\.json"):
        check(folder)


@pytest.mark.parametrize("sharded", [True, False])
def test_weight_files_that_are_not_read_are_named(folder, sharded):
    if sharded:
        shard(folder)
    save_file({"x": torch.ones(1)}, folder / "consolidated.safetensors")
    (warning,) = warnings(folder)
    assert "consolidated.safetensors" in warning
    assert ("index" in warning) == sharded


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.uint8, torch.int32])
def test_quantized_weights_without_a_quantized_config_are_an_error(folder, dtype):
    add(folder, **{"model.layers.1.mlp.up_proj.weight": torch.ones(48, 32).to(dtype)})
    with pytest.raises(ModelError, match=r"up_proj.weight is stored as \w+: it is quantized"):
        check(folder)


@pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
@pytest.mark.parametrize("nested", [True, False])
def test_quantized_models_are_refused_wherever_the_config_says_so(folder, key, nested):
    block = {key: {"quant_method": "gptq", "bits": 4}}
    edit_config(folder, **({"text_config": block} if nested else block))
    with pytest.raises(ModelError, match="already compressed"):
        locate(Model(path=str(folder)))


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
@pytest.mark.parametrize("alone", [True, False])
def test_an_adapter_is_to_be_merged_first(folder, name, alone):
    (folder / name).write_text("{}")
    if alone:
        (folder / "config.json").unlink()
    with pytest.raises(ModelError, match=rf"holds an adapter \({name}\).*merge it first"):
        locate(Model(path=str(folder)))


HEADS = [
    "LlamaForSequenceClassification",
    "LlamaForTokenClassification",
    "LlamaForQuestionAnswering",
    "Qwen2ForRewardModel",
    "GPT2DoubleHeadsModel",
    "LlamaBidirectionalModel",
]


@pytest.mark.parametrize("name", HEADS)
def test_models_with_another_head_are_refused_by_name(folder, name):
    edit_config(folder, architectures=[name])
    with pytest.raises(ModelError, match=f"{name} .*no causal language model"):
        locate(Model(path=str(folder)))


def test_a_classifier_as_transformers_saves_it_is_refused(tied, tmp_path):
    config = AutoConfig.from_pretrained(tied)
    LlamaForSequenceClassification(config).save_pretrained(tmp_path / "classifier")
    with pytest.raises(ModelError, match="LlamaForSequenceClassification"):
        locate(Model(path=str(tmp_path / "classifier")))


@pytest.mark.parametrize(
    "names", [None, [], ["LlamaModel"], ["LLaMAForCausalLM"], "LlamaForCausalLM"]
)
def test_other_names_of_causal_models_are_accepted(folder, names):
    edit_config(folder, architectures=names)
    assert warnings(folder) == []


def test_weights_named_by_the_config_are_refused(folder):
    edit_config(folder, transformers_weights="other.safetensors")
    with pytest.raises(ModelError, match="transformers_weights"):
        locate(Model(path=str(folder)))


def test_float16_that_the_default_dtype_would_round_is_a_warning(folder, tiny_llama):
    tiny_llama().half().save_pretrained(folder)
    (warning,) = warnings(folder)
    assert warning.startswith("model.dtype: ")
    assert all(warnings(folder, dtype=name) == [] for name in ("bfloat16", "float16", "float32"))


def test_a_family_whose_tensors_transformers_converts_is_not_called_incomplete(tmp_path):
    """Checkpoints of HRM hold one tensor for queries, keys, values and gates."""
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    config = AutoConfig.for_model("hrm_text", **sizes, **heads)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"is not supported yet.*splits.*gqkv_proj"):
        check(tmp_path)
