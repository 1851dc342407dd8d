"""What a GGUF file holds, compared with the model that transformers makes of it."""

from pathlib import Path

import gguf
import pytest
import torch
from transformers import AutoConfig

from lrc.compressors.models.architecture import build
from lrc.compressors.models.gguf_source import check_gguf, ignored_metadata
from lrc.compressors.models.source import Source, locate
from lrc.compressors.models.source_check import check_contents
from lrc.configs.errors import ModelError
from lrc.configs.recipe import Model


@pytest.fixture
def model(tiny_llama):
    return tiny_llama(tie_word_embeddings=True)


def check(path: Path, **options: str) -> list[str]:
    """Return the warnings about a file."""
    source = locate(Model(path=str(path), **options))
    return check_contents(source, build(source))[2]


@pytest.mark.parametrize("tied", [True, False])
def test_a_whole_file_gives_no_warnings(write_gguf, tiny_llama, tmp_path, tied):
    assert check(write_gguf(tmp_path / "m.gguf", tiny_llama(tie_word_embeddings=tied))) == []


@pytest.mark.parametrize("name", ["blk.1.ffn_up.weight", "token_embd.weight", "output_norm.weight"])
def test_a_missing_tensor_is_an_error(write_gguf, model, tmp_path, name):
    path = write_gguf(tmp_path / "m.gguf", model, leave_out=[name])
    with pytest.raises(ModelError, match=r" is missing; 19 of 20 tensors .*merge the parts"):
        check(path)


def test_a_tensor_of_another_size_is_an_error(write_gguf, model, tmp_path):
    wide = {"blk.1.ffn_up.weight": torch.zeros(50, 32)}
    with pytest.raises(ModelError, match=r"up_proj.weight is \[50, 32\], not \[48, 32\]"):
        check(write_gguf(tmp_path / "m.gguf", model, tensors=wide))


FIRST = [f"blk.0.{leaf}.weight" for leaf in ("attn_norm", "attn_q", "attn_k", "ffn_up")]


@pytest.mark.parametrize("total", [{}, {"split.tensors.count": 20}])
def test_a_part_of_a_split_model_says_which(write_gguf, model, tmp_path, total):
    parts = {"split.no": 1, "split.count": 3, **total}
    path = write_gguf(tmp_path / "m.gguf", model, leave_out=FIRST, metadata=parts)
    with pytest.raises(ModelError, match=r"holds 16 of 20 .* part 2 of 3 .*merge the parts first"):
        check(path)


