"""Every form, from factors to a checkpoint that stock transformers loads, keeps and gives back."""

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from lrc.cli.inspect import describe
from lrc.compressors import prepare
from lrc.compressors.checkpoint.format import block
from lrc.compressors.checkpoint.writer import write_config, write_weights
from lrc.compressors.io.machine import Machine
from lrc.compressors.layers import FORMS, Form, RankForm
from lrc.compressors.pipeline import compress
from lrc.compressors.planning.plan import Plan
from lrc.compressors.solvers.spectrum import spectrum
from lrc.configs.errors import CheckpointError
from lrc.configs.load import load_recipe

OWNER = "model.layers.0.self_attn.q_proj"
# Always packed: test_quantize, test_embedded.
INTEGERS = {"integers", "integers_plus_low_rank", "group_sparse", "embedded_integers"}
# Enough of each form to meet its special cases: the module table of a checkpoint.
TABLES: dict[str, dict[str, dict[str, Any]]] = {
    "low_rank": {
        OWNER: {"form": "low_rank", "rank": 8},
        "model.layers.1.mlp.down_proj": {"form": "low_rank", "rank": 5, "bias": True},
    },
    "pivoted_low_rank": {
        OWNER: {"form": "pivoted_low_rank", "rank": 8},
        "model.layers.1.self_attn.v_proj": {"form": "pivoted_low_rank", "rank": 16},  # all its rows
        "model.layers.1.mlp.down_proj": {"form": "pivoted_low_rank", "rank": 5, "bias": True},
    },
    "shared_low_rank": {
        "model.layers.1.self_attn.q_proj": {"form": "shared_low_rank", "rank": 8, "shares": OWNER},
        "model.layers.1.mlp.up_proj": {
            "form": "shared_low_rank",
            "rank": 8,
            "shares": OWNER,
            "bias": True,
        },
        OWNER: {"form": "low_rank", "rank": 8},
    },
    "sparse": {
        OWNER: {"form": "sparse", "nonzeros": 500, "d_in": 32},
        "model.layers.1.mlp.down_proj": {
            "form": "sparse",
            "nonzeros": 700,
            "d_in": 48,
            "bias": True,
        },
    },
    "low_rank_plus_sparse": {
        OWNER: {"form": "low_rank_plus_sparse", "rank": 3, "nonzeros": 400},
        "model.layers.1.self_attn.v_proj": {
            "form": "low_rank_plus_sparse",
            "rank": 16,  # all its rows
            "nonzeros": 1,
        },
        "model.layers.1.mlp.down_proj": {
            "form": "low_rank_plus_sparse",
            "rank": 1,
            "nonzeros": 700,
            "bias": True,
        },
    },
    "dictionary": {
        OWNER: {"form": "dictionary", "atoms": 30, "nonzeros": 9},  # a mask; whole for many tokens
        "model.layers.1.self_attn.v_proj": {"form": "dictionary", "atoms": 7, "nonzeros": 7},
        "model.layers.1.mlp.down_proj": {
            "form": "dictionary",
            "atoms": 20,
            "nonzeros": 1,  # a list of indices
            "bias": True,
        },
    },
    "shared_dictionary": {
        "model.layers.1.self_attn.q_proj": {
            "form": "shared_dictionary",
            "atoms": 24,
            "nonzeros": 9,  # a mask; whole for many tokens
            "shares": OWNER,
        },
        "model.layers.1.mlp.up_proj": {
            "form": "shared_dictionary",
            "atoms": 24,
            "nonzeros": 1,  # a list of indices
            "shares": OWNER,
            "bias": True,
        },
        OWNER: {"form": "dictionary", "atoms": 24, "nonzeros": 12},
    },
}
DISK = {
    "model.embed_tokens": "cpu",
    "model.rotary_emb": "cpu",
    "model.layers.0": "disk",
    "model.layers.1": "cpu",
    "model.norm": "cpu",
    "lm_head": "cpu",
}


