"""Dictionaries: where each coefficient goes, what is smaller, what is faster."""

from collections.abc import Callable

import accelerate
import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lrc.compressors.layers import COMPONENTS, ComponentConfig, WeightConfig
from lrc.compressors.layers.dictionary import Dictionary

ODD = [(3, 1, 1), (3, 7, 5), (4, 8, 8), (4, 9, 17), (6, 15, 40), (6, 20, 33)]  # d_out, d_in, atoms


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def coefficients(atoms: int, d_out: int, nonzeros: int) -> tuple[Tensor, Tensor]:
    """Return S [atoms, d_out] and which are stored: in every column others."""
    S = random(atoms, d_out, seed=1)
    where = random(atoms, d_out, seed=2).topk(nonzeros, dim=0).indices
    mask = torch.zeros_like(S, dtype=torch.bool).scatter(0, where, True)
    return S * mask, mask


def dictionary(
    D: Tensor, S: Tensor, mask: Tensor, dtype: torch.dtype = torch.float64
) -> Dictionary:
    sizes = {"atoms": D.shape[1], "nonzeros": int(mask[:, 0].sum())}
    config = ComponentConfig("dictionary", sizes)
    layer = Dictionary((S.shape[1], D.shape[0]), config, dtype=dtype)
    layer.load_state_dict(Dictionary.encode(D, S, mask))
    assert not layer.problems()
    return layer


@pytest.mark.parametrize(("d_out", "d_in", "atoms"), ODD)
def test_any_width_is_read_back_exactly(
    d_out: int, d_in: int, atoms: int, rounding: Callable[..., float]
) -> None:
    for nonzeros in {1, (atoms + 1) // 2, atoms}:
        D = random(d_in, atoms)
        S, mask = coefficients(atoms, d_out, nonzeros)
        written = dictionary(D, S, mask)
        expected = (S.T @ D.T).float()
        close = rounding(atoms, torch.float32) * float(expected.abs().max())
        torch.testing.assert_close(written.matrix(), expected, rtol=0, atol=close)
        x = random(2, d_in, seed=3)
        torch.testing.assert_close(written(x), x @ D @ S, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("nonzeros", [1, 5])
def test_a_stored_zero_keeps_its_place(nonzeros: int) -> None:
    S, mask = coefficients(40, 4, nonzeros)
    S[mask[:, 0], 0] = 0
    D = random(9, 40)
    torch.testing.assert_close(dictionary(D, S, mask).matrix(), (S.T @ D.T).float())


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
def test_positions_are_stored_as_the_smaller_of_mask_and_indices(
    atoms: int, nonzeros: int, expected: str, n_bytes: int
) -> None:
    S = torch.zeros(atoms, 2, dtype=torch.float64)
    S[-nonzeros:, 0] = S[:nonzeros, 1] = torch.arange(1.0, nonzeros + 1, dtype=torch.float64)
    D = random(3, atoms)
    encoded = Dictionary.encode(D, S, S != 0)
    assert encoded.keys() == {"a.weight", "values", expected}
    assert encoded[expected].numel() * encoded[expected].itemsize == 2 * n_bytes
    other = min(2 * nonzeros, -(-atoms // 8)) if atoms <= 2**15 else n_bytes
    assert n_bytes == other
    torch.testing.assert_close(dictionary(D, S, S != 0).matrix(), (S.T @ D.T).float())


def test_indices_and_values_ascend_with_the_atoms() -> None:
    S, mask = coefficients(64, 5, 3)
    encoded = Dictionary.encode(random(9, 64), S, mask)
    index = encoded["index"].long()  # [d_out, nonzeros]
    assert bool((index.diff(dim=1) > 0).all())
    assert torch.equal(S.T.gather(1, index), encoded["values"])


@pytest.mark.parametrize(("atoms", "counts"), [(8, [1, 3]), (64, [1, 3]), (8, [0, 0]), (8, [0, 2])])
def test_outputs_of_unequal_coefficients_are_rejected(atoms: int, counts: list[int]) -> None:
    mask = torch.zeros(atoms, 2, dtype=torch.bool)
    for column, count in enumerate(counts):
        mask[:count, column] = True
    words = f"must have equally many coefficients, got {counts[0]} to {counts[1]}"
    with pytest.raises(ValueError, match=words):
        Dictionary.encode(random(9, atoms), random(atoms, 2), mask)


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
    work = Dictionary.multiply_adds(24, 20, layer.config)
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
def test_an_offloaded_dictionary_is_loaded_at_any_length(tokens: int) -> None:
    D, (S, mask) = random(20, 30), coefficients(30, 24, 9)
    layer = accelerate.cpu_offload(dictionary(D, S, mask), execution_device=torch.device("cpu"))
    assert layer.a.weight.is_meta
    x = random(tokens, 20, seed=3)
    torch.testing.assert_close(layer(x), x @ D @ S, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("move", [lambda m: m.half(), lambda m: m.to(torch.float32)])
@pytest.mark.parametrize("nonzeros", [2, 9])  # as indices, as a mask
def test_moving_a_bfloat16_component_rounds_nothing(
    move: Callable[[nn.Module], object], nonzeros: int
) -> None:
    layer = dictionary(random(11, 50), *coefficients(50, 6, nonzeros), torch.bfloat16)
    assert ("index" in layer.state_dict()) == (nonzeros == 2)
    expected = layer.matrix()
    places = {n: t.clone() for n, t in layer.state_dict().items() if not t.is_floating_point()}
    move(layer)
    assert {p.dtype for p in layer.parameters()} < {torch.float16, torch.float32}
    torch.testing.assert_close(layer.matrix(), expected, rtol=1e-6, atol=1e-6)
    for name, tensor in places.items():
        assert torch.equal(layer.state_dict()[name], tensor)


def test_sizes_are_those_of_some_weight() -> None:
    config = ComponentConfig("dictionary", {"atoms": 8, "nonzeros": 8})
    assert WeightConfig((6, 11), (config,)).tensors()["dictionary.values"].shape == [6, 8]
    config = ComponentConfig("dictionary", {"atoms": 8, "nonzeros": 9})
    words = r"nonzeros must be in \[1, 8\], the number of atoms; got 9"
    with pytest.raises(ValueError, match=words):
        COMPONENTS["dictionary"].tensors(6, 11, config)
