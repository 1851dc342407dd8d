"""Architectures whose layers are no plain chain: served exactly, or rejected before any work."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from lrc.compressors.checkpoint import loading_check

SIZES = {"vocab_size": 512, "hidden_size": 32, "num_hidden_layers": 2, "initializer_range": 0.2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 4, "intermediate_size": 48}
IDS = {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 1}
BAMBA = {
    "model_type": "bamba",
    **SIZES,
    **HEADS,
    **IDS,
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_n_groups": 1,
    "mamba_d_state": 8,
    "attn_layer_indices": [1],
}
MAMBA = {"model_type": "mamba", **SIZES, **IDS, "state_size": 4}


@pytest.fixture
def save(make_tokenizer: Callable[..., Any], tmp_path: Path) -> Callable[..., Path]:
    """Save a random model of a config, with a tokenizer."""

    def make(model_type: str, **config: Any) -> Path:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **config))
        model.save_pretrained(tmp_path / "model")
        make_tokenizer().save_pretrained(tmp_path / "model")
        return tmp_path / "model"

    return make


@pytest.mark.parametrize(
    ("config", "stage"),
    [
        (BAMBA, {"decompose": {"method": "kfac", "keep": 0.7}}),
        (MAMBA, {"decompose": {"method": "svd", "keep": 0.7}}),
        (MAMBA, {"quantize": {"method": "rtn", "bits": 8}}),
    ],
    ids=["bamba-kfac", "mamba-svd", "mamba-rtn"],
)
def test_a_result_with_layers_that_are_read_loads(
    lrc, save, output: Path, tiny_recipe: Callable[..., Path], config, stage
) -> None:
    ended = lrc("compress", tiny_recipe(save(**config), output, stages=[stage]), "-q", "--json")
    assert ended.code == 0, ended.err
    report = json.loads(ended.out)
    assert any("stay dense, because each is read by" in each for each in report["warnings"])
    compressed = {layer["name"].rpartition(".")[2] for layer in report["layers"]}
    assert "in_proj" in compressed
    assert "out_proj" not in compressed


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"model_type": "bert", **SIZES, **HEADS}, "not a causal language model"),
        (
            {
                "model_type": "gemma4_text",
                **SIZES,
                **HEADS,
                **IDS,
                "hidden_size_per_layer_input": 16,
                "vocab_size_per_layer_input": 512,
                "num_kv_shared_layers": 0,
                "layer_types": ["sliding_attention", "full_attention"],
            },
            "which depends on the tokens",
        ),
    ],
    ids=["bert", "gemma4"],
)
@pytest.mark.parametrize("command", ["plan", "compress"])
def test_what_is_no_chain_of_layers_is_rejected_before_anything_is_written(
    lrc, save, output: Path, tiny_recipe: Callable[..., Path], config, words, command
) -> None:
    lrc(command, tiny_recipe(save(**config), output)).refuses(1, words, code="invalid-model")
    assert not output.exists()


def test_layers_are_not_dropped_where_a_constant_depends_on_their_number(
    lrc, save, output: Path, tiny_recipe: Callable[..., Path]
) -> None:
    folder = save(
        "minicpm3",
        **{**SIZES, **HEADS, **IDS, "num_hidden_layers": 4},
        q_lora_rank=16,
        kv_lora_rank=8,
        qk_nope_head_dim=8,
        qk_rope_head_dim=8,
        v_head_dim=8,
    )
    stages = [{"slice": {"method": "drop", "keep": 0.8}}]
    lrc("plan", tiny_recipe(folder, output, stages=stages)).refuses(
        2, "computes something else", code="invalid-recipe", where="stages[0].slice.keep"
    )


CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class MineConfig(LlamaConfig):
    model_type = "mine-remote"

class MineForCausalLM(LlamaForCausalLM):
    config_class = MineConfig
"""


@pytest.mark.usefixtures("code_cache")
def test_a_model_with_code_is_loaded_again_by_the_run_that_compressed_it(
    lrc, tiny_model_folder: Path, make_tokenizer, output: Path, tiny_recipe, tiny_text, tmp_path
) -> None:
    folder = Path(shutil.copytree(tiny_model_folder, tmp_path / "remote"))
    (folder / "mine.py").write_text(CODE)
    config = json.loads((folder / "config.json").read_text())
    auto = {"AutoConfig": "mine.MineConfig", "AutoModelForCausalLM": "mine.MineForCausalLM"}
    config |= {"model_type": "mine-remote", "architectures": ["MineForCausalLM"], "auto_map": auto}
    (folder / "config.json").write_text(json.dumps(config))
    recipe = tiny_recipe(
        folder,
        output,
        model={"path": str(folder), "trust_remote_code": True},
        evaluate={
            "perplexity": [{"source": str(tiny_text), "window": 32, "windows": 2}],
            "baselines": [],
        },
    )
    ended = lrc("compress", recipe, "-q", "--json")
    assert ended.code == 0, ended.err
    assert (output / "checkpoint" / "mine.py").is_file()


def test_a_result_that_could_not_be_loaded_is_rejected_before_any_work(
    lrc, tiny_model_folder: Path, output: Path, tiny_recipe, monkeypatch
) -> None:
    """A model is built from the config of the result, and its layers replaced, for the plan."""
    whole = loading_check.config_text

    def damaged(model: Any, block: dict[str, Any], dtype: str) -> str:
        modules = {name.replace("q_proj", "w_proj"): c for name, c in block["modules"].items()}
        return whole(model, {**block, "modules": modules}, dtype)

    monkeypatch.setattr(loading_check, "config_text", damaged)
    for command in ("plan", "compress"):
        lrc(command, tiny_recipe(tiny_model_folder, output)).refuses(
            1, "could not load the result", "w_proj", code="invalid-model"
        )
    assert not output.exists()
