"""Models and tokenizers that come with Python code: compressed, loaded and measured if trusted."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lrc.compressors.io.machine import Machine
from lrc.compressors.pipeline import compress
from lrc.configs.load import load_recipe

CONFIGURATION = """
from transformers import LlamaConfig

class TinyConfig(LlamaConfig):
    model_type = "tiny-remote"
"""
MODEL = """
from transformers import LlamaForCausalLM
from .configuration_tiny import TinyConfig
from .scale_tiny import SCALE

class TinyForCausalLM(LlamaForCausalLM):
    config_class = TinyConfig

    def forward(self, *args, **options):
        found = super().forward(*args, **options)
        found.logits = found.logits * SCALE
        return found
"""
TOKENIZER = """
from transformers import PreTrainedTokenizerFast

class TinyTokenizer(PreTrainedTokenizerFast):
    pass
"""
STAGES: dict[str, list[dict[str, Any]]] = {
    "low rank": [{"decompose": {"method": "svd-llm", "keep": 0.6}}],
    "drop": [{"slice": {"method": "drop", "keep": 0.9}}],
    "embedding": [{"quantize": {"method": "rtn", "embeddings": "int8", "lm_head": "int8"}}],
}
pytestmark = pytest.mark.usefixtures("code_cache")
KEY = "set model.trust_remote_code: true"


@pytest.fixture(params=["model", "tokenizer"])
def remote(request: pytest.FixtureRequest, tiny_model_folder: Path, tmp_path: Path) -> Path:
    """Return a folder whose model, or tokenizer, needs its own code."""
    folder = Path(shutil.copytree(tiny_model_folder, tmp_path / f"remote-{request.param}"))
    if request.param == "tokenizer":
        (folder / "tokenization_tiny.py").write_text(TOKENIZER)
        update(
            folder / "tokenizer_config.json",
            tokenizer_class="TinyTokenizer",
            auto_map={"AutoTokenizer": [None, "tokenization_tiny.TinyTokenizer"]},
        )
        return folder
    (folder / "configuration_tiny.py").write_text(CONFIGURATION)
    (folder / "modeling_tiny.py").write_text(MODEL)
    (folder / "scale_tiny.py").write_text("SCALE = 0.5\n")
    update(
        folder / "config.json",
        model_type="tiny-remote",
        architectures=["TinyForCausalLM"],
        auto_map={
            "AutoConfig": "configuration_tiny.TinyConfig",
            "AutoModelForCausalLM": "modeling_tiny.TinyForCausalLM",
        },
    )
    return folder


def update(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture
def write(
    remote: Path, tiny_text: Path, tiny_recipe: Callable[..., Path], tmp_path: Path
) -> Callable[..., Path]:
    """Write a recipe that trusts the code, or not."""

    def recipe(stages: list[dict[str, Any]], *, trusted: bool = True) -> Path:
        perplexity = {"source": str(tiny_text), "window": 32, "windows": 2}
        return tiny_recipe(
            remote,
            tmp_path / "run",
            model={"path": str(remote), "dtype": "float32", "trust_remote_code": trusted},
            stages=stages,
            evaluate={"perplexity": [perplexity], "baselines": []},
        )

    return recipe


@pytest.mark.parametrize("stages", STAGES)
def test_a_trusted_model_is_compressed_measured_and_loaded(
    stages: str, remote: Path, write: Callable[..., Path], tmp_path: Path
) -> None:
    report = compress(load_recipe(write(STAGES[stages])), Machine("cpu"))
    assert report["evaluation"]["perplexity"]["english"]["compressed"] > 1
    checkpoint = tmp_path / "run/checkpoint"
    assert {f.name for f in checkpoint.glob("*.py")} == {f.name for f in remote.glob("*.py")}
    assert "trust_remote_code=True" in (checkpoint / "README.md").read_text()
    model = AutoModelForCausalLM.from_pretrained(checkpoint, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=True)
    own = type(model if "model" in remote.name else tokenizer)
    assert own.__name__ in ("TinyForCausalLM", "TinyTokenizer")
    with torch.no_grad():
        assert torch.isfinite(model(**tokenizer("A compiler is", return_tensors="pt")).logits).all()


def test_what_is_not_trusted_is_not_run(
    remote: Path, write: Callable[..., Path], tmp_path: Path, lrc: Any, tiny_text: Path
) -> None:
    for command in ("plan", "compress"):
        ended = lrc(command, write(STAGES["low rank"], trusted=False))
        ended.refuses(1, "auto_map", KEY, code="invalid-model", where="model.path")
    assert lrc("compress", write(STAGES["low rank"]), "--quiet").code == 0
    checkpoint = tmp_path / "run/checkpoint"
    assert lrc("inspect", checkpoint, "--verify").code == 0
    measure = ("--perplexity", tiny_text, "--window", 32, "--windows", 2)
    for folder in (checkpoint, remote):
        for command in (("eval", folder, *measure), ("generate", folder, "--prompt", "A")):
            lrc(*command).refuses(1, "auto_map", "--trust-remote-code", code="invalid-model")
            assert lrc(*command, "--trust-remote-code").code == 0
