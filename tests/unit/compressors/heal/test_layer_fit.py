import pytest
import torch
from torch import Tensor, nn

from lrc.compressors.heal.layer_fit import LayerData, LayerFit, Part, find_parts, output, squares
from lrc.compressors.layers import ComponentConfig, CompressedLinear, WeightConfig
from lrc.compressors.solvers.moments import TOKEN_CAP

D = 8


def linear() -> CompressedLinear:
    return CompressedLinear(WeightConfig((D, D), (ComponentConfig("low_rank", {"rank": 2}),)))


class Layer(nn.Module):
    """Two blocks with norms; children are declared in another order than they are called."""

    def __init__(self, *, flat: bool) -> None:
        super().__init__()
        self.last_norm, self.norm, self.first_norm = (nn.LayerNorm(D) for _ in range(3))
        self.gain = nn.Parameter(torch.ones(D))
        if flat:
            self.fc1, self.fc2 = linear(), linear()
        else:
            self.mlp = nn.Sequential(linear(), nn.ReLU(), linear())
        self.attention = nn.Sequential(linear())
        self.flat = flat

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.first_norm(x))
        h = self.norm(x)
        h = self.fc2(self.fc1(h).relu()) if self.flat else self.mlp(h)
        return self.last_norm(x + self.gain * h)


def parts_of(layer: Layer, *, separate: bool) -> list[tuple[str | None, list[str]]]:
    names = [name for name, _ in layer.named_parameters()]
    found = find_parts(
        lambda x, module: module(x), torch.randn(2, 3, D), layer, names, separate=separate
    )
    assert sorted(name for part in found for name in part.parameters) == sorted(names)
    return [(p.child, sorted({name.split(".")[0] for name in p.parameters})) for p in found]


def test_a_norm_belongs_to_the_block_after_it() -> None:
    blocks = [
        ("attention", ["attention", "first_norm"]),
        (None, ["gain", "last_norm", "mlp", "norm"]),
    ]
    assert parts_of(Layer(flat=False), separate=True) == blocks


def test_linear_layers_in_a_row_are_one_block() -> None:
    assert [child for child, _ in parts_of(Layer(flat=True), separate=True)] == ["attention", None]


def test_together_there_is_one_part() -> None:
    assert [child for child, _ in parts_of(Layer(flat=False), separate=False)] == [None]


def test_the_output_of_a_child_is_what_it_returns_inside() -> None:
    torch.manual_seed(0)
    layer = Layer(flat=False)
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(2, 3, D)
    found = output(lambda x, module: module(x), x, layer, "attention")
    assert torch.equal(found, layer.attention(layer.first_norm(x)))
    assert torch.equal(output(lambda x, module: module(x), x, layer, None), layer(x))


def test_massive_tokens_count_no_more_than_the_cap() -> None:
    target = torch.ones(1, 5, D)
    target[0, 0] *= 1e4
    error, whole = squares(1.1 * target, target, 5)
    torch.testing.assert_close(error / whole, torch.tensor(0.01), rtol=1e-3, atol=0)
    torch.testing.assert_close(whole, torch.tensor(float((4 + TOKEN_CAP) * D)))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("places", [("cuda", "cpu"), ("cpu", "cuda")])
def test_hidden_states_may_be_on_several_devices(places: tuple[str, str]) -> None:
    dense, compressed = (torch.randn(4, 3, D).to(place) for place in places)
    data = LayerData(dense, compressed, dense, n_held_out=1, together=3)
    layer = nn.Linear(D, D).cuda()
    fit = LayerFit(lambda x, module: module(x.cuda()), layer, layer, Part(None, ()), data)
    error = fit._error(torch.tensor([1, 2, 3]), torch.tensor([True, False, False]))
    assert float(error) > 0
