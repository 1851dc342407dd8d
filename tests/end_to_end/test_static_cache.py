"""Generation with a static cache compiles one graph, whatever the weights consist of."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import CompileConfig, LlamaForCausalLM

from lrc.compressors.checkpoint.quantizer import replace_layers
from lrc.compressors.kernels import optimize
from lrc.compressors.layers import (
    COMPONENTS,
    Component,
    ComponentConfig,
    QuantizationArgs,
    WeightConfig,
)
from lrc.compressors.layers.bitmask import pack_bits
from lrc.compressors.layers.chain_shape import pattern_for
from lrc.compressors.layers.residual_basis import place_norms_
from lrc.compressors.layers.siblings import share_inputs

Layer = Callable[[int, int], list[ComponentConfig]]


def component(kind: str, args: str | None = None, **sizes: int) -> ComponentConfig:
    return ComponentConfig(kind, sizes, args and QuantizationArgs.parse(args))  # type: ignore[arg-type]


# Components of a linear by its numbers of outputs and inputs.
INTEGERS: Layer = lambda d_out, d_in: [component("dense", "int4-g16")]  # noqa: E731
FACTORS: Layer = lambda d_out, d_in: [component("low_rank", rank=8)]  # noqa: E731
PIVOTS: Layer = lambda d_out, d_in: [component("pivoted_low_rank", rank=8)]  # noqa: E731
DICTIONARY: Layer = lambda d_out, d_in: [component("dictionary", atoms=16, nonzeros=8)]  # noqa: E731
# One for every linear of a layer in turn: a graph of each would take longer to compile.
MODELS: dict[str, list[Layer]] = {
    "nothing": [lambda d_out, d_in: []],
    "factors": [FACTORS],
    "pivots": [PIVOTS],
    "dictionaries": [DICTIONARY],
    "numbers": [
        lambda d_out, d_in: [component("sparse", nonzeros=d_out * d_in // 2)],
        DICTIONARY,
        lambda d_out, d_in: [component("dictionary", atoms=16, nonzeros=1)],  # as indices
        lambda d_out, d_in: [
            component("low_rank", rank=4),
            component("sparse", nonzeros=d_out * d_in // 4),
        ],
        lambda d_out, d_in: [component("semi_structured", n=4)],
        lambda d_out, d_in: [
            ComponentConfig("tensor_train", {"bond": 4}, pattern=pattern_for(d_out, d_in, cores=2))
        ],
    ],
    "integers": [
        INTEGERS,
        lambda d_out, d_in: [component("low_rank", "int8", rank=8)],
        lambda d_out, d_in: [component("pivoted_low_rank", "int4", rank=8)],
        lambda d_out, d_in: [component("block_sparse", "int4-g16", groups=d_out)],
        lambda d_out, d_in: [component("sparse", "int8", nonzeros=d_out * d_in // 2)],
    ],
}


def test_every_component_is_covered() -> None:
    layers = (layer for layers in MODELS.values() for layer in layers)
    assert {c.type for layer in layers for c in layer(32, 32)} == COMPONENTS.keys()


@pytest.fixture
def make(tiny_llama: Callable[..., LlamaForCausalLM]) -> Callable[..., Any]:
    """Make a Llama of one layer whose linears, or embeddings, consist of random components."""

    def model(layers: list[Layer], *names: str, **changes: object) -> Any:
        found: Any = tiny_llama(
            num_hidden_layers=1, eos_token_id=None, pad_token_id=0, **changes
        ).eval()
        table: dict[str, WeightConfig] = {}
        for name, module in found.model.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding) and name.endswith(names or "proj"):
                d_out, d_in = module.weight.shape
                layer = layers[len(table) % len(layers)]
                config = WeightConfig((d_out, d_in), tuple(layer(d_out, d_in)))
                if config.compressed:
                    table[f"model.{name}"] = config
        replace_layers(found, table)
        g = torch.Generator().manual_seed(0)
        for module in found.modules():
            if isinstance(module, Component):
                fill(module, g)
                assert not module.problems()
        optimize(found)
        share_inputs(found)
        return found

    return model


def fill(module: Component, g: torch.Generator) -> None:
    """Give a component random contents without contradictions."""
    for name, parameter in module.named_parameters():
        if name.endswith("_scale"):
            parameter.data.uniform_(0.01, 0.1, generator=g)
        else:
            parameter.data.normal_(std=0.2, generator=g)
    sizes = module.config.sizes
    for name, buffer in module.named_buffers():
        if name.endswith("_packed"):
            buffer.random_(-(2**31), 2**31 - 1, generator=g)
        elif name == "order":
            buffer.copy_(torch.randperm(len(buffer), generator=g))
        elif name == "index":
            buffer.copy_(torch.arange(buffer.shape[1]).expand_as(buffer))
        elif name.endswith("_shape"):
            specs = module.tensors(module.d_out, module.d_in, module.config)
            buffer.copy_(torch.tensor(specs[name.removesuffix("_shape")].shape))
        elif name == "mask" and "n" in sizes:
            places = torch.arange(module.d_in).expand(module.d_out, -1)
            buffer.copy_(pack_bits(places % 8 < sizes["n"]))
        elif name == "mask":
            width = sizes.get("atoms") or (
                module.d_in if "nonzeros" in sizes else module.d_in // 16
            )
            per_row = sizes["nonzeros"] if "atoms" in sizes else sum(sizes.values()) // module.d_out
            buffer.copy_(pack_bits(torch.arange(width).expand(module.d_out, -1) < per_row))


class Graphs:
    """A backend that runs graphs as they are and counts them."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, graph: Any, inputs: Any, **_: Any) -> Any:
        from torch._dynamo.backends.debugging import aot_eager

        self.count += 1
        return aot_eager(graph, inputs)

    def __deepcopy__(self, memo: Any) -> "Graphs":
        return self  # transformers copies what it passes on


