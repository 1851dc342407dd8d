"""Recordings omit the masks that the same call has omitted before."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lrc.compressors.heal import recorded_attention
from lrc.compressors.heal.recorded_attention import recorded_without_masks


def test_masks_are_left_out_of_recordings_only(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=50,
    )
    model = LlamaForCausalLM(config).eval()
    attention = model.model.layers[0].self_attn
    ids = torch.randint(50, (2, 6))
    wrong = torch.eye(6, dtype=torch.bool).expand(2, 1, 6, 6)  # every token sees itself alone
    with torch.no_grad():
        expected, masked = (model(ids, attention_mask=mask).logits for mask in (None, wrong))
        with recorded_without_masks():
            assert torch.equal(model(ids).logits, expected)
            assert attention.unmasked_lengths == (6, 6)
            monkeypatch.setattr(recorded_attention, "is_recording", lambda: True)
            assert torch.equal(model(ids, attention_mask=wrong).logits, expected)
            shorter = model(ids[:, :4], attention_mask=wrong[:, :, :4, :4]).logits
            monkeypatch.setattr(recorded_attention, "is_recording", lambda: False)
            assert torch.equal(model(ids, attention_mask=wrong).logits, masked)
            few = model(ids[:, :4], attention_mask=wrong[:, :, :4, :4]).logits
            assert torch.equal(shorter, few)
        assert attention.unmasked_lengths is None
        monkeypatch.setattr(recorded_attention, "is_recording", lambda: True)
        attention.unmasked_lengths = 6, 6
        assert torch.equal(model(ids, attention_mask=wrong).logits, masked)  # outside of it
    assert not torch.equal(masked, expected)
