"""`lrc export --format remote-code`: folders that transformers loads where lrc is not installed."""

import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from lrc.compressors.checkpoint.format import quantization_config
from lrc.compressors.checkpoint.writer import write_config, write_weights
from lrc.compressors.export import modeling_lrc
from lrc.compressors.latency.latency_table import Product
from lrc.compressors.latency.random_layers import random_layer
from lrc.compressors.layers import (
    COMPONENTS,
    ComponentConfig,
    CompressedLinear,
    QuantizationArgs,
    WeightConfig,
)
from lrc.compressors.layers.chain_shape import pattern_for

pytestmark = pytest.mark.usefixtures("one_thread", "code_cache")

TOKENS = torch.arange(2, 60)[None]
FILE = "modeling_lrc.py"
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
FAMILIES = ["opt-bare", "gemma3", "qwen3-sharded"]
# Type, scheme and sizes of components; d_out and d_in are at least 32 and 64.
PARTS: list[tuple[str, str | None, dict[str, int]]] = [
    ("dense", "int4-g16", {}),
    ("low_rank", None, {"rank": 8}),
    ("low_rank", "int3-g16-asymmetric", {"rank": 16}),
    ("pivoted_low_rank", None, {"rank": 8}),
    ("pivoted_low_rank", "int8", {"rank": 32}),
    ("sparse", None, {"nonzeros": 500}),
    ("semi_structured", "int4", {"n": 3}),
    ("block_sparse", "int4-g16", {"groups": 50}),
    ("dictionary", None, {"atoms": 16, "nonzeros": 5}),
    ("dictionary", "int8", {"atoms": 24, "nonzeros": 1}),
    ("tensor_train", None, {"bond": 6}),
]
WITHOUT_LRC = """
import json, logging, sys, warnings
sys.modules["lrc"] = None  # what is imported then raises ImportError
try:
    import lrc
except ImportError:
    pass
else:
    raise SystemExit("lrc can be imported")
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

warnings.simplefilter("error")
records = []
handler = logging.Handler()
handler.emit = lambda record: records.append(record.getMessage())
logging.getLogger("transformers").addHandler(handler)
folder = sys.argv[1]
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
tokens = torch.tensor([json.loads(sys.argv[2])])
with torch.no_grad():
    logits = model(tokens).logits[0, -1]
generated = model.generate(tokens, max_new_tokens=8, do_sample=False)[0]
logged = list(records)
try:
    AutoModelForCausalLM.from_pretrained(folder)
    untrusted = "loaded"
except RuntimeError as error:
    untrusted = str(error)
print(json.dumps({
    "words": len(tokenizer("A compiler").input_ids),
    "module": type(model).__module__,
    "logged": logged,
    "logits": logits.tolist(),
    "generated": generated.tolist(),
    "untrusted": untrusted,
    "imported": sorted(name for name in sys.modules if name.partition(".")[0] == "lrc"),
}))
"""


@torch.no_grad()
def logits(model: Any, tokens: Tensor = TOKENS) -> Tensor:
    found: Tensor = model.eval()(tokens).logits
    return found


def load(folder: Path, **options: Any) -> Any:
    options = {"dtype": torch.float32, **options}
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **options)


