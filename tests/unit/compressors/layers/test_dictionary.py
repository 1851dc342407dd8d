"""Sparse weights and dictionaries: where each value goes, what is smaller, what is quicker."""

from collections.abc import Callable
from typing import Any

import accelerate
import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lrc.compressors.checkpoint.format import check_modules
from lrc.compressors.checkpoint.quantizer import swap_in_forms
from lrc.compressors.layers import Sparse, SparseDictionary
from lrc.configs.errors import CheckpointError

ODD = [(3, 1, 1), (3, 7, 5), (4, 8, 8), (4, 9, 17), (6, 15, 40), (6, 20, 33)]  # d_out, d_in, atoms


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def coefficients(atoms: int, d_out: int, nonzeros: int) -> tuple[Tensor, Tensor]:
    """Return S [atoms, d_out] and which are stored: in every column others."""
    S = random(atoms, d_out, seed=1)
    where = random(atoms, d_out, seed=2).topk(nonzeros, dim=0).indices
    mask = torch.zeros_like(S, dtype=torch.bool).scatter(0, where, True)
    return S * mask, mask


def sparse(W_hat: Tensor, mask: Tensor, dtype: torch.dtype = torch.float64) -> Sparse:
    d_out, d_in = W_hat.shape
    layer = Sparse(d_in, d_out, bias=False, dtype=dtype, nonzeros=int(mask.sum()))
    layer.load_state_dict(Sparse.encode(W_hat, mask))
    return layer


def dictionary(
    D: Tensor, S: Tensor, mask: Tensor, dtype: torch.dtype = torch.float64
) -> SparseDictionary:
    sizes = {"atoms": D.shape[1], "nonzeros": int(mask[:, 0].sum())}
    layer = SparseDictionary(D.shape[0], S.shape[1], bias=False, dtype=dtype, **sizes)
    layer.load_state_dict(SparseDictionary.encode(D, S, mask))
    return layer


