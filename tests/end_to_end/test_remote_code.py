"""Models and tokenizers that come with Python code: compressed, loaded and measured if trusted."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
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
OWN_CONFIGURATION = """
from transformers import PreTrainedConfig

class OwnConfig(PreTrainedConfig):
    model_type = "own-remote"
    vocab_size: int = 512
    hidden_size: int = 32
    num_hidden_layers: int = 2
    max_position_embeddings: int = 256
    tie_word_embeddings: bool = False
"""
# No model of transformers: an average of all earlier tokens takes the place of attention.
OWN_MODEL = """
import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput
from .configuration_own import OwnConfig

class OwnLayer(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.mix = nn.Linear(width, width, bias=False)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, hidden_states, weights):
        x = self.norm(hidden_states)
        hidden_states = hidden_states + weights @ self.mix(x)
        return hidden_states + self.down(torch.tanh(self.up(x)))

class OwnPreTrained(PreTrainedModel):
    config_class = OwnConfig
    base_model_prefix = "model"

class OwnModel(OwnPreTrained):
    def __init__(self, config):
        super().__init__(config)
        self.words = nn.Embedding(config.vocab_size, config.hidden_size)
        layers = (OwnLayer(config.hidden_size) for _ in range(config.num_hidden_layers))
        self.layers = nn.ModuleList(layers)
        self.post_init()

    def get_input_embeddings(self):
        return self.words

    def forward(self, input_ids, **options):
        hidden_states, length = self.words(input_ids), input_ids.shape[1]
        weights = torch.tril(torch.ones(length, length)).to(hidden_states)
        weights = weights / weights.sum(-1, keepdim=True)
        for layer in self.layers:
            hidden_states = layer(hidden_states, weights)
        return BaseModelOutput(last_hidden_state=hidden_states)

class OwnForCausalLM(OwnPreTrained, GenerationMixin):
    def __init__(self, config):
        super().__init__(config)
        self.model = OwnModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, input_ids, attention_mask=None, **options):
        return CausalLMOutput(logits=self.lm_head(self.model(input_ids)[0]))
"""
TOKENIZER = """
from transformers import PreTrainedTokenizerFast

class TinyTokenizer(PreTrainedTokenizerFast):
    pass
"""
STAGES: dict[str, list[dict[str, Any]]] = {
    "low rank": [{"decompose": {"method": "svd-llm", "keep": 0.6}}],
    "int8": [{"quantize": {"method": "rtn"}}],
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


@pytest.fixture
def own(tiny_tokenizer: Any, tmp_path: Path) -> Path:
    """Return a folder with random weights of an architecture that only its own code knows."""
    folder = tmp_path / "remote-own"
    folder.mkdir()
    (folder / "configuration_own.py").write_text(OWN_CONFIGURATION)
    (folder / "modeling_own.py").write_text(OWN_MODEL)
    auto_map = {
        "AutoConfig": "configuration_own.OwnConfig",
        "AutoModelForCausalLM": "modeling_own.OwnForCausalLM",
    }
    config = {"model_type": "own-remote", "architectures": ["OwnForCausalLM"], "auto_map": auto_map}
    (folder / "config.json").write_text(json.dumps(config))
    tiny_tokenizer.save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    shapes = {"model.words.weight": (512, 32), "lm_head.weight": (512, 32)}
    for layer in ("model.layers.0", "model.layers.1"):
        shapes |= {f"{layer}.norm.weight": (32,), f"{layer}.norm.bias": (32,)}
        shapes |= {f"{layer}.mix.weight": (32, 32), f"{layer}.up.weight": (64, 32)}
        shapes |= {f"{layer}.up.bias": (64,), f"{layer}.down.bias": (32,)}
        shapes |= {f"{layer}.down.weight": (32, 64)}
    tensors = {name: torch.randn(s, generator=generator) * 0.3 for name, s in shapes.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
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


FRESH = """
import json, sys
if sys.argv[1] == "with lrc":
    import lrc
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
folder, weights, inputs = sys.argv[2:]
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=True)
tokens = load_file(inputs)["tokens"]
with torch.no_grad():
    found = model(tokens).logits
    text = model.generate(tokens, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    for name, weight in load_file(weights).items():
        layer = torch.nn.Linear(*weight.shape[::-1], bias="mix" not in name)
        layer.weight.copy_(weight)
        if layer.bias is not None:
            layer.bias.copy_(model.get_submodule(name).bias)
        model.set_submodule(name, layer)
    difference = (model(tokens).logits - found).abs().max()
print(json.dumps([type(model).__name__, float(difference), float(found.std()), text.shape[1]]))
"""


@pytest.mark.parametrize(("stages", "loader"), [("low rank", "with lrc"), ("int8", "alone")])
def test_an_architecture_that_only_its_code_knows_is_loaded_by_a_fresh_process(
    stages: str,
    loader: str,
    own: Path,
    tiny_recipe: Callable[..., Path],
    weights_of: Callable[[Path], dict[str, torch.Tensor]],
    tmp_path: Path,
    lrc: Any,
) -> None:
    model = {"path": str(own), "dtype": "float32", "trust_remote_code": True}
    recipe = tiny_recipe(own, tmp_path / "run", model=model, stages=STAGES[stages])
    planned = json.loads(lrc("plan", recipe, "--json").out)
    names = {f"model.layers.{i}.{leaf}" for i in (0, 1) for leaf in ("mix", "up", "down")}
    assert {task["weights"][0]["name"] for task in planned["tasks"]} == names
    assert lrc("compress", recipe, "--quiet").code == 0
    checkpoint = tmp_path / "run/checkpoint"
    for file in own.glob("*.py"):
        assert (checkpoint / file.name).read_bytes() == file.read_bytes()
    shutil.rmtree(own)  # the checkpoint is complete
    weights, inputs = tmp_path / "weights.safetensors", tmp_path / "inputs.safetensors"
    save_file(weights_of(tmp_path / "run"), weights)
    save_file({"tokens": torch.arange(34, 50)[None]}, inputs)
    command = [sys.executable, "-c", FRESH, loader, checkpoint, weights, inputs]
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    kind, difference, scale, length = json.loads(done.stdout)
    assert (kind, length) == ("OwnForCausalLM", 19)
    assert difference <= 1e-5 * scale
