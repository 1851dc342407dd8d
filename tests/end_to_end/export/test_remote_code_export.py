"""`lrc export --format remote-code`: folders that transformers loads where lrc is not installed."""

import json
import logging
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from lrc.compressors.checkpoint.reader import check_checkpoint
from lrc.compressors.export import modeling_lrc, remote_code
from lrc.compressors.layers import CompressedLinear

pytestmark = pytest.mark.usefixtures("one_thread", "code_cache")

TOKENS = torch.arange(2, 60)[None]
FORMS = [
    "embedded",  # with a tied head
    "asymmetric",
    "mixed",
    "factors",
    "shared",
    "sparse",
    "biases",
    "uneven-integers",
    "rotated-blocks",
]


@torch.no_grad()
def logits(model: Any, tokens: Tensor = TOKENS) -> Tensor:
    found: Tensor = model.eval()(tokens).logits
    return found


def load(folder: Path, **options: Any) -> Any:
    options = {"dtype": torch.float32, **options}
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **options)


@pytest.fixture
def exported(
    checkpoint: Callable[[str], Path], lrc: Callable[..., Any], tmp_path: Path
) -> Callable[[str], Path]:
    def export(name: str) -> Path:
        out = tmp_path / f"exported-{name}"
        ended = lrc("export", checkpoint(name), out, "--format", "remote-code", "--json")
        assert ended.code == 0, ended.err
        facts = json.loads(ended.out)
        assert facts["bytes"] == sum(file.stat().st_size for file in out.iterdir())
        return out

    return export


@pytest.mark.parametrize("name", FORMS)
def test_the_code_computes_what_lrc_computes(
    name: str,
    checkpoint: Callable[[str], Path],
    exported: Callable[[str], Path],
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder = exported(name)
    expected = AutoModelForCausalLM.from_pretrained(checkpoint(name), dtype=torch.float32)
    monitored = logging.getLogger("transformers")
    monitored.addHandler(caplog.handler)
    try:
        model = load(folder)
    finally:
        monitored.removeHandler(caplog.handler)
    assert caplog.records == []
    assert type(model).__module__.startswith("transformers_modules.")
    assert not any(isinstance(module, CompressedLinear) for module in model.modules())
    # Measured 2e-6 of logits up to 8: lrc stacks factors, and has kernels for integers.
    torch.testing.assert_close(logits(model), logits(expected), rtol=0, atol=5e-5)
    one = TOKENS[:, :1]
    torch.testing.assert_close(logits(model, one), logits(expected, one), rtol=0, atol=5e-5)
