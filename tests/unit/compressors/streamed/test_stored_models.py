"""Models of every kind are opened without reading their weights."""

import json

import pytest
import torch
from safetensors.torch import load_file

from lrc.compressors.streamed.stored_models import open_model
from lrc.configs.errors import ModelError


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_folder_keeps_its_precision(tiny_llama, tmp_path, dtype):
    tiny_llama().to(dtype).save_pretrained(tmp_path)
    files = open_model(str(tmp_path), tmp_path / "scratch", device="cpu")
    assert files.dtype == torch.float32  # in which CPUs compute
    for name, stored in load_file(tmp_path / "model.safetensors").items():
        read = files.reader.read(name)
        assert read.dtype == dtype
        assert torch.equal(read, stored)
    assert all(parameter.is_meta for parameter in files.architecture.model.parameters())
    assert len(files.calls) == len(files.architecture.layers)


def test_a_gguf_file_is_converted(tiny_llama, write_gguf, tmp_path):
    model = tiny_llama(tie_word_embeddings=True)
    path = write_gguf(tmp_path / "m.gguf", model)
    files = open_model(str(path), tmp_path / "scratch", device="cpu")
    name = "model.layers.1.self_attn.k_proj.weight"
    assert torch.equal(files.reader.read(name), model.state_dict()[name].to(torch.bfloat16))
    assert (tmp_path / "scratch" / "model.safetensors").is_file()


def test_a_checkpoint_of_another_tool_is_refused(tiny_llama, tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "other"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="already compressed"):
        open_model(str(tmp_path), tmp_path / "scratch", device="cpu")