def with_lrc(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def update(path: Path, change: Callable[[Any], Any]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@contextmanager
def nothing_logged() -> Iterator[None]:
    """Demand that transformers logs no warning."""
    records: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())  # type: ignore[method-assign]
    logger, verbosity = logging.getLogger("transformers"), transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_warning()
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        transformers.logging.set_verbosity(verbosity)
    assert records == []


@pytest.fixture
def export(lrc: Callable[..., Any], tmp_path: Path) -> Callable[[Path], Path]:
    """Export a checkpoint; return the new folder."""

    def run(folder: Path) -> Path:
        out = tmp_path / "exported"
        ended = lrc("export", folder, out, "--format", "remote-code", "--json")
        assert ended.code == 0, ended.err
        facts = json.loads(ended.out)
        assert facts["notes"] == []
        assert facts["bytes"] == sum(file.stat().st_size for file in out.iterdir())
        return out

    return run


@pytest.mark.parametrize("name", FORMS)
def test_the_code_computes_what_lrc_computes(
    name: str, checkpoint: Callable[[str], Path], export: Callable[[Path], Path]
) -> None:
    folder = export(checkpoint(name))
    expected = with_lrc(checkpoint(name))
    with nothing_logged():
        model = load(folder)
    assert type(model).__module__.startswith("transformers_modules.")
    assert not any(isinstance(module, CompressedLinear) for module in model.modules())
    # Measured 2e-5 of logits up to 8: lrc stacks factors, and has kernels for integers.
    torch.testing.assert_close(logits(model), logits(expected), rtol=0, atol=5e-5)
    one = TOKENS[:, :1]
    torch.testing.assert_close(logits(model, one), logits(expected, one), rtol=0, atol=5e-5)


def random_components(
    shape: tuple[int, int], components: list[ComponentConfig]
) -> dict[str, Tensor]:
    """Return the tensors of a sum of components with random contents."""
    generator, tensors = torch.Generator().manual_seed(0), {}
    for component in components:
        product = Product(shape, component)
        tensors |= random_layer(product, dtype=torch.float32, generator=generator).state_dict()
    return tensors


def test_every_term_in_one_model(
    tiny_llama: Callable[..., Any], export: Callable[[Path], Path], tmp_path: Path
) -> None:
    model = tiny_llama(hidden_size=64, intermediate_size=96, num_hidden_layers=2)
    linears = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    tensors, modules = model.state_dict(), dict[str, WeightConfig]()
    components = [
        ComponentConfig(kind, sizes, scheme and QuantizationArgs.parse(scheme))
        for kind, scheme, sizes in PARTS
    ]
    sums = [*([each] for each in components), [components[3], components[5]]]
    for (name, linear), parts in zip(linears.items(), sums, strict=False):
        pattern = pattern_for(*linear.weight.shape, cores=2)
        parts = [replace(p, pattern=pattern) if p.type == "tensor_train" else p for p in parts]
        modules[name] = WeightConfig(tuple(linear.weight.shape), tuple(parts))
        stored = random_components(modules[name].shape, parts)
        tensors |= {f"{name}.{leaf}": tensor for leaf, tensor in stored.items()}
    assert len(modules) == len(sums)
    folder = tmp_path / "made"
    folder.mkdir()
    write_weights(folder, {n: t.to("meta") for n, t in tensors.items()}, tensors.__getitem__)
    write_config(folder, model, quantization_config(modules, {}), "float32")
    with nothing_logged():
        found = load(export(folder))
    expected = with_lrc(folder)
    assert {c.type for config in modules.values() for c in config.components} == COMPONENTS.keys()
    torch.testing.assert_close(logits(found), logits(expected), rtol=0, atol=5e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_code_builds_every_architecture(
    name: str, families: Callable[[str], Any], export: Callable[[Path], Path]
) -> None:
    run = families(name)
    with nothing_logged():
        model = load(export(run.checkpoint))
    torch.testing.assert_close(logits(model), logits(run.load()), rtol=0, atol=5e-5)


def test_a_process_without_lrc_generates_the_same_tokens(
    checkpoint: Callable[[str], Path], export: Callable[[Path], Path], tmp_path: Path
) -> None:
    folder = export(checkpoint("uneven-integers"))
    variables = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    variables |= {"HF_MODULES_CACHE": str(tmp_path / "modules"), "OMP_NUM_THREADS": "1"}
    tokens = TOKENS[0, :12]
    ended = subprocess.run(
        [sys.executable, "-c", WITHOUT_LRC, folder, json.dumps(tokens.tolist())],
        env=variables,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    found = json.loads(ended.stdout)
    assert found["imported"] == ["lrc"]  # the entry that blocks it
    assert found["module"].endswith(".modeling_lrc")
    assert found["logged"] == []
    assert found["words"] > 1
    assert "mismatch" in found["untrusted"]  # of the sentinels
    expected = with_lrc(checkpoint("uneven-integers"))
    last = logits(expected, tokens[None])[0, -1]
    torch.testing.assert_close(torch.tensor(found["logits"]), last, rtol=0, atol=5e-5)
    generated = expected.generate(tokens[None], max_new_tokens=8, do_sample=False)[0]
    assert found["generated"] == generated.tolist()


def test_the_folder_has_the_stored_weights_and_the_file(
    checkpoint: Callable[[str], Path], export: Callable[[Path], Path]
) -> None:
    source, folder = checkpoint("factors"), export(checkpoint("factors"))
    for name in ("model.safetensors", "tokenizer.json", "chat_template.jinja"):
        assert (folder / name).read_bytes() == (source / name).read_bytes()
    runtime = Path(modeling_lrc.__file__)
    assert (folder / FILE).read_bytes() == runtime.read_bytes()
    config = json.loads((folder / "config.json").read_text())
    assert config["auto_map"] == {"AutoModelForCausalLM": "modeling_lrc.LlamaForCausalLM"}
    assert not (folder / "lrc").exists()
    model = with_lrc(folder)  # the kernels of lrc, where it is installed
    assert any(isinstance(module, CompressedLinear) for module in model.modules())


def test_the_code_imports_only_torch_and_transformers() -> None:
    names = set(transformers.dynamic_module_utils.get_imports(modeling_lrc.__file__))
    assert names - sys.stdlib_module_names == {"torch", "transformers"}


@pytest.mark.parametrize("name", ["embedded", "factors"])
def test_a_saved_model_has_the_code_too(
    name: str, checkpoint: Callable[[str], Path], export: Callable[[Path], Path], tmp_path: Path
) -> None:
    model = load(export(checkpoint(name)))
    model.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / FILE).is_file()
    with nothing_logged():
        again = load(tmp_path / "saved")
    assert torch.equal(logits(again), logits(model))
    torch.testing.assert_close(
        logits(with_lrc(tmp_path / "saved")), logits(model), rtol=0, atol=5e-5
    )


@pytest.mark.parametrize("name", ["elastic", "refined"])
def test_an_elastic_checkpoint_is_exported_with_its_largest_budget(
    checkpoint: Callable[[str], Path], lrc: Callable[..., Any], tmp_path: Path, name: str
) -> None:
    out = tmp_path / "out"
    ended = lrc("export", checkpoint(name), out, "--format", "remote-code")
    assert "note: the checkpoint is elastic" in ended.out
    assert "--keep" in ended.out
    expected = with_lrc(checkpoint(name))
    torch.testing.assert_close(logits(load(out)), logits(expected), rtol=0, atol=5e-5)


def without_a_factor(tensors: dict[str, Tensor]) -> None:
    del tensors["model.layers.1.mlp.up_proj.low_rank.a.weight"]


def with_another(tensors: dict[str, Tensor]) -> None:
    tensors["model.layers.1.mlp.extra.weight"] = torch.zeros(2)


def with_another_mask(tensors: dict[str, Tensor]) -> None:
    tensors["model.layers.0.mlp.down_proj.sparse.mask"].zero_()


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("factors", without_a_factor, r"the weights lack model\.layers\.1\.mlp\.up_proj\.low_rank"),
        ("factors", with_another, r"have the unknown model\.layers\.1\.mlp\.extra\.weight"),
        ("sparse", with_another_mask, r"of model\.layers\.0\.mlp\.down_proj\.sparse are damaged"),
    ],
)
def test_files_that_do_not_belong_together_are_refused(
    name: str,
    damage: Callable[[dict[str, Tensor]], None],
    message: str,
    checkpoint: Callable[[str], Path],
    export: Callable[[Path], Path],
) -> None:
    folder = export(checkpoint(name))
    tensors = load_file(folder / "model.safetensors")
    damage(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"{message}.*download the checkpoint again"):
        load(folder)