@pytest.fixture
def graphs() -> Iterator[Graphs]:
    torch.compiler.reset()
    yield Graphs()
    torch.compiler.reset()


def tokens(n: int) -> Tensor:
    return torch.randint(2, 512, (1, n), generator=torch.Generator().manual_seed(n))


def assert_one_graph(model: Any, graphs: Graphs) -> None:
    """Demand the same tokens as without compilation, by one graph for prompts of any length."""
    config = CompileConfig(fullgraph=True, backend=graphs)
    config._compile_all_devices = True
    for prompt in (tokens(9), tokens(5)):
        expected = model.generate(prompt, max_new_tokens=5, do_sample=False)
        found = model.generate(
            prompt,
            max_new_tokens=14 - prompt.shape[1],
            do_sample=False,
            cache_implementation="static",
            compile_config=config,
        )
        assert torch.equal(found[:, : expected.shape[1]], expected)
    assert graphs.count == 1


@pytest.mark.parametrize("kind", sorted(MODELS.keys() - {"nothing", "dictionaries"}))
def test_every_component_decodes_in_one_graph(make, graphs, kind) -> None:
    assert_one_graph(make(MODELS[kind]), graphs)


@pytest.mark.parametrize("tied", [True, False])
def test_quantized_embeddings_decode_in_one_graph(make, graphs, tied) -> None:
    model = make([INTEGERS], "embed_tokens", tie_word_embeddings=tied)
    assert_one_graph(model, graphs)


def test_norms_that_change_the_basis_decode_in_one_graph(make, graphs) -> None:
    model = make([FACTORS])
    layer = "model.layers.0"
    norms = {
        f"{layer}.input_layernorm": {"writer": f"{layer}.self_attn.o_proj", "rank": 3},
        f"{layer}.post_attention_layernorm": {"writer": f"{layer}.mlp.down_proj", "rank": 2},
        "model.norm": {},
    }
    place_norms_(model, norms)
    for name, parameter in model.named_parameters():
        if name.endswith("shortcut"):
            nn.init.normal_(parameter, std=0.1)
    assert_one_graph(model, graphs)


@pytest.mark.parametrize("kind", ["nothing", "pivots", "dictionaries"])
def test_numbers_of_tokens_do_not_recompile_more_than_a_dense_model(make, graphs, kind) -> None:
    model = make(MODELS[kind])
    compiled = torch.compile(model, fullgraph=True, backend=graphs)
    with torch.no_grad():
        for n in (9, 1, 17, 64, 2):  # as few and as many as make `Dictionary` choose differently
            found = compiled(tokens(n), use_cache=False).logits
            torch.testing.assert_close(found, model(tokens(n), use_cache=False).logits)
    assert graphs.count == 3  # of 9 tokens, of one, of any