@dataclass(frozen=True)
class Stored:
    """A checkpoint of one form, and the dense model of the same function."""

    folder: Path
    dense: Any
    modules: dict[str, dict[str, Any]]

    def load(self, **options: Any) -> Any:
        options = {"dtype": torch.float32, **options}
        return AutoModelForCausalLM.from_pretrained(self.folder, **options).eval()


def test_every_form_is_covered() -> None:
    assert TABLES.keys() | INTEGERS == FORMS.keys()


@pytest.fixture(scope="module", params=TABLES)
def stored(request, families, tmp_path_factory) -> Stored:
    """Write a checkpoint of the tiny llama by hand: methods that make the forms come later."""
    modules = TABLES[request.param]
    dense = families("llama").dense()
    tensors = {name: t.clone() for name, t in dense.state_dict().items()}
    shared: dict[str, Tensor] = {}
    for name in sorted(modules, key=lambda name: "shares" in modules[name]):  # owners first
        spec, linear = modules[name], dense.get_submodule(name)
        form = FORMS[spec["form"]]
        content, W_hat = contents(name, spec, linear.weight.detach().double(), shared)
        del tensors[f"{name}.weight"]
        tensors |= {f"{name}.{leaf}": t for leaf, t in form.encode(*content).items()}
        with torch.no_grad():
            linear.weight.copy_(W_hat)
        if spec.get("bias"):
            bias = torch.linspace(-1, 1, linear.out_features)
            tensors[f"{name}.{form.BIAS}"] = bias
            linear.bias = nn.Parameter(bias.clone())
    tensors = {n: t.float() if t.is_floating_point() else t for n, t in tensors.items()}
    folder = tmp_path_factory.mktemp(request.param)
    write_weights(folder, {n: t.to("meta") for n, t in tensors.items()}, tensors.__getitem__)
    write_config(folder, dense.config, block(modules, {}), "float32")
    return Stored(folder, dense, modules)


def contents(
    name: str, spec: dict[str, Any], W: Tensor, shared: dict[str, Tensor]
) -> tuple[tuple[Tensor, ...], Tensor]:
    """Return what `encode` takes so that a form comes near `W`, and the weight that it holds."""
    if spec["form"] == "sparse":
        mask = largest(W.flatten(), spec["nonzeros"]).view_as(W)
        return (W * mask, mask), W * mask
    if spec["form"] == "low_rank_plus_sparse":
        low = spectrum(W).truncate(spec["rank"])
        E = W - low.B @ low.A
        mask = largest(E.abs().flatten(), spec["nonzeros"]).view_as(W)
        return (low.B, low.A, E * mask, mask), low.B @ low.A + E * mask
    if "atoms" in spec:
        atoms = torch.randperm(len(W), generator=torch.Generator().manual_seed(0))[: spec["atoms"]]
        D = shared[spec["shares"]] if "shares" in spec else W[atoms].T  # [d_in, atoms]
        shared[name] = D
        S = torch.linalg.lstsq(D, W.T).solution  # [atoms, d_out]
        mask = largest(S.abs().T, spec["nonzeros"]).T
        return (D, S * mask, mask), (D @ (S * mask)).T
    factors = spectrum(W).truncate(spec["rank"])
    B, A = factors.B, factors.A
    if "shares" in spec:
        A = shared[spec["shares"]]
        B = W @ torch.linalg.pinv(A)
    shared[name] = A
    return (B, A), B @ A


def largest(scores: Tensor, count: int) -> Tensor:
    where = scores.topk(count, dim=-1).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, where, True)


