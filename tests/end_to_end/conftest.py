"""Tiny random models of every supported family, each compressed once through the real pipeline."""

import json
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tests.fresh_processes import WITH_LRC, WITHOUT_LRC, FreshProcesses
from tests.shared_runs import Run, checkpoints_of, made_once
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    dynamic_module_utils,
)

from lrc.compressors.calibrate import batch_size
from lrc.compressors.checkpoint import assemble
from lrc.compressors.checkpoint.writer import write_weights
from lrc.compressors.compress.group import stored_weight
from lrc.compressors.io.machine import Machine
from lrc.compressors.layers import CompressedLinear
from lrc.compressors.pipeline import compress
from lrc.compressors.planning.plan import Plan
from lrc.configs.load import load_recipe

SAMPLES, LENGTH = 6, 48
WINDOW = 24  # of local attention: shorter than the calibration windows

SIZES = {
    "vocab_size": 512,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
# Large enough that predictions differ from uniform.
GATED = {"intermediate_size": 48, "num_key_value_heads": 2, "initializer_range": 0.2, "head_dim": 8}
LLAMA = {"model_type": "llama", **SIZES, **GATED}
OPT = {"model_type": "opt", **SIZES, "ffn_dim": 48, "word_embed_proj_dim": 32, "init_std": 0.2}
SVD_LLM = {"method": "svd-llm", "keep": 0.6}
KFAC = {"method": "kfac", "keep": 0.6, "compensate": {}}  # by the lagrangian, as pivot rows


@pytest.fixture
def plan_stages(
    lrc: Callable[..., Any],
    tiny_model_folder: Path,
    tiny_recipe: Callable[..., Path],
    tmp_path: Path,
) -> Callable[..., Any]:
    """Call `lrc plan` with stages for the tiny model; return how it ended."""

    def plan(*stages: dict[str, Any]) -> Any:
        return lrc("plan", tiny_recipe(tiny_model_folder, tmp_path / "run", stages=[*stages]))

    return plan


@pytest.fixture(scope="module")
def run_stages(
    tiny_model_folder: Path, tiny_recipe: Callable[..., Path], tmp_path_factory: Any
) -> Run:
    """Run stages on the tiny model; return the report and the output folder. Runs are shared."""
    done: dict[str, tuple[dict[str, Any], Path]] = {}

    def start(*stages: dict[str, Any], device: str = "auto", **changes: Any) -> Any:
        key = json.dumps([stages, device, changes])
        if key not in done:
            output = tmp_path_factory.mktemp("runs") / "run"
            recipe = tiny_recipe(tiny_model_folder, output, stages=[*stages], **changes)
            done[key] = compress(load_recipe(recipe), Machine(device)), output
        return done[key]

    return start


@pytest.fixture(scope="module")
def compressed(
    tiny_llama: Callable[..., LlamaForCausalLM],
    make_tokenizer: Callable[..., PreTrainedTokenizerFast],
    tiny_recipe: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[..., Callable[[str], Path]]:
    """Save a tiny model, by default a Llama with a tied head; return `checkpoints_of` of stages."""

    def save(
        stages: Mapping[str, list[dict[str, Any]]],
        model: PreTrainedModel | None = None,
        **changes: Any,
    ) -> Callable[[str], Path]:
        base = tmp_path_factory.mktemp("compressed")
        made = model or tiny_llama(**{"tie_word_embeddings": True, **changes})
        made.save_pretrained(base / "source")
        make_tokenizer().save_pretrained(base / "source")
        return checkpoints_of(base, tiny_recipe, stages)

    return save


@dataclass(frozen=True)
class Family:
    """A model to make, how its source is saved, and what the recipe says about it."""

    config: dict[str, Any]
    dtype: str = "bfloat16"
    source_dtype: torch.dtype = torch.bfloat16
    bos: bool = False  # whether its tokenizer starts every text with <s>
    bare: bool = False  # whether the source is the decoder alone, without the causal model's prefix
    source_shard: str = "1GB"
    shard_bytes: int = 2 * 10**9
    stage: dict[str, Any] = field(default_factory=lambda: KFAC)


FAMILIES = {
    "llama": Family(LLAMA, stage=SVD_LLM),
    "llama-tied": Family({**LLAMA, "tie_word_embeddings": True}),
    "mistral": Family({**LLAMA, "model_type": "mistral", "sliding_window": WINDOW}),
    "qwen2": Family({**LLAMA, "model_type": "qwen2"}),
    "qwen3": Family({**LLAMA, "model_type": "qwen3"}),
    "gemma3": Family(
        {
            **LLAMA,
            "model_type": "gemma3_text",
            "sliding_window": WINDOW,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        bos=True,
    ),
    "opt": Family(OPT),
    "gpt-neox": Family(
        {
            "model_type": "gpt_neox",
            **SIZES,
            "intermediate_size": 48,
            "initializer_range": 0.2,
            "use_parallel_residual": True,
        }
    ),
    # The same through other files and precisions.
    "opt-bare": Family(OPT, bare=True, stage=SVD_LLM),
    "llama-bare-tied": Family({**LLAMA, "tie_word_embeddings": True}, bare=True, stage=SVD_LLM),
    "llama-from-float32": Family(LLAMA, source_dtype=torch.float32, stage=SVD_LLM),
    "llama-float32": Family(LLAMA, "float32", torch.float32),
    "qwen2-float16": Family({**LLAMA, "model_type": "qwen2"}, "float16"),
    "qwen3-sharded": Family(
        {**LLAMA, "model_type": "qwen3"}, source_shard="20KB", shard_bytes=20_000
    ),
}


@dataclass(frozen=True)
class Compressed:
    """A finished run, with the intermediate results that it has deleted."""

    family: Family
    source: Path
    output: Path
    report: dict[str, Any]
    tokens: Tensor  # the calibration windows
    work: Path  # statistics and compressed tensors

    @property
    def checkpoint(self) -> Path:
        return self.output / "checkpoint"

    def plan(self) -> Plan:
        """Return the executed plan, with the results of all tasks."""
        return _executed(self.output)

    def dense(self) -> Any:
        """Load the reference model with transformers: the recipe's precision, run in float32."""
        model = AutoModelForCausalLM.from_pretrained(self.source, dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(parameter.to(getattr(torch, self.family.dtype)))
        return model.eval()

    def load(self, **options: Any) -> Any:
        options = {"dtype": torch.float32, **options}
        return AutoModelForCausalLM.from_pretrained(self.checkpoint, **options).eval()

    def in_memory(self) -> Any:
        """Make the compressed model without a checkpoint: compressed layers in the dense model."""
        model, plan, tensors = self.dense(), self.plan(), {}
        for file in sorted((self.work / "compressed").glob("*.safetensors")):
            tensors |= load_file(file)
        modules = plan.modules()
        for name, config in modules.items():
            linear = model.get_submodule(name)
            layer = CompressedLinear.replacing(linear, config)
            stored = {k.removeprefix(f"{name}."): t for k, t in tensors.items() if f"{name}." in k}
            if linear.bias is not None:
                stored.setdefault("bias", linear.bias)
            layer.load_state_dict({**stored, "weight": layer.weight})
            model.set_submodule(name, layer)
        for name, result in plan.results.items():
            if result.refit and name not in modules:
                model.get_submodule(name).weight.data.copy_(tensors[f"{name}.weight"])
        return model.eval()


@pytest.fixture(scope="session")
def with_lrc(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FreshProcesses]:
    """Run code in a process that has imported lrc, and then transformers."""
    run = FreshProcesses(WITH_LRC, tmp_path_factory.mktemp("with-lrc"))
    yield run
    run.close()


@pytest.fixture(scope="session")
def without_lrc(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FreshProcesses]:
    """Run code in a process that cannot import lrc."""
    run = FreshProcesses(WITHOUT_LRC, tmp_path_factory.mktemp("without-lrc"))
    yield run
    run.close()


@pytest.fixture(scope="session")
def executed() -> Callable[[Path], Plan]:
    """Read the executed plan of the run in an output folder."""
    return _executed


def _executed(output: Path) -> Plan:
    return Plan.from_json(json.loads((output / "checkpoint/lrc/plan.json").read_text()))


@pytest.fixture(scope="session")
def weights_of() -> Callable[[Path], dict[str, Tensor]]:
    """Read the weights that a run has compressed or refit from its output folder, in float32."""

    def read(output: Path) -> dict[str, Tensor]:
        plan = _executed(output)
        stored = load_file(output / "checkpoint/model.safetensors")
        tensors = {k: t.float() if t.is_floating_point() else t for k, t in stored.items()}
        if tensors.keys().isdisjoint(f"{name}.weight" for name in plan.modules()):
            tensors = {_with_component(name, plan): t for name, t in tensors.items()}
        return {
            weight.name: stored_weight(task, result, weight.name, tensors.__getitem__)
            for task in plan.all_tasks
            for weight in task.weights
            if (result := plan.results[task.name]).config.compressed or result.refit
        }

    return read


def _with_component(name: str, plan: Plan) -> str:
    """Return the name of a tensor of a plain checkpoint as those of lrc have it."""
    layer, _, leaf = name.rpartition(".")
    return f"{layer}.dense.{leaf}" if layer in plan.modules() else name


@pytest.fixture(scope="session")
def sample() -> Tensor:
    """Tokens [2, 40] to compare logits on."""
    return torch.randint(2, 512, (2, 40), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="session")
def families(
    tmp_path_factory: pytest.TempPathFactory,
    make_tokenizer: Callable[..., PreTrainedTokenizerFast],
    worker_id: str,
) -> Callable[[str], Compressed]:
    """Compress a family of the table at the first request of any process."""
    done: dict[str, Compressed] = {}

    def compressed(name: str) -> Compressed:
        if name not in done:
            threads = torch.get_num_threads()
            torch.set_num_threads(1)  # two would mostly wait for each other
            done[name] = made_once(
                tmp_path_factory,
                name,
                lambda folder: _compress(folder, FAMILIES[name], make_tokenizer),
                worker=worker_id,
            )
            torch.set_num_threads(threads)
        return done[name]

    return compressed


@pytest.fixture(params=FAMILIES)
def run(request: pytest.FixtureRequest, families: Callable[[str], Compressed]) -> Compressed:
    return families(request.param)


@pytest.fixture(scope="session")
def all_families(families: Callable[[str], Compressed]) -> dict[str, Compressed]:
    return {name: families(name) for name in FAMILIES}


@pytest.fixture(scope="session")
def write_recipe() -> Callable[..., Path]:
    return _write_recipe


def _compress(
    folder: Path, family: Family, make_tokenizer: Callable[..., PreTrainedTokenizerFast]
) -> Compressed:
    source = _make_source(folder / "source", family)
    make_tokenizer(bos=family.bos).save_pretrained(source)
    recipe = _write_recipe(
        folder,
        source,
        model={"path": str(source), "dtype": family.dtype},
        calibration={
            "source": "python-docs",
            "samples": SAMPLES,
            "length": LENGTH,
            "labels": "real",  # whose gradients are those of the cross entropy
        },
        stages=[{"decompose": family.stage}],
    )
    work = folder / "kept"

    def keep_work(stage: str, done: int, total: int) -> None:
        if done == total and stage in ("calibrate", "gradients", "compress"):  # still all there
            shutil.copytree(folder / "run/work", work, dirs_exist_ok=True)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(
            batch_size.BATCH_TOKENS, "cpu", 2 * LENGTH
        )  # several batches: masks come back
        patch.setattr(
            assemble,
            "write_weights",
            partial(write_weights, max_shard_bytes=family.shard_bytes),
        )
        report = compress(load_recipe(recipe), Machine(device="cpu", on_step=keep_work))
    tokens = load_file(work / "windows.safetensors")["tokens"]
    return Compressed(family, source, folder / "run", report, tokens, work)


def _make_source(folder: Path, family: Family, seed: int = 0) -> Path:
    """Save a random model of a family as its users would find it."""
    options = dict(family.config)
    config = AutoConfig.for_model(options.pop("model_type"), **options)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for name, parameter in model.named_parameters():
            if name.endswith(".bias"):  # zero when new; what does not show cannot be missed
                torch.nn.init.normal_(parameter, std=0.1)
    model = model.to(family.source_dtype)
    saved = model.base_model if family.bare else model
    saved.save_pretrained(folder, max_shard_size=family.source_shard)
    return folder


def _write_recipe(folder: Path, source: Path, **changes: Any) -> Path:
    """Write a recipe for a source into `folder`; it puts its output there as ``run``."""
    recipe = {
        "model": str(source),
        "calibration": {"source": "python-docs", "samples": SAMPLES, "length": LENGTH},
        "stages": [{"decompose": SVD_LLM}],
        "output": str(folder / "run"),
        **changes,
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    return path


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "out"


@pytest.fixture
def recipe(
    tiny_model_folder: Path, tiny_text: Path, tiny_recipe: Callable[..., Path], output: Path
) -> Path:
    """Return a recipe that works, for tests to run, spoil or interrupt; it writes to `output`."""
    perplexity = {"source": str(tiny_text), "name": "english", "window": 32, "windows": 2}
    evaluate = {"perplexity": [perplexity], "baselines": []}
    return tiny_recipe(tiny_model_folder, output, evaluate=evaluate)


@pytest.fixture
def code_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep copies of the code of models, which transformers imports, out of the user's cache.

    Modules imported from another cache are forgotten: their package would be searched there.
    """
    folder = tmp_path / "modules"
    folder.mkdir()
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(folder))
    monkeypatch.syspath_prepend(str(folder))
    for name in [name for name in sys.modules if name.startswith("transformers_modules")]:
        monkeypatch.delitem(sys.modules, name)
