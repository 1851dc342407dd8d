"""What is measured: valid layers of every component, and a complete table."""

import pytest
import torch

from lrc.compressors.latency import product_timing
from lrc.compressors.latency.latency_table import LatencyTable, Product
from lrc.compressors.latency.product_timing import measure_table
from lrc.compressors.latency.random_layers import random_layer
from lrc.compressors.layers import ComponentConfig, CompressedLinear, QuantizationArgs

INT4, INT3, INT8 = (
    QuantizationArgs.parse(text) for text in ("int4-g8", "int3-g8-asymmetric", "int8")
)
SHAPE = (24, 40)
COMPONENTS = {
    "int8": ComponentConfig("dense", {}, INT8),
    "int3, asymmetric": ComponentConfig("dense", {}, INT3),
    "factors": ComponentConfig("low_rank", {"rank": 8}),
    "int4 factors": ComponentConfig("low_rank", {"rank": 8}, INT4),
    "pivoted": ComponentConfig("pivoted_low_rank", {"rank": 8}),
    "complete pivoted": ComponentConfig("pivoted_low_rank", {"rank": 24}),
    "sparse": ComponentConfig("sparse", {"nonzeros": 333}),
    "int4 sparse": ComponentConfig("sparse", {"nonzeros": 333}, INT4),
    "2:4": ComponentConfig("sparse", {"nonzeros": 480}, pattern="2:4"),
    "3:8": ComponentConfig("semi_structured", {"n": 3}),
    "int4 3:8": ComponentConfig("semi_structured", {"n": 3}, INT4),
    "dictionary, by indices": ComponentConfig("dictionary", {"atoms": 24, "nonzeros": 1}),
    "dictionary, by a mask": ComponentConfig("dictionary", {"atoms": 20, "nonzeros": 6}),
    "dictionary, 2:4": ComponentConfig("dictionary", {"atoms": 8, "nonzeros": 4}, pattern="2:4"),
    "block-sparse": ComponentConfig("block_sparse", {"groups": 50}, INT4),
}


@pytest.mark.parametrize("case", COMPONENTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_random_layers_are_as_valid_as_loaded_ones(case: str, dtype: torch.dtype) -> None:
    product = Product(SHAPE, COMPONENTS[case])
    generator = torch.Generator().manual_seed(0)
    layer = random_layer(product, dtype=dtype, generator=generator)
    assert isinstance(layer, CompressedLinear)
    assert layer.problems() == []
    y = layer(torch.ones(1, 1, SHAPE[1], dtype=dtype))
    assert y.shape == (1, 1, SHAPE[0])
    assert y.dtype == dtype
    assert not y.requires_grad
    assert bool(torch.isfinite(y).all())
    assert bool(y.any())


def test_a_table_has_every_product_and_the_dense_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(product_timing, "CACHES", {"cpu": 1})
    monkeypatch.setattr(product_timing, "HOPELESS", 1e9)
    monkeypatch.setattr(product_timing, "BATCH", 10_000)  # several batches
    products = [Product(SHAPE, each) for each in COMPONENTS.values()]
    products.append(Product((8, 8), ComponentConfig("low_rank", {"rank": 2})))
    steps: list[tuple[int, int]] = []
    table = measure_table(
        products,
        device="cpu",
        dtype=torch.float32,
        rows=2,
        on_step=lambda _, done, total: steps.append((done, total)),
    )
    assert table.missing([*products, Product(SHAPE), Product((8, 8))]) == []
    assert table.curves[SHAPE, "pivoted_low_rank"].sizes == (8, 24)
    assert (table.dtype, table.rows, table.threads) == ("float32", 2, torch.get_num_threads())
    assert table.versions.keys() == {"lrc", "torch"}
    assert LatencyTable.from_json(table.to_json()) == table
    assert steps[-1] == (len(products) + 2, len(products) + 2)


def test_sizes_above_a_hopeless_one_are_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(product_timing, "CACHES", {"cpu": 1})
    monkeypatch.setattr(product_timing, "HOPELESS", 0.0)
    products = [Product(SHAPE, ComponentConfig("low_rank", {"rank": r})) for r in (8, 2, 4)]
    table = measure_table(products, device="cpu", dtype=torch.float32, rows=1)
    assert table.curves[SHAPE, "low_rank"].sizes == (2,)
