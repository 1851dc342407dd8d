"""The oracle: fusing norms and changing the basis of the stream do not change the model."""

import copy

import pytest
import torch
from rotated_model import Shortcut, fuse_norms_, rotate_, rotate_blocks_
from safetensors.torch import load_file
from torch import nn

from lrc.compressors.layers.residual_basis import UnitNorm
from lrc.compressors.slicing.families import find_family

CLOSE = {"rtol": 1e-9, "atol": 1e-9}


@torch.no_grad()
def logits(model, tokens):
    return model(tokens, use_cache=False).logits


def fused(model):
    family = find_family(model)
    fuse_norms_(model, family)
    return family


def test_fusing_norms_changes_no_logit(model, tokens):
    before = logits(model, tokens)
    family = fused(model)
    norms = [model.get_submodule(norm.name) for norm in family.norms(model)]
    assert all(isinstance(norm, UnitNorm) and not list(norm.parameters()) for norm in norms)
    assert before.std() > 0.1
    torch.testing.assert_close(logits(model, tokens), before, **CLOSE)


def test_fusing_leaves_the_embedding_of_a_tied_rms_model_alone(configs, make_model):
    model = make_model(configs["llama-tied"]())
    embedding = model.get_input_embeddings().weight.clone()
    fused(model)
    assert torch.equal(model.get_input_embeddings().weight, embedding)
    assert not torch.equal(model.get_output_embeddings().weight, embedding)
    assert not model.config.tie_word_embeddings


@pytest.mark.parametrize("name", ["llama-tied", "qwen3-tied", "gemma", "opt"])
def test_both_ends_of_a_fused_tied_model_are_saved(configs, make_model, tmp_path, name):
    model = make_model(configs[name]())
    family = fused(model)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    for module in (*family.embeddings, family.head):
        weight = f"{module}.weight"
        assert torch.equal(saved[weight], model.get_submodule(module).weight)


def test_the_stream_of_a_fused_layer_norm_model_has_no_mean(configs, make_model, tokens):
    model = make_model(configs["opt"]())
    fused(model)
    with torch.no_grad():
        states = model(tokens, output_hidden_states=True).hidden_states
    assert all(float(x.mean(-1).abs().max()) < 1e-12 for x in states[:-1])


@pytest.mark.parametrize("name", ["llama", "opt", "gemma"])
def test_a_norm_keeps_its_own_eps(configs, make_model, name):
    model = make_model(configs[name]())
    family = find_family(model)
    for index, norm in enumerate(family.norms(model)):
        module = model.get_submodule(norm.name)
        leaf = "variance_epsilon" if hasattr(module, "variance_epsilon") else "eps"
        setattr(module, leaf, 10.0 ** -(index + 1))
    fuse_norms_(model, family)
    found = [model.get_submodule(norm.name).eps for norm in family.norms(model)]
    assert found == [10.0 ** -(index + 1) for index in range(len(found))]


def test_one_rotation_changes_no_logit(model, tokens, random_rotation):
    before = logits(model, tokens)
    family = fused(model)
    embedding = model.get_submodule(family.embeddings[0]).weight.clone()
    rotate_(model, family, random_rotation(0))
    assert not torch.allclose(model.get_submodule(family.embeddings[0]).weight, embedding)
    torch.testing.assert_close(logits(model, tokens), before, **CLOSE)


def test_a_rotation_a_block_changes_no_logit(model, tokens, random_rotation):
    before = logits(model, tokens)
    family = fused(model)
    n_blocks = len(family.stream(model))
    rotations = [random_rotation(seed) for seed in range(n_blocks + 1)]
    rotate_blocks_(model, family, rotations)
    shortcuts = [module for module in model.modules() if isinstance(module, Shortcut)]
    assert len(shortcuts) == n_blocks
    torch.testing.assert_close(logits(model, tokens), before, **CLOSE)
    for shortcut in shortcuts:  # without them it is another model
        shortcut.change.zero_()
    assert not torch.allclose(logits(model, tokens), before, atol=1e-2)


def test_shortcuts_vanish_if_all_blocks_share_a_basis(configs, make_model, tokens, random_rotation):
    model = make_model(configs["llama"]())
    family = fused(model)
    other, Q = copy.deepcopy(model), random_rotation(0)
    rotate_(model, family, Q)
    rotate_blocks_(other, family, [Q] * (len(family.stream(model)) + 1))
    changes = [m.change for m in other.modules() if isinstance(m, Shortcut)]
    assert max(float(change.abs().max()) for change in changes) < 1e-12
    torch.testing.assert_close(logits(other, tokens), logits(model, tokens), **CLOSE)


def test_fewer_columns_make_the_stream_narrower(model, tokens, random_rotation):
    family = fused(model)
    whole = logits(model, tokens)
    rotate_(model, family, random_rotation(0)[:, :16])
    sliced = logits(model, tokens)
    assert model.get_submodule(family.embeddings[0]).weight.shape[1] == 16
    for module in model.modules():
        if isinstance(module, nn.Linear):
            assert module.weight.shape == (module.out_features, module.in_features)
    assert all(model.get_submodule(norm.name).width == 32 for norm in family.norms(model))
    assert sliced.shape == whole.shape
    assert not torch.allclose(sliced, whole, atol=1e-2)


def test_a_norm_divides_by_the_width_it_is_told():
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    padded = torch.cat([x, torch.zeros(5, 4, dtype=torch.float64)], dim=1)
    expected = nn.functional.rms_norm(padded, (12,), eps=1e-3)[:, :8]
    torch.testing.assert_close(UnitNorm(12, 1e-3)(x), expected, rtol=1e-12, atol=0)
    assert UnitNorm(12, 1e-3)(x.bfloat16()).dtype == torch.bfloat16


def test_a_model_with_norm_weights_is_not_rotated(configs, make_model, random_rotation):
    model = make_model(configs["llama"]())
    family = find_family(model)
    with pytest.raises(ValueError, match=r"input_layernorm has weights"):
        rotate_(model, family, random_rotation(0))


def test_rotations_must_be_one_more_than_blocks(configs, make_model, random_rotation):
    model = make_model(configs["phi"]())
    family, Q = fused(model), random_rotation(0)
    with pytest.raises(ValueError, match="needs 3 rotations, got 2"):
        rotate_blocks_(model, family, [Q, Q])
    with pytest.raises(ValueError, match="one shape"):
        rotate_blocks_(model, family, [Q[:, :16], Q, Q])