def test_a_part_without_metadata_says_so_too(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.kv_data = [{}]  # as llama-gguf-split writes all parts but the first
    writer.add_uint16("split.no", 1)
    writer.add_uint16("split.count", 2)
    writer.add_int32("split.tensors.count", 9)
    writer.add_tensor("a", torch.zeros(3).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ModelError, match="holds 1 of 9 tensors: it is part 2 of 2"):
        locate(Model(path=str(tmp_path / "m.gguf")))


@pytest.mark.parametrize("kept", [0.2, 0.5, 0.99])
def test_a_truncated_file_is_an_error(write_gguf, model, tmp_path, kept):
    path = write_gguf(tmp_path / "m.gguf", model)
    path.write_bytes(path.read_bytes()[: int(kept * path.stat().st_size)])
    with pytest.raises(ModelError, match="truncated"):
        check(path)


CHANGING = {
    "rope.scaling.type": "linear",
    "rope.scaling.factor": 4.0,
    "rope.scale_linear": 2.0,
    "attention.sliding_window": 64,
    "attention.scale": 0.5,
    "attention.key_length": 16,
    "attention.value_length": 16,
    "attention.causal": False,
    "attn_logit_softcapping": 30.0,
    "final_logit_softcapping": 30.0,
    "logit_scale": 0.5,
    "embedding_scale": 12.0,
    "residual_scale": 0.5,
    "attention.max_alibi_bias": 8.0,
    "attention.clamp_kqv": 8.0,
    "pooling_type": 4,
}


@pytest.mark.parametrize("key", CHANGING)
def test_metadata_that_changes_the_computation_is_an_error(write_gguf, model, tmp_path, key):
    path = write_gguf(tmp_path / "m.gguf", model, metadata={f"llama.{key}": CHANGING[key]})
    with pytest.raises(ModelError, match=rf"does not read llama\.{key} = {CHANGING[key]!r}"):
        check(path)


def test_metadata_without_an_effect_is_passed_over(write_gguf, model, tmp_path):
    same = {
        "rope.scaling.type": "none",
        "rope.scaling.factor": 1.0,
        "rope.scaling.original_context_length": 256,
        "attention.key_length": 8,
        "attention.value_length": 8,
        "attention.scale": 8**-0.5,
        "attention.sliding_window": 256,  # as long as the context
        "attention.causal": True,
        "logit_scale": 1.0,
        "final_logit_softcapping": 0.0,
        "expert_count": 0,
    }
    metadata = {f"llama.{key}": value for key, value in same.items()}
    assert check(write_gguf(tmp_path / "m.gguf", model, metadata=metadata)) == []


DENSE = {"context_length": 4096, "embedding_length": 64, "feed_forward_length": 96}
HEADS = {"block_count": 2, "attention.head_count": 4, "attention.head_count_kv": 2}
FAMILIES = {
    "qwen2": {"attention.layer_norm_rms_epsilon": 1e-6, "rope.freq_base": 1e6},
    "qwen3": {"attention.key_length": 128, "attention.value_length": 128},
    "gemma2": {
        "attention.key_length": 256,
        "attention.value_length": 256,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "attention.sliding_window": 4096,
    },
    "gemma3": {"attention.key_length": 256, "attention.value_length": 256, "rope.freq_base": 1e6},
    "phi3": {"rope.dimension_count": 16, "rope.scaling.original_context_length": 4096},
    "stablelm": {
        "use_parallel_residual": False,
        "rope.dimension_count": 4,
        "attention.layer_norm_epsilon": 1e-5,
    },
    "starcoder2": {"rope.freq_base": 10000.0, "attention.layer_norm_epsilon": 1e-5},
    "falcon": {"attention.layer_norm_epsilon": 1e-5, "tensor_data_layout": "jploski"},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_what_converters_write_about_other_families_is_read_or_agrees(family):
    options = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    model_type = family + "_text" * (family == "gemma3")
    config = AutoConfig.for_model(model_type, **options, num_hidden_layers=2)
    values = {"attention.sliding_window": 512} if family == "gemma3" else {}
    values = {**DENSE, **HEADS, **FAMILIES[family], **values}
    metadata = {f"{family}.{key}": value for key, value in values.items()}
    metadata["general.architecture"] = family
    assert ignored_metadata(metadata, config) == ([], [])


@pytest.mark.parametrize(
    ("family", "key", "value"),
    [("starcoder2", "rope.freq_base", 1e6), ("stablelm", "rope.dimension_count", 8)],
)
def test_what_transformers_takes_from_its_own_defaults_must_agree(family, key, value):
    config = AutoConfig.for_model(family, hidden_size=64, num_attention_heads=4)
    metadata = {"general.architecture": family, f"{family}.{key}": value}
    assert ignored_metadata(metadata, config) == ([f"{family}.{key} = {value!r}"], [])


def test_a_model_without_attention_has_no_head_size():
    metadata = {"general.architecture": "mamba", "mamba.attention.key_length": 8, "mamba.x": 1}
    found = ignored_metadata(metadata, AutoConfig.for_model("mamba"))
    assert found == (["mamba.attention.key_length = 8"], ["mamba.x = 1"])


def test_unknown_metadata_is_a_warning(write_gguf, model, tmp_path):
    path = write_gguf(tmp_path / "m.gguf", model, metadata={"llama.mystery": 3, "other.key": 1})
    (warning,) = check(path)
    assert "left out (1)" in warning
    assert "llama.mystery = 3" in warning


def test_tensors_without_a_place_are_a_warning_or_an_error(write_gguf, model, tmp_path):
    extra = {"blk.0.attn_q.bias": torch.ones(32), "blk.2.nextn.eh_proj.weight": torch.ones(4, 4)}
    (warning,) = check(write_gguf(tmp_path / "m.gguf", model, tensors=extra))
    assert "(2, 192 bytes)" in warning
    assert all(name in warning for name in extra)
    scaled = {"rope_freqs.weight": torch.ones(4)}
    with pytest.raises(ModelError, match=r"does not read rope_freqs\.weight"):
        check(write_gguf(tmp_path / "scaled.gguf", model, tensors=scaled))


@pytest.mark.parametrize("kind", ["adapter", "mmproj"])
def test_files_that_hold_no_model_are_refused_by_their_type(write_gguf, model, tmp_path, kind):
    path = write_gguf(tmp_path / "m.gguf", model, metadata={"general.type": kind})
    with pytest.raises(ModelError, match=f"of type '{kind}'"):
        locate(Model(path=str(path)))


def test_float16_that_the_default_dtype_would_round_is_a_warning(write_gguf, model, tmp_path):
    path = write_gguf(tmp_path / "m.gguf", model.half())
    (warning,) = check(path)
    assert warning.startswith("model.dtype: ")
    assert check(path, dtype="bfloat16") == check(path, dtype="float16") == []


def test_experts_are_refused(write_gguf, model, tmp_path):
    config = AutoConfig.for_model("mixtral", num_local_experts=2, num_hidden_layers=1)
    path = write_gguf(tmp_path / "m.gguf", model)
    experts = build(Source(Model(path="m"), Path("m"), config, weights_local=False))
    with pytest.raises(ModelError, match="holds a mixture of experts, which lrc reads from safe"):
        check_gguf(path, experts)
