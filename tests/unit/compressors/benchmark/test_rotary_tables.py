"""Steps with the rotary tables of slices can be recorded, and give the same logits."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaForCausalLM

from lrc.compressors.benchmark import decoders
from lrc.compressors.benchmark.decoders import GraphDecoder, StaticDecoder, logits_after
from lrc.compressors.benchmark.rotary_tables import ConstantTables
from lrc.compressors.benchmark.speculative import SpeculativeDecoder
from lrc.compressors.slicing.rope import table_parameters

PAIRS = [0, 2, 3]
"""Rotary pairs that are kept, of four."""
HOST_READS = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default}
"""Operators with which the host reads a value of a tensor, which waits for the device."""
TABLES: dict[str, dict[str, Any]] = {
    "longrope": table_parameters(
        {"rope_theta": 10000.0},
        10000.0 ** (-torch.arange(4) / 4),
        PAIRS,
        scale=1.0,
        max_positions=16,  # the texts are longer
    ),
    "dynamic": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
}


class Recording(TorchDispatchMode):
    """Refuse what cannot be recorded as a CUDA graph."""

    def __torch_dispatch__(
        self, operator: Any, types: Any, args: Any = (), options: Any = None
    ) -> Any:
        if operator in HOST_READS:
            raise RuntimeError(f"{operator} in a recording")
        return operator(*args, **(options or {}))


def record(step: Callable[[], None], device: torch.device) -> Callable[[], None]:
    with Recording():
        step()
    return step


@pytest.fixture(params=TABLES)
def model(request: Any, tiny_llama: Callable[..., LlamaForCausalLM]) -> LlamaForCausalLM:
    return tiny_llama(head_dim=2 * len(PAIRS), rope_parameters=TABLES[request.param])


def tokens(length: int) -> Tensor:
    return torch.randint(2, 512, (1, length), generator=torch.Generator().manual_seed(0))


@pytest.mark.oldest
@torch.no_grad()
def test_a_step_is_recorded_without_reading_tensors_on_the_host(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt, following = tokens(13), tokens(6)
    expected = logits_after(StaticDecoder(model, prompt, 6), following)
    types = model.model.rotary_emb.rope_type
    monkeypatch.setattr(decoders, "record", record)
    decoder = GraphDecoder(model, prompt, 6)
    with ConstantTables(model, 32).kept():  # as the recording repeats it
        assert torch.equal(logits_after(decoder, following), expected)
    assert model.model.rotary_emb.rope_type == types
    assert torch.equal(logits_after(StaticDecoder(model, prompt, 6), following), expected)


@pytest.mark.oldest
@torch.no_grad()
def test_a_round_is_recorded_without_reading_tensors_on_the_host(model: Any) -> None:
    decoder = SpeculativeDecoder(model, model, tokens(7), tokens=6, drafts=2)
    decoder.prefill()
    with ConstantTables(model, 32).kept(), Recording():
        decoder._round()
    assert int(decoder._accepted) == 2


@torch.no_grad()
def test_tables_that_a_text_can_change_are_left_alone(model: Any) -> None:
    limits = {"longrope": 16, "dynamic": model.config.max_position_embeddings}
    rotary = model.model.rotary_emb
    kind = rotary.rope_type
    if kind == "longrope":
        model.config.rope_parameters["long_factor"] = [2.0] * len(PAIRS)
    for longest, expected in ((limits[kind], "default"), (limits[kind] + 1, kind)):
        with ConstantTables(model, longest).kept():
            assert rotary.rope_type == expected
    model(tokens(limits[kind] + 1), use_cache=False)  # the table is now that of a long text
    with ConstantTables(model, limits[kind]).kept():
        assert rotary.rope_type == kind
