"""Speculative decoding on tiny models, against generation by the parent alone."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaForCausalLM

from lrc.compressors.benchmark.drafting import DraftingBenchmark, DraftSettings, acceptance
from lrc.compressors.benchmark.speculative import (
    RewindableModel,
    SpeculativeDecoder,
    acceptance_by_position,
)
from lrc.compressors.layers.shared_ends import share_embeddings, shared_bytes

TOKENS = 24


@pytest.fixture(scope="module")
def parent(tiny_llama: Callable[..., LlamaForCausalLM]) -> LlamaForCausalLM:
    return tiny_llama()


@pytest.fixture(scope="module")
def drafter(tiny_llama: Callable[..., LlamaForCausalLM]) -> LlamaForCausalLM:
    """Return the parent with noise, of whose drafts some are accepted."""
    model, generator = tiny_llama(), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter += 0.05 * parameter.std() * noise
    return model


def prompts(count: int, length: int) -> Tensor:
    return torch.randint(2, 512, (count, length), generator=torch.Generator().manual_seed(2))


@torch.inference_mode()
def greedy(model: Any, tokens: Tensor, count: int) -> list[int]:
    """Continue [1, n] without any cache."""
    for _ in range(count):
        choice = model(input_ids=tokens, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
        tokens = torch.cat([tokens, choice], 1)
    return tokens[0, -count:].tolist()


def counted(parent: Any, drafter: Any, prompt: Tensor, drafts: int) -> list[int]:
    """Return the accepted drafts of each round, from whole forward passes without caches."""
    text, rounds = torch.cat([prompt, torch.tensor([greedy(parent, prompt, 1)])], 1), []
    while text.shape[1] - prompt.shape[1] < TOKENS:
        proposed, wanted = greedy(drafter, text, drafts), greedy(parent, text, drafts + 1)
        pairs = zip(proposed, wanted[:-1], strict=True)
        accepted = next((i for i, (a, b) in enumerate(pairs) if a != b), drafts)
        rounds.append(accepted)
        text = torch.cat([text, torch.tensor([wanted[: accepted + 1]])], 1)
    return rounds


@torch.inference_mode()
@pytest.mark.parametrize(("length", "drafts"), [(1, 3), (9, 1), (9, 4)])
def test_text_and_rounds_are_those_without_caches(
    parent: Any, drafter: Any, length: int, drafts: int
) -> None:
    prompt = torch.zeros(1, length, dtype=torch.long)
    decoder = SpeculativeDecoder(parent, drafter, prompt, tokens=TOKENS, drafts=drafts)
    rounds = []
    for each in prompts(2, length):
        prompt.copy_(each[None])  # the same decoder reads one prompt after the other
        decoder.prefill()
        decoder.decode()
        assert decoder.new_tokens.tolist() == greedy(parent, prompt, TOKENS)
        assert decoder.rounds == counted(parent, drafter, prompt, drafts)
        rounds += decoder.rounds
    assert 0 < sum(rounds) < drafts * len(rounds)  # neither case was left out


@torch.inference_mode()
def test_all_drafts_of_the_parent_itself_are_accepted(parent: Any) -> None:
    decoder = SpeculativeDecoder(parent, parent, prompts(1, 5), tokens=TOKENS, drafts=3)
    decoder.prefill()
    decoder.decode()
    assert {*decoder.rounds} == {3}


def test_local_attention_is_refused() -> None:
    config = Gemma3TextConfig(
        vocab_size=512,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention"],
    )
    with pytest.raises(ValueError, match="cannot go back"):
        RewindableModel(Gemma3ForCausalLM(config), 16)


def test_acceptance_counts_drafts_that_were_compared() -> None:
    rounds = [3, 0, 1, 3]
    assert acceptance_by_position(rounds, 3) == [(3, 4), (2, 3), (2, 2)]
    found = acceptance(rounds, 3)
    assert found["rate"] == pytest.approx(7 / 9)
    assert found["tokens_per_round"] == pytest.approx(1 + 7 / 4)


def test_all_loops_write_the_same_and_report_it(parent: Any, drafter: Any) -> None:
    settings = DraftSettings(drafts=3, prompts=2, prompt_tokens=7, tokens=12, repeats=1)
    steps: list[tuple[str, int, int]] = []
    found = DraftingBenchmark(parent, drafter, settings).run(
        {"one": prompts(2, 7), "other": prompts(1, 7)}, lambda *step: steps.append(step)
    )
    assert steps == [("drafting", i + 1, 12) for i in range(12)]  # texts, loops, with and without
    equal = {"texts": 3, "differ": []}
    assert found["exact"] == {"generate": equal, "static caches": equal}
    assert [each["loop"] for each in found["speed"]] == ["generate", "static caches"]
    assert found["acceptance"].keys() == {"one", "other"}
    assert found["memory"]["shared"] == 0


def test_another_text_is_found_and_is_no_tie(parent: Any, drafter: Any) -> None:
    settings = DraftSettings(drafts=2, prompts=1, prompt_tokens=7, tokens=8, repeats=1)
    benchmark = DraftingBenchmark(parent, drafter, settings)
    loop = benchmark.loops[1]
    alone = loop.runs["parent"]
    loop.runs = {"parent": alone, "pair": lambda *turn: _changed(alone(*turn))}
    with torch.no_grad():  # for its rounds, which are counted
        benchmark._step_pair(prompts(1, 7), 8)
    found = benchmark.run({"one": prompts(1, 7)}, lambda *_: None)["exact"]["static caches"]
    assert [each["token"] for each in found["differ"]] == [5]
    assert not found["differ"][0]["tie"]


def _changed(found: Any) -> Any:
    if len(found.tokens) > 5:  # not of the first run, which only warms up
        found.tokens[5] = (found.tokens[5] + 1) % 512
    return found


def test_equal_ends_become_one_tensor(tiny_llama: Callable[..., LlamaForCausalLM]) -> None:
    one, other = tiny_llama(), tiny_llama()
    assert share_embeddings(one, other) == ["model.embed_tokens.weight", "lm_head.weight"]
    assert one.model.embed_tokens.weight is other.model.embed_tokens.weight
    assert shared_bytes(one, other) == 2 * 512 * 32 * 4
    different = tiny_llama(seed=1)
    assert share_embeddings(different, other) == []
    assert shared_bytes(different, other) == 0