@pytest.mark.parametrize(("d_out", "d_in", "atoms"), ODD)
def test_any_width_is_read_back_exactly(
    d_out: int, d_in: int, atoms: int, rounding: Callable[..., float]
) -> None:
    W = random(d_out, d_in).to(torch.bfloat16)
    mask = random(d_out, d_in, seed=1) > 0
    mask[0, 0] = True
    layer = sparse(W * mask, mask, torch.bfloat16)
    assert torch.equal(layer.product(), (W * mask).float())
    for nonzeros in {1, (atoms + 1) // 2, atoms}:
        D = random(d_in, atoms)
        S, mask = coefficients(atoms, d_out, nonzeros)
        written = dictionary(D, S, mask)
        expected = (S.T @ D.T).float()
        close = rounding(atoms, torch.float32) * float(expected.abs().max())
        torch.testing.assert_close(written.product(), expected, rtol=0, atol=close)
        x = random(2, d_in, seed=3)
        torch.testing.assert_close(written(x), x @ D @ S, rtol=1e-10, atol=1e-10)


def test_rows_may_be_empty_or_full() -> None:
    W_hat = random(3, 11)
    mask = torch.zeros(3, 11, dtype=torch.bool)
    mask[1] = True
    W_hat = W_hat * mask
    layer = sparse(W_hat, mask)
    assert torch.equal(layer.product(), W_hat.float())
    assert torch.equal(layer.values, W_hat[1])


@pytest.mark.parametrize("nonzeros", [1, 5])
def test_a_stored_zero_keeps_its_place(nonzeros: int) -> None:
    W_hat, mask = torch.zeros(4, 9, dtype=torch.float64), random(4, 9) > 0
    assert torch.equal(sparse(W_hat, mask).product(), W_hat.float())
    S, mask = coefficients(40, 4, nonzeros)
    S[mask[:, 0], 0] = 0
    D = random(9, 40)
    torch.testing.assert_close(dictionary(D, S, mask).product(), (S.T @ D.T).float())


# 16 bits an index, or 8 bits for every 8 atoms; bits that are equal go to the mask.
@pytest.mark.parametrize(
    ("atoms", "nonzeros", "expected", "n_bytes"),
    [
        (32, 1, "index", 2),
        (33, 2, "index", 4),
        (48, 3, "mask", 6),
        (16, 1, "mask", 2),
        (17, 1, "index", 2),
        (13, 13, "mask", 2),
        (2**15, 1, "index", 2),  # the last atom is 32767
        (2**15 + 1, 1, "mask", 2**12 + 1),
    ],
)
def test_atoms_are_told_by_the_smaller_of_mask_and_indices(
    atoms: int, nonzeros: int, expected: str, n_bytes: int
) -> None:
    S = torch.zeros(atoms, 2, dtype=torch.float64)
    S[-nonzeros:, 0] = S[:nonzeros, 1] = torch.arange(1.0, nonzeros + 1, dtype=torch.float64)
    D = random(3, atoms)
    encoded = SparseDictionary.encode(D, S, S != 0)
    assert encoded.keys() == {"weight", "a.weight", "values", expected}
    assert encoded[expected].numel() * encoded[expected].itemsize == 2 * n_bytes
    other = min(2 * nonzeros, -(-atoms // 8)) if atoms <= 2**15 else n_bytes
    assert n_bytes == other
    torch.testing.assert_close(dictionary(D, S, S != 0).product(), (S.T @ D.T).float())


def test_indices_and_values_ascend_with_the_atoms() -> None:
    S, mask = coefficients(64, 5, 3)
    encoded = SparseDictionary.encode(random(9, 64), S, mask)
    index = encoded["index"].long()  # [d_out, nonzeros]
    assert bool((index.diff(dim=1) > 0).all())
    assert torch.equal(S.T.gather(1, index), encoded["values"])


@pytest.mark.parametrize(("atoms", "counts"), [(8, [1, 3]), (64, [1, 3]), (8, [0, 0]), (8, [0, 2])])
def test_outputs_of_unequal_coefficients_are_refused(atoms: int, counts: list[int]) -> None:
    mask = torch.zeros(atoms, 2, dtype=torch.bool)
    for column, count in enumerate(counts):
        mask[:count, column] = True
    words = f"must store equally many coefficients, got {counts[0]} to {counts[1]}"
    with pytest.raises(ValueError, match=words):
        SparseDictionary.encode(random(9, atoms), random(atoms, 2), mask)


def multiplications(layer: nn.Module, x: Tensor) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        layer(x)
    return int(counter.get_total_flops()) // 2


# Through 30 atoms a token takes 30 * (20 + 24) = 1320 products, through the weight 20 * 24 = 480
# and once 30 * 480 = 14400: the weight pays from the 18th token on.
@pytest.mark.parametrize("tokens", [1, 7, 17, 18, 500])
@pytest.mark.parametrize("nonzeros", [1, 9])
def test_the_path_with_fewer_multiplications_is_taken(tokens: int, nonzeros: int) -> None:
    D, (S, mask) = random(20, 30), coefficients(30, 24, nonzeros)
    layer = dictionary(D, S, mask)
    x = random(tokens, 20, seed=3)
    through, whole = tokens * 1320, tokens * 480 + 14400
    assert (through < whole) == (tokens < 18)
    assert multiplications(layer, x) == min(through, whole)
    assert multiplications(layer, x[None, :, None]) == min(through, whole)
    few = torch.cat([layer(token) for token in x.split(1)])
    torch.testing.assert_close(layer(x), few, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("tokens", [1, 1000])
def test_few_atoms_never_need_the_whole_weight(tokens: int) -> None:
    layer = dictionary(random(20, 10), *coefficients(10, 24, 3))
    work = SparseDictionary.multiply_adds(24, 20, atoms=10, nonzeros=3)
    assert work < 20 * 24
    assert multiplications(layer, random(tokens, 20)) == tokens * work


def test_both_paths_train_alike() -> None:
    layer = dictionary(random(20, 30), *coefficients(30, 24, 9))
    x = random(100, 20, seed=3)
    assert multiplications(layer, x) < 100 * multiplications(layer, x[:1])
    layer(x).square().sum().backward()
    whole = [p.grad.clone() for p in layer.parameters() if p.grad is not None]
    layer.zero_grad()
    for token in x.split(1):
        layer(token).square().sum().backward()
    through = [p.grad for p in layer.parameters() if p.grad is not None]
    assert len(whole) == 2
    torch.testing.assert_close(through, whole, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("tokens", [1, 100])
def test_an_adapter_on_the_dictionary_counts_at_any_length(tokens: int) -> None:
    D, (S, mask) = random(20, 30), coefficients(30, 24, 9)
    layer = dictionary(D, S, mask)
    delta = random(30, 20, seed=4)

    class Adapted(nn.Module):
        def __init__(self, base: nn.Linear) -> None:
            super().__init__()
            self.base, self.weight = base, base.weight  # as PEFT shows the weight beneath

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.base(x)
            return y + x @ delta.T

    layer.a = Adapted(layer.a)
    x = random(tokens, 20, seed=3)
    torch.testing.assert_close(layer(x), x @ (D + delta.T) @ S, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("tokens", [1, 100])
def test_an_offloaded_dictionary_is_brought_at_any_length(tokens: int) -> None:
    D, (S, mask) = random(20, 30), coefficients(30, 24, 9)
    layer = accelerate.cpu_offload(dictionary(D, S, mask), execution_device=torch.device("cpu"))
    assert layer.a.weight.is_meta
    x = random(tokens, 20, seed=3)
    torch.testing.assert_close(layer(x), x @ D @ S, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("move", [lambda m: m.half(), lambda m: m.to(torch.float32)])
@pytest.mark.parametrize("nonzeros", [2, 9])  # as indices, as a mask
def test_moving_a_bfloat16_model_rounds_nothing(move, nonzeros: int) -> None:
    W, mask = random(6, 11), random(6, 11, seed=1) > 0
    layers = nn.ModuleList(
        [
            sparse(W, mask, torch.bfloat16),
            dictionary(random(11, 50), *coefficients(50, 6, nonzeros), torch.bfloat16),
        ]
    )
    assert ("index" in layers[1].state_dict()) == (nonzeros == 2)
    before = [layer.product() for layer in layers]
    places = {n: t.clone() for n, t in layers.state_dict().items() if not t.is_floating_point()}
    move(layers)
    for layer, expected in zip(layers, before, strict=True):
        assert {p.dtype for p in layer.parameters()} < {torch.float16, torch.float32}
        torch.testing.assert_close(layer.product(), expected, rtol=1e-6, atol=1e-6)
        assert layer.dense().weight.dtype == next(layer.parameters()).dtype
    for name, tensor in places.items():
        assert torch.equal(layers.state_dict()[name], tensor)


SPARSE = {"form": "sparse", "nonzeros": 9, "d_in": 11}
DICTIONARY = {"form": "dictionary", "atoms": 8, "nonzeros": 3}


@pytest.mark.parametrize("d_in", [None, 0, -11, True, False, "11", 11.0])
def test_a_mask_without_its_width_is_refused(d_in: Any) -> None:
    modules = {"layer": {**SPARSE, "d_in": d_in}}
    if d_in is None:
        del modules["layer"]["d_in"]
    with pytest.raises(CheckpointError) as caught:
        check_modules(modules, "config.json")
    assert str(caught.value) == (
        f"config.json: modules['layer'] must hold 'd_in': N >= 1, got {modules['layer']!r}; "
        "the file was edited: copy or download the checkpoint again, or compress again"
    )


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({**SPARSE, "d_in": 12}, "d_in must be 11 for [6, 11], got 12"),
        ({**SPARSE, "nonzeros": 67}, "nonzeros must be in [1, 66] for [6, 11], got 67"),
        (
            {**DICTIONARY, "nonzeros": 9},
            "nonzeros must be in [1, 8], the number of atoms; got 9",
        ),
    ],
)
def test_sizes_that_no_weight_has_are_refused(spec: dict[str, Any], words: str) -> None:
    model = nn.Module()
    model.layer = nn.Linear(11, 6)
    check_modules({"layer": spec}, "config.json")
    with pytest.raises(CheckpointError) as caught:
        swap_in_forms(model, {"layer": spec})
    assert str(caught.value) == (
        f"config.json: quantization_config.modules['layer']: {words}; the config was edited, or "
        "is another model's"
    )


def test_sizes_at_their_limits_are_taken() -> None:
    model = nn.Module()
    model.one, model.two = nn.Linear(11, 6), nn.Linear(11, 6)
    modules = {"one": {**SPARSE, "nonzeros": 66}, "two": {**DICTIONARY, "nonzeros": 8}}
    check_modules(modules, "config.json")
    assert swap_in_forms(model, modules).keys() >= {"one.mask", "two.mask", "one.bias"}
