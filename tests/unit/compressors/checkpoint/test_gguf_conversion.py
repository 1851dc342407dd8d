"""A GGUF file becomes a folder of safetensors, tensor by tensor."""

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils.quantization_config import GgufConfig

from lrc.compressors.checkpoint import gguf_conversion
from lrc.compressors.checkpoint.gguf_conversion import convert_gguf
from lrc.compressors.checkpoint.writer import INDEX, write_weights
from lrc.compressors.models.source import locate
from lrc.configs.errors import ModelError
from lrc.configs.recipe import Model


def converted(path, folder, dtype="float32"):
    """Convert a file; return the tensors of the folder."""
    convert_gguf(locate(Model(path=str(path), dtype=dtype)), folder)
    return {k: t for file in folder.glob("*.safetensors") for k, t in load_file(file).items()}


def by_transformers(path, dtype="float32"):
    model = AutoModelForCausalLM.from_pretrained(
        path.parent,
        gguf_file=path.name,
        dtype=dtype,
        quantization_config=GgufConfig(dequantize=True),
    )
    return model.state_dict()


@pytest.mark.parametrize("tied", [True, False])
def test_the_model_is_that_from_which_the_file_was_made(write_gguf, tiny_llama, tmp_path, tied):
    model = tiny_llama(tie_word_embeddings=tied)
    path = write_gguf(tmp_path / "m.gguf", model)
    stored = converted(path, tmp_path / "converted")
    assert ("lm_head.weight" in stored) != tied
    assert stored.keys() == model.state_dict().keys() - ({"lm_head.weight"} if tied else set())
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in stored.items())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "converted")
    tokens = torch.arange(8)[None]
    assert torch.equal(loaded(tokens).logits, model.eval()(tokens).logits)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_1", "F16", "BF16"])
def test_quantized_tensors_are_those_of_transformers(write_gguf, tiny_llama, tmp_path, kind):
    model = tiny_llama(tie_word_embeddings=True)
    path = write_gguf(tmp_path / "plain.gguf", model)
    reader = gguf.GGUFReader(path)
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    for field in reader.fields.values():
        if field.types and not field.name.startswith(("GGUF.", "general.architecture")):
            writer.add_key_value(field.name, field.contents(), field.types[0])
    to = gguf.GGMLQuantizationType[kind]
    for tensor in reader.tensors:
        data, as_type = tensor.data, None
        if tensor.data.ndim == 2 and tensor.data.shape[1] % 32 == 0:  # whole blocks
            data, as_type = gguf.quantize(np.array(tensor.data), to), to
        writer.add_tensor(tensor.name, data, raw_dtype=as_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    for dtype in ("float32", "bfloat16"):
        found = converted(tmp_path / "m.gguf", tmp_path / dtype, dtype)
        expected = by_transformers(tmp_path / "m.gguf", dtype)
        assert found.keys() == expected.keys() - {"lm_head.weight"}
        assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


def test_files_that_transformers_converts_by_a_mapping_are_undone_the_same_way(tmp_path):
    config = AutoConfig.for_model(
        "lfm2",
        **{"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "block_auto_adjust_ff_dim": False},
        **{"layer_types": ["conv", "full_attention"], "conv_L_cache": 3},
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "lfm2")
    values = {
        **{"block_count": 2, "context_length": 128, "embedding_length": 32},
        **{"feed_forward_length": 48, "attention.head_count": 4, "vocab_size": 64},
        "shortconv.l_cache": 3,
    }
    for key, value in values.items():
        writer.add_uint32(f"lfm2.{key}", value)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([str(number) for number in range(64)])
    writer.add_token_merges([])
    writer.add_array("lfm2.attention.head_count_kv", [0, 2])
    writer.add_float32("lfm2.attention.layer_norm_rms_epsilon", config.norm_eps)
    writer.add_float32("lfm2.rope.freq_base", 1_000_000.0)
    names = {
        **{"model.embed_tokens.": "token_embd.", "model.embedding_norm.": "token_embd_norm."},
        **{"model.layers.": "blk.", "operator_norm": "attn_norm", "conv.conv": "shortconv.conv"},
        **{"q_layernorm": "attn_q_norm", "k_layernorm": "attn_k_norm", "self_attn.": ""},
        **{"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v"},
        **{
            "feed_forward.w1": "ffn_gate",
            "feed_forward.w3": "ffn_up",
            "feed_forward.w2": "ffn_down",
        },
    }
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        if "out_proj" in name or "in_proj" in name:
            name = name.replace("conv.", "shortconv.").replace("self_attn.out_proj", "attn_output")
        for old, new in names.items():
            name = name.replace(old, new)
        writer.add_tensor(name, tensor.squeeze().contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    stored = converted(tmp_path / "m.gguf", tmp_path / "converted")
    assert stored.keys() == model.state_dict().keys() - {"lm_head.weight"}
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in stored.items())


def test_shards_are_written_one_after_the_other(write_gguf, tiny_llama, tmp_path, monkeypatch):
    path = write_gguf(tmp_path / "m.gguf", tiny_llama())
    whole = converted(path, tmp_path / "whole")
    live: list[str] = []

    def small(folder, meta, read):
        write_weights(
            folder, meta, lambda name: live.append(name) or read(name), max_shard_bytes=9000
        )

    monkeypatch.setattr(gguf_conversion, "write_weights", small)
    shards = converted(path, tmp_path / "shards")
    assert (tmp_path / "shards" / INDEX).is_file()
    assert sorted(live) == sorted(whole) == sorted(shards)
    assert all(torch.equal(shards[name], tensor) for name, tensor in whole.items())


def test_a_type_that_cannot_be_dequantized_is_an_error(
    write_gguf, tiny_llama, tmp_path, monkeypatch
):
    path = write_gguf(tmp_path / "m.gguf", tiny_llama())

    def refuse(*_):
        raise NotImplementedError("IQ7_X is not yet supported")

    monkeypatch.setattr(gguf_conversion, "dequantize", refuse)
    with pytest.raises(ModelError, match=r"m\.gguf could not be dequantized .*IQ7_X"):
        converted(path, tmp_path / "converted")
