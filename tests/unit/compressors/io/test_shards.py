"""Headers of safetensors files."""

import pytest
import torch
from safetensors.torch import load, save_file

from lrc.compressors.io import shards
from lrc.compressors.io.shards import read_headers, same_tensor


@pytest.fixture
def file(tmp_path):
    tensors = {
        "a": torch.arange(24.0).reshape(4, 6),
        "b": torch.ones(3, dtype=torch.bfloat16),
        "copy": torch.arange(24.0).reshape(4, 6),
        "last differs": torch.cat([torch.arange(23.0), torch.zeros(1)]).reshape(4, 6),
        "flat": torch.arange(24.0),
        "empty": torch.ones(0, 2),
    }
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    return tmp_path / "x.safetensors"


def test_a_header_says_where_the_tensor_is(file):
    headers = read_headers([file])
    assert {*headers} == {*load(file.read_bytes())}
    header = headers["b"]
    assert (header.name, header.shape, header.dtype, header.nbytes) == ("b", [3], "BF16", 6)
    stored = file.read_bytes()[header.offset : header.offset + header.nbytes]
    assert torch.equal(torch.frombuffer(bytearray(stored), dtype=torch.bfloat16), torch.ones(3))


@pytest.mark.parametrize("chunk", [shards.CHUNK, 7])
def test_tensors_are_the_same_if_all_of_their_bytes_are(file, monkeypatch, chunk):
    monkeypatch.setattr(shards, "CHUNK", chunk)
    headers = read_headers([file])
    same = {name for name, header in headers.items() if same_tensor(headers["a"], header)}
    assert same == {"a", "copy"}
    assert same_tensor(headers["empty"], read_headers([file])["empty"])
