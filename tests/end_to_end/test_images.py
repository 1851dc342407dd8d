"""Models that read images: the language model is compressed, everything else stays as it is."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.tiny_images import IMAGE_MODELS, read_image
from torch import Tensor
from transformers import AutoModelForImageTextToText

from lrc.compressors.io.machine import Machine
from lrc.compressors.pipeline import compress
from lrc.configs.load import load_recipe

STAGES = {
    "gemma3": {"decompose": {"method": "kfac", "keep": 0.6, "compensate": {}}},
    "qwen2.5-vl": {"decompose": {"method": "mixed", "keep": 0.6}},
    "idefics3": {"quantize": {"method": "rtn", "bits": 8}},  # a plain checkpoint
    "smolvlm": {"decompose": {"method": "svd-llm", "keep": 0.6}},
}
PROCESSORS = ("processor_config.json", "preprocessor_config.json")
pytestmark = pytest.mark.usefixtures("one_thread")


@dataclass(frozen=True)
class Result:
    """A finished run."""

    recipe: Path
    source: Path
    output: Path
    inputs: dict[str, Tensor]
    """Of one image and some text."""

    @property
    def checkpoint(self) -> Path:
        return self.output / "checkpoint"

    def reference(self, weights: dict[str, Tensor]) -> Any:
        """Return the source with other weights, loaded by transformers in float32."""
        model = AutoModelForImageTextToText.from_pretrained(self.source, dtype=torch.float32)
        with torch.no_grad():
            for name, weight in weights.items():
                model.get_submodule(name).weight.copy_(weight)
        return model.eval()


@pytest.fixture(scope="module")
def results(
    tmp_path_factory: pytest.TempPathFactory,
    make_tokenizer: Callable[..., Any],
    tiny_recipe: Callable[..., Path],
) -> dict[str, Result]:
    """Compress every model; calibration has text only."""
    found = {}
    for name, model in IMAGE_MODELS.items():
        folder = tmp_path_factory.mktemp(name)
        inputs = read_image(model.save(folder / "source", make_tokenizer()))
        recipe = tiny_recipe(folder / "source", folder / "run", stages=[STAGES[name]])
        compress(load_recipe(recipe), Machine("cpu"))
        found[name] = Result(recipe, folder / "source", folder / "run", inputs)
    return found


@pytest.fixture(params=IMAGE_MODELS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_the_plan_says_what_is_compressed_and_what_is_not(
    results: dict[str, Result], name: str, lrc: Callable[..., Any]
) -> None:
    result, expected = results[name], IMAGE_MODELS[name].unchanged
    plan = json.loads(lrc("plan", result.recipe, "--json").out)
    assert {part["name"] for part in plan["model"]["unchanged"]} == expected
    text = " ".join(lrc("plan", result.recipe).out.split())
    assert f"unchanged: {next(iter(expected)).partition('.')[0]}." in text
    assert f"model.{'text' if name in ('idefics3', 'smolvlm') else 'language'}_model.layers" in text


@pytest.mark.oldest
def test_everything_but_the_language_model_is_stored_bit_by_bit(
    results: dict[str, Result], name: str
) -> None:
    result = results[name]
    dense = AutoModelForImageTextToText.from_pretrained(result.source, dtype="auto").state_dict()
    stored = load_file(result.checkpoint / "model.safetensors")
    for part in IMAGE_MODELS[name].unchanged:
        names = {tensor for tensor in dense if tensor.startswith(f"{part}.")}
        assert names
        assert names == {tensor for tensor in stored if tensor.startswith(f"{part}.")}
        for tensor in names:
            assert dense[tensor].dtype == stored[tensor].dtype == torch.bfloat16
            assert torch.equal(dense[tensor].view(torch.int16), stored[tensor].view(torch.int16))
    files = [file for file in PROCESSORS if (result.source / file).is_file()]
    assert files
    for file in files:
        assert (result.checkpoint / file).read_bytes() == (result.source / file).read_bytes()


SCRIPT = """
import json, sys
import torch
from safetensors.torch import load_file, save_file
from tests.tiny_images import read_image
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoProcessor

for folder, needs_lrc, whole, inputs, outputs in json.loads(sys.argv[1]):
    if needs_lrc:
        import lrc
    model, loading = AutoModelForImageTextToText.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, trust_remote_code=not needs_lrc
    )
    assert not any(loading.values()), loading
    reader = (AutoProcessor if whole else AutoImageProcessor).from_pretrained(folder)
    given = load_file(inputs)
    for key, tensor in read_image(reader).items():
        assert torch.equal(tensor, given[key]), key
    tokens = torch.arange(34, 50)[None]
    with torch.no_grad():
        logits = model(**given).logits
        text = model.generate(tokens, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    save_file({"logits": logits, "text": text}, outputs)
"""


def test_a_fresh_process_gives_the_logits_of_the_model_in_memory(
    results: dict[str, Result],
    lrc: Callable[..., Any],
    weights_of: Callable[[Path], dict[str, Tensor]],
    tmp_path: Path,
) -> None:
    todo = []
    outputs: dict[str, list[Path]] = {}
    for name, result in results.items():
        whole = (result.source / "processor_config.json").is_file()
        inputs = tmp_path / f"{name}-inputs.safetensors"
        save_file(result.inputs, inputs)
        folders = {result.checkpoint: "quantize" not in STAGES[name]}
        if folders[result.checkpoint]:
            with_code = tmp_path / f"{name}-code"
            assert lrc("export", result.checkpoint, with_code, "--format", "remote-code").code == 0
            folders[with_code] = False
        for number, (folder, needs_lrc) in enumerate(folders.items()):
            file = tmp_path / f"{name}-{number}.safetensors"
            outputs.setdefault(name, []).append(file)
            todo.append((str(folder), needs_lrc, whole, str(inputs), str(file)))
    todo.sort(key=lambda each: each[1])  # before lrc is imported, what loads without it
    command = [sys.executable, "-c", SCRIPT, json.dumps(todo)]
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    for name, result in results.items():
        weights = weights_of(result.output)
        assert len(weights) == 14
        model, dense = result.reference(weights), result.reference({})
        with torch.no_grad():
            expected = model(**result.inputs).logits
            before = dense(**result.inputs).logits
            text = model.generate(
                torch.arange(34, 50)[None], max_new_tokens=4, min_new_tokens=4, do_sample=False
            )
        assert torch.isfinite(expected).all()
        assert (expected - before).abs().max() > 1e-3, name  # something was compressed
        for found in map(load_file, outputs[name]):
            assert (found["logits"] - expected).abs().max() <= 2e-5, name
            assert torch.equal(found["text"], text), name


@pytest.mark.oldest
def test_commands_read_the_checkpoint(
    results: dict[str, Result], lrc: Callable[..., Any], tiny_text: Path, tmp_path: Path
) -> None:
    checkpoint = results["smolvlm"].checkpoint
    assert "AutoProcessor" in (checkpoint / "README.md").read_text()
    assert lrc("inspect", checkpoint, "--verify").code == 0
    assert lrc("generate", checkpoint, "--prompt", "A").code == 0
    measure = ("--perplexity", tiny_text, "--window", 32, "--windows", 2)
    assert lrc("eval", results["smolvlm"].source, checkpoint, *measure).code == 0
    dense = tmp_path / "dense"
    assert lrc("export", checkpoint, dense, "--format", "dense").code == 0
    assert {file.name for file in dense.glob("*.json")} >= {"preprocessor_config.json"}
    model = AutoModelForImageTextToText.from_pretrained(dense)
    assert model.get_submodule("model.vision_model").dtype == torch.bfloat16
