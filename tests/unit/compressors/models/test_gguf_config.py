"""The config in a GGUF file, which transformers reads once for each version of the file."""

import gguf
from transformers import modeling_gguf_pytorch_utils

from lrc.compressors.models.gguf_config import configs_read_once, gguf_config


def test_the_metadata_is_read_once_until_the_file_changes(
    write_gguf, tiny_llama, tmp_path, monkeypatch
):
    read, original = [], gguf.GGUFReader

    def reader(path):
        read.append(path)
        return original(path)

    monkeypatch.setattr(gguf, "GGUFReader", reader)
    path = write_gguf(tmp_path / "m.gguf", tiny_llama())
    config = gguf_config(path)
    config.hidden_size = 1  # a config is not shared
    assert gguf_config(path).hidden_size == tiny_llama().config.hidden_size
    with configs_read_once():
        found = modeling_gguf_pytorch_utils.load_gguf_checkpoint(path)
        assert found["config"]["model_type"] == "llama"
        assert len(read) == 1
        assert (found["tokenizer"], len(read)) == ({}, 2)  # read when it is used
    write_gguf(path, tiny_llama(num_hidden_layers=1))
    assert (gguf_config(path).num_hidden_layers, len(read)) == (1, 3)