def test_a_quantized_embedding_cannot_be_resized(
    checkpoint: Callable[[str], Path], export: Callable[[Path], Path]
) -> None:
    model = load(export(checkpoint("embedded")))
    with pytest.raises(ValueError, match=r"512 to 520 tokens.*stored as integers"):
        model.resize_token_embeddings(520)
    assert model.resize_token_embeddings(512) is model.get_input_embeddings()


def renamed_layer(config: dict[str, Any]) -> None:
    modules = config["quantization_config"]["modules"]
    modules["model.layers.9.mlp.up_proj"] = modules.pop("model.layers.1.mlp.up_proj")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["quantization_config"].update(format_version=3), "format_version 3; use the"),
        (lambda c: c["quantization_config"].update(new={}), "got the key 'new'; use the"),
        (renamed_layer, "names 'model.layers.9.mlp.up_proj', which LlamaForCausalLM lacks"),
    ],
)
def test_a_config_of_another_checkpoint_is_refused(
    change: Callable[[Any], Any],
    message: str,
    checkpoint: Callable[[str], Path],
    export: Callable[[Path], Path],
) -> None:
    folder = export(checkpoint("factors"))
    update(folder / "config.json", change)
    with pytest.raises(ValueError, match=message):
        load(folder)


def test_what_needs_no_lrc_is_refused(
    source: Path, checkpoint: Callable[[str], Path], lrc: Callable[..., Any], tmp_path: Path
) -> None:
    arguments = (tmp_path / "out", "--format", "remote-code")
    ended = lrc("export", checkpoint("plain"), *arguments)
    ended.refuses(1, "transformers and the package compressed-tensors", code="cannot-export")
    ended = lrc("export", source, *arguments)
    ended.refuses(1, "loads with transformers alone", "use the folder as it is")
    ended = lrc("export", checkpoint("factors"), *arguments, "--type", "q8_0")
    ended.refuses(2, "--type", "option of --format gguf")
    assert not (tmp_path / "out").exists()


def test_models_that_the_code_cannot_build_are_refused(
    checkpoint: Callable[[str], Path],
    lrc: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = tmp_path / "changed"
    shutil.copytree(checkpoint("factors"), folder)
    shutil.rmtree(folder / "lrc")  # which has hashes of the files
    arguments = ("export", folder, tmp_path / "out", "--format", "remote-code")
    update(folder / "config.json", lambda c: c.update(auto_map={"AutoConfig": "a.B"}))
    lrc(*arguments).refuses(1, "comes with code already", "--format dense")
    update(folder / "config.json", lambda c: c.pop("auto_map"))
    with monkeypatch.context() as patch:
        patch.delitem(modeling_lrc.COMPONENTS, "low_rank")
        lrc(*arguments).refuses(1, "cannot build LlamaForCausalLM", "'low_rank'", "--format dense")
    tensors = load_file(folder / "model.safetensors")
    with_another(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    lrc(*arguments).refuses(1, "model.layers.1.mlp.extra.weight: expected nothing")
    assert not (tmp_path / "out").exists()
