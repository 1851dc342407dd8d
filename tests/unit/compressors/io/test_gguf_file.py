"""The header of a GGUF file, read without the package gguf's reader."""

import gguf
import pytest
import torch

from lrc.compressors.io.gguf_file import read_gguf


@pytest.fixture
def path(write_gguf, tiny_llama, tmp_path):
    metadata = {"llama.note": "ä", "a.flag": True, "general.alignment": 64}
    tensors = {"odd": torch.ones(3), "half": torch.ones(2, 5, 3).half()}
    return write_gguf(tmp_path / "m.gguf", tiny_llama(), metadata=metadata, tensors=tensors)


def test_the_header_is_that_of_the_package_gguf(path):
    metadata, headers = read_gguf(path)
    reader = gguf.GGUFReader(path)
    fields = {k: f.contents() for k, f in reader.fields.items() if not k.startswith("GGUF.")}
    assert metadata == fields
    assert [(t.name, t.data_offset, t.n_bytes, [*t.shape[::-1]]) for t in reader.tensors] == [
        (h.name, h.offset, h.nbytes, h.shape) for h in headers.values()
    ]
    assert {"F32", "F16"} == {h.dtype for h in headers.values()}


def test_arrays_are_read(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_array("a", ["x", "yz"])
    writer.add_array("b", [1, -2, 3])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    metadata, headers = read_gguf(tmp_path / "m.gguf")
    assert (metadata["a"], metadata["b"], headers) == (["x", "yz"], [1, -2, 3], {})


def test_a_file_cut_anywhere_is_not_a_whole_file(path):
    whole = path.read_bytes()
    for length in [*range(0, 1500, 7), len(whole) // 2, len(whole) - 64]:
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="not a whole GGUF file"):
            read_gguf(path)


def test_another_version_or_format_is_not_read(path):
    whole = path.read_bytes()
    for content in (b"GGML" + whole[4:], whole[:4] + b"\x01" + whole[5:], b"text" * 99):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="not a whole GGUF file"):
            read_gguf(path)
