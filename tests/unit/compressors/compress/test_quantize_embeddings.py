"""Quantization of embedding and head: some rows at a time, with the result of all at once."""

from pathlib import Path
from typing import Any

import pytest
import torch

from lrc.compressors.compress import quantize_embeddings as embeddings
from lrc.compressors.compress.layerwise import layer_file
from lrc.compressors.io.journal import Journal
from lrc.compressors.layers import QuantizationArgs
from lrc.compressors.models.source import locate
from lrc.compressors.planning.compile import compile_plan
from lrc.compressors.solvers.quantized_matrix import round_to_nearest
from lrc.compressors.stages import STAGES
from lrc.configs.recipe import Model, Recipe


@pytest.mark.parametrize("written", ["int4-g16", "int3-g8-asymmetric"])
def test_quantizing_in_pieces_equals_quantizing_at_once(
    written: str, source: Path, architecture: Any, reader: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    stage = {"quantize": {"method": "rtn", "targets": [], "embeddings": written}}
    model = Model(path=str(source), dtype="float32")
    recipe = Recipe.model_validate({"model": model, "stages": [stage], "output": "x"})
    journal = Journal(tmp_path / "run")
    journal.work.mkdir(parents=True)
    monkeypatch.setattr(embeddings, "NUMBERS", 100)  # a few rows
    plan = compile_plan(recipe, locate(model), architecture, STAGES).plan
    (task,) = plan.embeddings
    W = reader.read(f"{task.name}.weight")
    done = embeddings.quantize_embeddings(plan, reader, journal, device="cpu")
    found = round_to_nearest(W, QuantizationArgs.parse(written), dtype=W.dtype)
    for leaf, tensor in found.encode("weight").items():
        stored = journal.read_tensor(layer_file(task.layer), f"{task.name}.dense.{leaf}")
        assert torch.equal(stored, tensor), leaf
    error = float((W.double() - found.weight()).square().sum() / W.double().square().sum())
    assert done.results[task.name].relative_error == pytest.approx(error)
