"""The runtime of exported checkpoints against the layers of lrc, component by component."""

import pytest
import torch
from torch import Tensor, nn

from lrc.compressors.checkpoint import format as layout
from lrc.compressors.export import modeling_lrc
from lrc.compressors.latency.latency_table import Product
from lrc.compressors.latency.random_layers import random_layer
from lrc.compressors.layers import (
    COMPONENTS,
    ComponentConfig,
    CompressedLinear,
    QuantizationArgs,
    WeightConfig,
    sentinel,
)
from lrc.compressors.layers.model_shapes import TABLES
from lrc.compressors.layers.packed_weight import PackedWeight
from lrc.compressors.layers.packing import pack_integers, unpack_integers

D_OUT, D_IN = 24, 48
SIZES: list[tuple[str, dict[str, int], str | None]] = [
    ("dense", {}, None),
    ("low_rank", {"rank": 16}, None),
    ("pivoted_low_rank", {"rank": 8}, None),
    ("pivoted_low_rank", {"rank": D_OUT}, None),  # every row is a pivot row
    ("sparse", {"nonzeros": 301}, None),
    ("sparse", {"nonzeros": D_OUT * D_IN // 2}, "2:4"),
    ("semi_structured", {"n": 3}, None),
    ("block_sparse", {"groups": 77}, None),
    ("dictionary", {"atoms": 16, "nonzeros": 5}, None),  # with a mask
    ("dictionary", {"atoms": 24, "nonzeros": 1}, None),  # with indices
    ("dictionary", {"atoms": 24, "nonzeros": 12}, "2:4"),
    ("tensor_train", {"bond": 1}, "6x4,8x6"),
    ("tensor_train", {"bond": 2}, "1x24,16x3"),  # the last core is multiplied first
    ("tensor_train", {"bond": 16}, "2x3x4,8x2x3"),
]
SCHEMES = [None, "int2", "int3-g8", "int4-g8", "int5-g8", "int8", "int4-g8-asymmetric"]


def configs() -> list[WeightConfig]:
    """Return every type of component with every scheme that it can have."""
    found = []
    for kind, sizes, pattern in SIZES:
        for scheme in SCHEMES:
            args = None if scheme is None else QuantizationArgs.parse(scheme)
            component = ComponentConfig(kind, sizes, args, pattern)
            config = WeightConfig((D_OUT, D_IN), (component,))
            try:
                WeightConfig.from_json(config.to_json())
            except ValueError:
                continue
            found.append(config)
    return found


def filled(config: WeightConfig, seed: int = 0) -> CompressedLinear:
    generator = torch.Generator().manual_seed(seed)
    (component,) = config.components
    layer = random_layer(Product(config.shape, component), dtype=torch.float32, generator=generator)
    assert isinstance(layer, CompressedLinear)
    for module in layer.modules():
        args = module.packed_args if isinstance(module, PackedWeight) else None
        if isinstance(module, PackedWeight) and args is not None and not args.symmetric:
            tensor = module.get_buffer("weight_zero_point")
            shape = (tensor.shape[1], module.packed_shape[0])
            codes = torch.randint(args.lowest, args.highest + 1, shape, generator=generator)
            tensor.copy_(pack_integers(codes, args.bits).T)  # `random_layer` has zeros
    return layer


def rebuilt(layer: CompressedLinear) -> modeling_lrc.CompressedLinear:
    """Return the layer of the runtime with the same tensors."""
    d_out, d_in = layer.config.shape
    dense = nn.Linear(d_in, d_out, bias=False, device="meta")
    made = modeling_lrc.CompressedLinear(layer.config.to_json(), dense)
    made.load_state_dict(layer.state_dict(), assign=True)  # every name, and no other
    return made


def test_every_term_and_table_is_known() -> None:
    assert modeling_lrc.COMPONENTS.keys() == COMPONENTS.keys()
    assert {kind for kind, _, _ in SIZES} == COMPONENTS.keys()
    keys = {"quant_method", "format_version", "modules", *TABLES}
    assert keys == modeling_lrc.KNOWN
    assert modeling_lrc.FORMAT_VERSION == layout.FORMAT_VERSION


@pytest.mark.parametrize("config", configs(), ids=lambda config: str(config.components[0]))
def test_a_component_multiplies_like_that_of_lrc(config: WeightConfig) -> None:
    layer = filled(config)
    made = rebuilt(layer)
    shapes = {name: (t.shape, t.dtype) for name, t in layer.state_dict().items()}
    empty = modeling_lrc.CompressedLinear(config.to_json(), nn.Linear(D_IN, D_OUT, bias=False))
    assert {name: (t.shape, t.dtype) for name, t in empty.state_dict().items()} == shapes
    for component in made.children():
        if isinstance(component, modeling_lrc.Masked | modeling_lrc.PivotedLowRank):
            assert component.is_consistent()
    for tokens in (1, 100):  # dictionaries are multiplied out for many
        x = torch.randn(2, tokens, D_IN, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            y = made(x)
            assert torch.equal(y, layer(x))
            # Measured 4e-7 of the largest output.
            close = 5e-6 * float(y.abs().max())
            torch.testing.assert_close(y, x @ layer.dense_weight().T, rtol=0, atol=close)


@pytest.mark.parametrize("bits", range(2, 9))
def test_integers_of_every_width_are_unpacked(bits: int) -> None:
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (5, 77), generator=generator)
    packed = pack_integers(codes, bits)
    found = modeling_lrc.unpack_integers(packed, bits, 77)
    assert torch.equal(found, codes.to(torch.int8))
    assert torch.equal(found, unpack_integers(packed, bits, 77))


def test_sums_add_their_components_and_the_bias() -> None:
    config = WeightConfig(
        (D_OUT, D_IN),
        (
            ComponentConfig("low_rank", {"rank": 4}),
            ComponentConfig("sparse", {"nonzeros": 99}, QuantizationArgs.parse("int4")),
        ),
        bias=True,
    )
    parts = [filled(WeightConfig(config.shape, (c,))) for c in config.components]
    state: dict[str, Tensor] = {"bias": torch.randn(D_OUT), "weight": sentinel()}
    for part in parts:
        state |= {name: t for name, t in part.state_dict().items() if name != "weight"}
    dense = nn.Linear(D_IN, D_OUT, bias=False)
    made = modeling_lrc.CompressedLinear(config.to_json(), dense)
    made.load_state_dict(state)
    x = torch.randn(3, D_IN)
    assert torch.equal(made(x), parts[0](x) + parts[1](x) + state["bias"])


@pytest.mark.parametrize("scheme", ["int8", "int3-g8", "int4-g8-asymmetric"])
def test_embeddings_look_up_rows(scheme: str) -> None:
    args = QuantizationArgs.parse(scheme)
    layer = filled(WeightConfig((D_OUT, D_IN), (ComponentConfig("dense", {}, args),)))
    ids = torch.tensor([[0, 5], [23, 5]])
    assert torch.equal(rebuilt(layer)(ids), layer.dense_weight()[ids])


@pytest.mark.parametrize("kind", ["low_rank", "dictionary"])
def test_factors_are_shared(kind: str) -> None:
    sizes = {"rank": 16} if kind == "low_rank" else {"atoms": 24, "nonzeros": 12}
    owner = filled(WeightConfig((D_OUT, D_IN), (ComponentConfig(kind, sizes),)))
    alone = filled(WeightConfig((D_OUT, D_IN), (ComponentConfig(kind, sizes),)), seed=1)
    state = alone.state_dict() | {f"{kind}.a.weight": owner.state_dict()[f"{kind}.a.weight"]}
    alone.load_state_dict(state)
    model = nn.Module()
    model.user, model.owner = (nn.Linear(D_IN, D_OUT, bias=False) for _ in range(2))
    model.all_tied_weights_keys = {}
    share = {"shape": [D_OUT, D_IN], "components": [{"type": kind, **sizes, "shares": "owner"}]}
    block = {"format_version": 2, "modules": {"user": share, "owner": owner.config.to_json()}}
    model.config = type("Config", (), {"hidden_size": D_IN})()
    modeling_lrc.rebuild_(model, block)
    del state[f"{kind}.a.weight"]
    stored = {f"user.{name}": t for name, t in state.items()}
    stored |= {f"owner.{name}": t for name, t in owner.state_dict().items()}
    model.load_state_dict(stored)
    for tokens in (1, 100):
        x = torch.randn(tokens, D_IN)
        assert torch.equal(model.user(x), alone(x))