def logits_of(model: Any, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(tokens).logits
        return logits.float()


def assert_same(stored: Stored, logits: Tensor, expected: Tensor) -> None:
    """Demand every bit, but of a dictionary whose products cannot be multiplied out here."""
    multiplied_out = any("atoms" in spec for spec in stored.modules.values())
    # Measured 3e-6, of logits up to 6.
    torch.testing.assert_close(logits, expected, rtol=0, atol=5e-5 if multiplied_out else 0)


def state_of(folder: Path) -> dict[str, Tensor]:
    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


@pytest.fixture
def expected(stored: Stored, sample: Tensor) -> Tensor:
    return logits_of(stored.load(), sample)


def test_it_computes_what_it_stands_for(stored, sample, expected) -> None:
    # Measured 4e-6, of logits up to 6.
    torch.testing.assert_close(expected, logits_of(stored.dense, sample), rtol=0, atol=1e-4)


@pytest.mark.parametrize("device_map", ["cpu", DISK], ids=["cpu", "disk"])
def test_every_device_map_gives_the_same_logits(stored, sample, expected, tmp_path, device_map):
    model = stored.load(device_map=device_map, offload_folder=tmp_path / "offload")
    assert any(p.is_meta for p in model.parameters()) == ("disk" in str(device_map))
    assert_same(stored, logits_of(model, sample), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_dtype_at_load_converts_numbers_and_no_indices(stored, sample, expected, dtype) -> None:
    model = stored.load(dtype=dtype)
    for name, spec in stored.modules.items():
        layer = model.get_submodule(name)
        assert {p.dtype for p in layer.parameters()} == {dtype}
        for leaf, (_, kind) in (
            FORMS[spec["form"]]
            .shapes(layer.out_features, layer.in_features, spec, bias=False)
            .items()
        ):
            assert layer.state_dict()[leaf].dtype == (kind or dtype)
    # Measured 0.015 and 0.10, of logits up to 6.
    bound = {torch.float16: 0.03, torch.bfloat16: 0.25}[dtype]
    assert (logits_of(model, sample) - expected).abs().max() <= bound


def test_saving_again_changes_nothing(stored, sample, expected, tmp_path) -> None:
    stored.load().save_pretrained(tmp_path)
    before, after = state_of(stored.folder), state_of(tmp_path)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    block = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert block["modules"] == stored.modules
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert torch.equal(logits_of(again, sample), expected)


# transformers warns that saving needs memory for one shard.
@pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded modules:UserWarning")
def test_a_model_on_disk_is_saved_whole(stored, tmp_path) -> None:
    model = stored.load(device_map=DISK, offload_folder=tmp_path / "offload")
    model.save_pretrained(tmp_path / "again")
    before, after = state_of(stored.folder), state_of(tmp_path / "again")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_copy_is_whole(stored, sample, expected) -> None:
    model = stored.load()
    twin = copy.deepcopy(model)
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    assert torch.equal(logits_of(twin, sample), expected)


def test_a_dequantized_model_is_plain(stored, sample, expected, tmp_path) -> None:
    model = stored.load()
    model.dequantize()
    assert not any(isinstance(module, Form) for module in model.modules())
    torch.testing.assert_close(logits_of(model, sample), expected, rtol=0, atol=1e-4)
    model.save_pretrained(tmp_path)
    biases = {f"{n}.bias" for n, spec in stored.modules.items() if spec.get("bias")}
    assert state_of(tmp_path).keys() == {n for n, _ in stored.dense.named_parameters()}
    assert biases <= state_of(tmp_path).keys()


# PEFT asks for an attribute that the newest transformers has renamed.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_lora_trains_and_merges(stored, sample, expected) -> None:
    model = stored.load()
    # A form need not have a linear of its own; a dense one takes gradients through all of them.
    linears = ["model.layers.0.self_attn.v_proj"] + [
        f"{name}.{child}"
        for name in stored.modules
        for child, _ in model.get_submodule(name).named_children()
    ]
    config = peft.LoraConfig(r=2, target_modules=linears, task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(model, config)
    trained = [p for p in adapted.parameters() if p.requires_grad]
    assert len(trained) == 2 * len(linears)
    assert_same(stored, logits_of(adapted, sample), expected)
    optimizer = torch.optim.Adam(trained, lr=0.01)
    for _ in range(2):  # LoRA's B starts at zero, so its A moves in the second step only
        optimizer.zero_grad()
        adapted(sample, labels=sample).loss.backward()
        assert all(p.grad is not None for p in trained)
        optimizer.step()
    tuned = logits_of(adapted.eval(), sample)
    assert (tuned - expected).abs().max() > 1e-3
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(logits_of(merged, sample), tuned, rtol=0, atol=1e-4)


def test_generation_compiles_nothing_away(stored, sample) -> None:
    model = stored.load()
    tokens = model.generate(sample[:, :8], max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert tokens.shape == (2, 12)
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(compiled(sample).logits, model(sample).logits)


def test_inspect_knows_shape_and_size(stored) -> None:
    facts = describe(stored.folder, verify=False)
    model = stored.load()
    for module in facts["modules"]:
        spec, layer = stored.modules[module["name"]], model.get_submodule(module["name"])
        for key in ("form", *FORMS[spec["form"]].SIZES):
            assert module[key] == spec[key]
        assert module["shape"] == [layer.out_features, layer.in_features]
    assert facts["parameters"] == sum(p.numel() for p in model.parameters())


SPOILED: dict[str, Callable[[Tensor], Tensor | None]] = {
    "missing": lambda tensor: None,
    "of another shape": lambda tensor: tensor[:, None].contiguous(),
    "of another type": lambda tensor: tensor.long(),
}


@pytest.mark.parametrize("case", SPOILED)
def test_tensors_that_do_not_fit_are_refused_by_name(stored, tmp_path, case) -> None:
    (tmp_path / "config.json").write_bytes((stored.folder / "config.json").read_bytes())
    tensors, model = state_of(stored.folder), stored.load(device_map="meta")
    for name in stored.modules:
        for leaf in model.get_submodule(name).state_dict():
            whole = tensors[f"{name}.{leaf}"]
            if case == "of another type" and whole.is_floating_point():
                continue  # a checkpoint may be converted
            spoiled = SPOILED[case](whole)
            content = {k: t for k, t in tensors.items() if k != f"{name}.{leaf}"}
            content |= {} if spoiled is None else {f"{name}.{leaf}": spoiled}
            save_file(content, tmp_path / "model.safetensors", metadata={"format": "pt"})
            with pytest.raises(CheckpointError, match=f"fit config.json.*{name}.{leaf}: expected"):
                AutoModelForCausalLM.from_pretrained(tmp_path)
            with pytest.raises(CheckpointError, match=f"fit config.json.*{name}.{leaf}"):
                describe(tmp_path, verify=False)


@pytest.mark.parametrize("family", ["llama", "opt-bare"])
def test_the_pipeline_carries_any_form_from_the_plan(
    family, families, write_recipe, tmp_path, sample, monkeypatch
) -> None:
    """As far as matrices stand alone and hold what the stage's method makes: two factors.

    Those that share come from a method that groups them, other contents from methods of their own.
    """
    make_plan = prepare.make_plan
    alone = [
        form
        for form, table in TABLES.items()
        if issubclass(FORMS[form], RankForm) and all("shares" not in s for s in table.values())
    ]

    def mixed(*args: Any) -> Plan:
        plan = make_plan(*args)
        matrices = [
            replace(m, form=alone[i % len(alone)]) if m.rank else m
            for i, m in enumerate(plan.matrices)
        ]
        return replace(plan, matrices=matrices)

    run = families(family)
    recipe = write_recipe(tmp_path, run.source)
    monkeypatch.setattr(prepare, "make_plan", mixed)
    report = compress(load_recipe(recipe), Machine(device="cpu"))
    folder = tmp_path / "run/checkpoint"
    modules = json.loads((folder / "config.json").read_text())["quantization_config"]["modules"]
    assert {spec["form"] for spec in modules.values()} == {*alone}
    assert report["size"]["targeted"]["bits"] < run.report["size"]["targeted"]["bits"]
    facts = describe(folder, verify=False)
    assert facts["parameters"] == report["size"]["model"]["parameters"]["compressed"]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    # The same ranks from the same statistics: only rounding tells the two apart.
    difference = float((logits_of(model, sample) - logits_of(run.load(), sample)).abs().max())
    assert 0 < difference <= 0.3  # measured 0.1 and 0.04, of logits up to 6
