"""Decoding in every mode computes the same as plain forwards, for all families of models."""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

from lrc.compressors.benchmark.decoders import (
    CompiledDecoder,
    Decoder,
    EagerDecoder,
    GraphDecoder,
    StaticDecoder,
    check_steps,
    logits_after,
    random_tokens,
)
from lrc.compressors.benchmark.grid import Mode, Point

POINT = Point(Mode.EAGER, batch=2, prompt=12, tokens=6)
SIZES = {
    "vocab_size": 512,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 32},
    "qwen3": {},
    "gemma3_text": {
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32, "init_std": 0.2},
    "gpt_neox": {},
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}


@pytest.fixture(autouse=True)
def no_grad() -> Any:
    with torch.no_grad():
        yield


def make(family: str, *, seed: int = 0, **changes: Any) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = AutoConfig.for_model(family, **{**SIZES, **FAMILIES[family], **changes})
        return AutoModelForCausalLM.from_config(config).eval()


def tokens() -> tuple[torch.Tensor, torch.Tensor]:
    return random_tokens(POINT, 512, torch.device("cpu"))


def assert_same_logits(found: Decoder, expected: Decoder, following: torch.Tensor) -> None:
    """Compare in float32, in which a few layers of a random model add little rounding."""
    torch.testing.assert_close(
        logits_after(found, following), logits_after(expected, following), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_a_static_cache_gives_the_logits_of_plain_forwards(family: str) -> None:
    model = make(family)
    prompt, following = tokens()
    static = StaticDecoder(model, prompt, POINT.tokens)
    eager = EagerDecoder(model, prompt, POINT.tokens)
    for _ in range(2):  # the cache is emptied
        assert_same_logits(static, eager, following)


def test_generated_tokens_are_those_of_generate() -> None:
    model = make("llama")
    prompt, _ = tokens()
    expected = model.generate(
        prompt, max_new_tokens=POINT.tokens + 1, do_sample=False, pad_token_id=0
    )
    decoder = EagerDecoder(model, prompt, POINT.tokens)
    decoder.prefill()
    found = [decoder.token]
    for _ in range(POINT.tokens):
        decoder.step()
        found.append(decoder.token)
    assert torch.equal(torch.cat(found, dim=1), expected[:, POINT.prompt :])


def test_the_recorded_step_starts_from_the_prompt_again() -> None:
    """Without a GPU, `record` repeats the step itself."""
    model = make("llama")
    prompt, following = tokens()
    plain = EagerDecoder(model, prompt, 1)
    decoder = GraphDecoder(model, prompt, 1)  # fewer steps than before the recording
    assert_same_logits(decoder, plain, following[:, :1])
    decoder = GraphDecoder(model, prompt, POINT.tokens)
    assert_same_logits(decoder, plain, following)
    check_steps(decoder, following)


def test_a_recording_writes_the_logits_of_its_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CUDA graph repeats what was launched, into the same tensors, and sets no attributes."""

    def recorded(step: Callable[[], None], device: torch.device) -> Callable[[], None]:
        step()
        written = vars(decoder).copy()

        def repeat() -> None:
            now = vars(decoder).copy()
            vars(decoder).update(written)
            step()
            vars(decoder).update(now)

        return repeat

    model = make("llama")
    prompt, following = tokens()
    decoder = GraphDecoder.__new__(GraphDecoder)
    monkeypatch.setattr("lrc.compressors.benchmark.decoders.record", recorded)
    decoder.__init__(model, prompt, POINT.tokens)  # type: ignore[misc]
    plain = EagerDecoder(model, prompt, POINT.tokens)
    assert_same_logits(decoder, plain, following)


def test_layers_with_different_numbers_of_heads_can_be_decoded(
    tiny_llama: Callable[..., LlamaForCausalLM],
) -> None:
    """As after slicing: the cache takes the shape of every layer from its keys."""
    model = tiny_llama()
    attention = model.model.layers[1].self_attn
    for name, width in (("q_proj", 16), ("k_proj", 8), ("v_proj", 8)):
        setattr(attention, name, nn.Linear(32, width, bias=False))
    attention.o_proj = nn.Linear(16, 32, bias=False)
    prompt, following = tokens()
    assert_same_logits(StaticDecoder(model, prompt, 6), EagerDecoder(model, prompt, 6), following)


def test_a_step_that_repeats_a_number_of_the_host_is_found_out() -> None:
    """Here the position of the recording, which a recorded step would repeat."""

    class Frozen(StaticDecoder):
        def step(self) -> None:
            self.position.fill_(POINT.prompt)
            super().step()

    model = make("llama")
    prompt, following = tokens()
    with pytest.raises(ValueError, match="depends on numbers on the host"):
        check_steps(Frozen(model, prompt, 6), following)


def test_prompts_are_random_and_the_same_for_all_models() -> None:
    (prompt, following), (again, _) = tokens(), tokens()
    assert torch.equal(prompt, again)
    assert (prompt.shape, following.shape) == ((2, 12), (2, 6))
    assert len(prompt.unique()) > 12
    assert prompt.max() < 512


def test_only_arguments_of_the_model_are_passed() -> None:
    class Bare(nn.Module):
        """Takes the cache by its old name, and neither positions nor the number of logits."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = make("llama")
            self.config = self.inner.config

        def forward(
            self, input_ids: torch.Tensor, past_key_values: Any = None, use_cache: bool = True
        ) -> Any:
            names = inspect.signature(self.inner.forward).parameters
            name = "cache" if "cache" in names else "past_key_values"
            return self.inner(input_ids=input_ids, use_cache=use_cache, **{name: past_key_values})

    prompt, following = tokens()
    bare = Bare()
    plain = EagerDecoder(bare.inner, prompt, 6)
    assert_same_logits(StaticDecoder(bare, prompt, 6), plain, following)


@pytest.mark.filterwarnings("ignore")
def test_a_compiled_step_has_no_graph_breaks_and_the_logits_of_plain_forwards(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Traced, but not compiled to machine code, which takes half a minute."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    prompt, following = tokens()
    for seed in range(9):  # more models than the variants of one function that are kept
        # One of a family whose forward pass chooses its rotary table by the length of the text.
        changes = {} if seed else {"rope_parameters": DYNAMIC}
        model = make("llama", seed=seed, num_hidden_layers=1, **changes)
        compiled = CompiledDecoder(model, prompt, POINT.tokens)
        assert_same_logits(compiled, EagerDecoder(model, prompt, POINT.tokens), following)
        check_steps(compiled, following)
    torch.compiler.reset()
