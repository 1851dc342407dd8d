"""Check that a model can be processed layer by layer, before any of its weights is read.

The model runs on simulated weights, once as a whole, and once layer by layer, as calibration does:
each layer is called again with the arguments recorded on the first batch. The results must agree.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten_with_path, tree_map

from lrc.compressors.calibrate.calibration_context import CalibrationContext
from lrc.compressors.calibrate.encoder_decoder_executor import executor_of
from lrc.compressors.calibrate.layer_calls import LayerCall
from lrc.compressors.calibrate.layer_executor import LayerExecutor
from lrc.compressors.calibrate.replaceable import irreplaceable, is_linear
from lrc.compressors.calibrate.simulated_weights import SimulatedProducts, SimulatedReader
from lrc.compressors.corpus.pairs import Pairs
from lrc.compressors.corpus.sentences import Sentences
from lrc.compressors.evaluate.encoder_outputs import sentence_outputs
from lrc.compressors.io.finite import all_finite
from lrc.compressors.io.journal import Journal
from lrc.compressors.layers.experts import split_modules
from lrc.compressors.models.architecture import Architecture, build, unsupported
from lrc.compressors.models.configuration import first_line
from lrc.compressors.models.source import Source

LENGTH, BATCH, WINDOWS = 8, 2, 5  # two full batches and a smaller one
TOLERANCE = 1e-3  # relative to the largest value


def build_checked(source: Source) -> Architecture:
    """Build the skeleton of a model, and check it with `check_layers`."""
    return check_layers(build(source))


def check_layers(architecture: Architecture) -> Architecture:
    """Check that the layers of a model can be processed one after the other.

    Returns
    -------
    Architecture
        Its linears are those that can be replaced; `Architecture.unused` gives the others.

    Raises
    ------
    ModelError
        If the architecture is not supported, with the reason.
    """
    config = architecture.model.config
    unused = irreplaceable(architecture)
    try:
        with _simulation(architecture, unused) as executor:
            wholes = [_run_whole(executor, rows) for rows in executor.batches]
            reason = _structure(executor, wholes) or _differences(executor, wholes)
            groups = [] if reason else [call.groups for call in executor.calls]
            plain = bool(groups) and all(call.others is None for call in executor.calls)
    except Exception as error:  # modeling code may raise anything
        raise unsupported(config, f"it fails on a short text ({first_line(error)})") from error
    if reason:
        raise unsupported(config, reason)
    for linear in architecture.linears:
        uses = wholes[0].uses.get(linear.name, 0)
        unrouted = uses == 0 and linear.expert is not None
        if uses == 0 and architecture.kind.translates:
            raise unsupported(config, f"its forward does not call {linear.name} for every text")
        if linear.name not in unused and uses != 1 and not unrouted:
            unused[linear.name] = f"is called {uses} times in a forward, not once"
    linears = [linear for linear in architecture.linears if linear.name not in unused]
    if not linears:
        name, why = next(iter(unused.items()))
        raise unsupported(config, f"no linear layer can be replaced: {name} {why}")
    experts = wholes[0].experts
    # The simulated text is too short to reach all experts, and encoders have a mask in every batch.
    plain &= not (experts or architecture.kind.padded)
    plain &= hasattr(architecture.model.get_input_embeddings(), "embedding_dim")
    return replace(
        architecture,
        linears=linears,
        unused=unused,
        experts=experts,
        groups=groups,
        plain_layers=plain,
    )


def simulated_calls(architecture: Architecture) -> list[LayerCall]:
    """Return how a model calls its decoder layers, from simulated weights and a short text."""
    with _simulation(architecture, irreplaceable(architecture)) as executor:
        return executor.calls


def differing_layer(old: Architecture, new: Architecture, kept: Sequence[int]) -> str:
    """Describe the first difference between a model and one that keeps only some of its layers.

    Returns "" if there is none. Layer j of `new` is layer ``kept[j]`` of `old` and must compute the
    same. The first layer's input and the logits are compared too.
    """
    renamed = {f"{new.layer_names[j]}.": f"{old.layer_names[i]}." for j, i in enumerate(kept)}

    def seed_name(name: str) -> str:
        prefix = next((prefix for prefix in renamed if name.startswith(prefix)), "")
        return renamed.get(prefix, "") + name.removeprefix(prefix)

    with (
        _simulation(old, old.unused) as before,
        _simulation(new, irreplaceable(new), seed_name) as after,
    ):
        rows = before.batches[0]
        whole = _run_whole(before, rows)
        embedded = torch.empty(after.shape)
        after.embed_(embedded)
        if not _close(embedded[rows], whole.inputs[0]):
            return "the input of the first layer changes"
        for j, i in enumerate(kept):
            with after.layer(j):
                if not _close(after.apply(j, whole.inputs[i]), whole.outputs[i]):
                    return f"{old.layer_names[i]} computes something else as layer {j}"
        with after.around_layers(head=True):
            logits = after.logits(whole.outputs[-1], before.tokens[rows])
        return "" if _close(logits, whole.results) else "the logits are scaled differently"


@contextmanager
def _simulation(
    architecture: Architecture,
    exact: dict[str, str],
    seed_name: Callable[[str], str] = lambda name: name,
) -> Iterator[LayerExecutor]:
    """Yield an executor of the architecture on simulated weights and random tokens."""
    model, kind = architecture.model, architecture.kind
    texts = _pairs(model) if kind.translates else _sentences(model) if kind.encoder else None
    windows = _tokens(model) if texts is None else texts.tokens
    context = CalibrationContext(
        architecture,
        SimulatedReader(architecture, exact, seed_name),
        lambda: windows,
        Journal(Path()),  # nothing is written
        "cpu",
        memory_limit_gib=1.0,
        seed=0,
        on_step=lambda *_: None,
        sentences=None if texts is None else lambda: texts,
    )
    executor = executor_of(context, batch_tokens=BATCH * windows.shape[1])
    with _cheap(architecture.model), SimulatedProducts(), torch.no_grad():
        yield executor


@contextmanager
def _cheap(model: nn.Module) -> Iterator[None]:
    """Compute recurrences in short chunks, and every product by the function of `nn.Linear`."""
    before = []
    for module in model.modules():
        own = vars(module)
        if isinstance(own.get("chunk_size"), int):  # the cost grows with the size of the chunks
            before.append((own, "chunk_size", own["chunk_size"]))
            own["chunk_size"] = min(own["chunk_size"], LENGTH)
        if isinstance(module, nn.Linear) and is_linear(type(module)) and "forward" not in own:
            before.append((own, "forward", None))
            own["forward"] = MethodType(nn.Linear.forward, module)
    try:
        yield
    finally:
        for own, key, value in before:
            del own[key]
            if value is not None:
                own[key] = value


def _tokens(model: Any) -> Tensor:
    """Return random windows; the first two differ in the last token only."""
    vocabulary = model.get_input_embeddings().num_embeddings
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(vocabulary, (WINDOWS, LENGTH), generator=generator)
    tokens[1, :-1] = tokens[0, :-1]
    # A model may treat these differently, for example leave them out of its attention.
    config = model.config.get_text_config(decoder=True)
    special = [getattr(config, f"{key}_token_id", None) for key in ("pad", "bos", "eos")]
    for position, token in enumerate(special, start=2):
        if isinstance(token, int) and 0 <= token < vocabulary:
            tokens[BATCH, position] = token
    return tokens


def _sentences(model: Any) -> Sentences:
    """Return random texts; the first two differ in a token of padding only.

    In RoBERTa the padding token, which has no position, is among the tokens of the others.
    """
    tokens = _tokens(model)
    mask = torch.ones(tokens.shape, dtype=torch.bool)
    mask[:BATCH, -1] = False
    mask[BATCH, LENGTH // 2 :] = False
    return Sentences(tokens, mask)


def _pairs(model: Any) -> Pairs:
    """Return random pairs; the first two differ in the last tokens only.

    That of the source is padding.
    """
    read = _sentences(model)
    written = read.tokens[:, 1:].flip(0).clone()  # the lengths must differ
    written[1, :-1] = written[0, :-1]
    everywhere = torch.ones(written.shape, dtype=torch.bool)
    return Pairs(read.tokens, read.mask, written, written, everywhere)


@dataclass(frozen=True)
class _Whole:
    """What the decoder layers of the whole model received and returned for one batch."""

    inputs: list[Any]
    outputs: list[Any]
    arguments: list[dict[str, Any]]
    """Other arguments by name or position."""
    uses: dict[str, int]
    """Number of calls of every layer and linear by name."""
    results: Tensor
    """Logits [n, length, vocabulary]; of an encoder, its outputs [n, n_outputs]."""
    experts: dict[str, tuple[int, int]]
    """Name of a module of experts -> their number, and how many of them a token selects."""


def _run_whole(executor: LayerExecutor, rows: slice) -> _Whole:
    """Run the whole model on a batch."""
    architecture, sentences = executor.architecture, executor.sentences
    n_layers = len(architecture.layers)
    inputs, outputs = [None] * n_layers, [None] * n_layers
    arguments: list[dict[str, Any]] = [{} for _ in range(n_layers)]
    uses: dict[str, int] = {}

    def count(name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            uses[name] = uses.get(name, 0) + 1

        return hook

    def before(index: int, layer: nn.Module) -> Callable[..., None]:
        parameters = [*inspect.signature(layer.forward).parameters]

        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            named = dict(zip(parameters, args, strict=False)) | kwargs
            # Copies: some layers add to their inputs in place.
            named = tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, named)
            inputs[index] = named.pop(parameters[0] if args else "hidden_states", None)
            arguments[index] = named

        return hook

    def after(index: int) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, out: Any) -> None:
            outputs[index] = out[0].clone() if isinstance(out, tuple) else out.clone()

        return hook

    experts: dict[str, tuple[int, int]] = {}

    def route(name: str) -> Callable[..., None]:
        def hook(module: Any, args: tuple[Any, ...]) -> None:
            experts[name] = module.n_experts, module.selected(*args)

        return hook

    with ExitStack() as stack:
        stack.enter_context(executor.around_layers(head=True))
        for index, layer in enumerate(architecture.layers):
            stack.enter_context(executor.layer(index))
            stack.enter_context(
                layer.register_forward_pre_hook(before(index, layer), with_kwargs=True)
            )
            stack.enter_context(layer.register_forward_hook(after(index)))
        for name in [*architecture.layer_names, *(each.name for each in architecture.linears)]:
            module = architecture.model.get_submodule(name)
            stack.enter_context(module.register_forward_hook(count(name)))
        for name, module in split_modules(architecture.model):
            stack.enter_context(module.register_forward_pre_hook(route(name)))
        if sentences is None:
            results = architecture.model(input_ids=executor.tokens[rows], use_cache=False).logits
        else:
            kind = architecture.kind
            results = sentence_outputs(architecture.model, sentences[rows], kind, "cpu")
    return _Whole(inputs, outputs, arguments, uses, results, experts)


def _structure(executor: LayerExecutor, wholes: list[_Whole]) -> str:
    """Return what is wrong with the calls and the states of the layers, or ""."""
    whole, names = wholes[0], executor.architecture.layer_names
    for name, states in zip(names, whole.inputs, strict=True):
        uses = whole.uses.get(name, 0)
        if uses != 1:
            return f"its forward calls {name} {uses} times, not once"
        if not isinstance(states, Tensor):
            return f"{name} does not receive hidden states"
        length = len(range(executor.tokens.shape[1])[executor.columns(names.index(name))])
        if states.shape[:-1] != (BATCH, length):
            return (
                f"the hidden states of {name} have the shape {list(states.shape)} for {BATCH} "
                f"windows of {length} tokens, not [{BATCH}, {length}, width]"
            )
    if len(widths := {states.shape[-1] for states in whole.inputs}) > 1:
        return f"its layers have hidden states of different widths, {sorted(widths)}"
    padded = executor.sentences is not None
    for states in (*whole.inputs, whole.results):
        if not all_finite(states):
            return "its hidden states overflow on simulated weights"
        ends = slice(None) if states.ndim == 2 else slice(-1)  # outputs of an encoder
        if not _close(states[0, ends], states[1, ends]):
            if executor.architecture.kind.translates:
                return "its predictions depend on padding or on later tokens"
            if padded:
                return "its outputs depend on padding"
            return "its predictions depend on later tokens: it is not a causal language model"
    return ""


def _differences(executor: LayerExecutor, wholes: list[_Whole]) -> str:
    """Return where layers applied one after the other differ from the whole model, or ""."""
    names, padded = executor.architecture.layer_names, executor.sentences is not None
    pairs = list(zip(executor.batches, wholes, strict=True))
    states = torch.empty(executor.shape)
    executor.embed_(states)
    for index, name in enumerate(names):
        own = states[:, executor.columns(index)]
        if not all(_close(own[rows], whole.inputs[index]) for rows, whole in pairs):
            change = "is changed outside the layers"
            if index == 0:
                change = "differs between two identical runs"
            return _unequal_argument(names, wholes, padded) or f"the input of {name} {change}"
        with executor.layer(index):
            executor.advance_(index, states)
        if index + 1 == executor.architecture.n_encoder:
            continue  # more follows the last layer of an encoder; compared in what its readers give
        if not all(_close(own[rows], whole.outputs[index]) for rows, whole in pairs):
            return _unequal_argument(names, wholes, padded) or (
                f"{name} gives other outputs when it is called again (it keeps state between calls)"
            )
    with executor.around_layers(head=True):
        for rows, whole in pairs:
            if executor.sentences is None:
                results = executor.logits(states[rows], executor.tokens[rows])
            else:
                results = executor.outputs(states[rows], rows)
            if not _close(results, whole.results):
                return (
                    _unequal_argument(names, wholes, padded)
                    or "its outputs depend on more than the output of the last layer"
                )
    return ""


def _unequal_argument(names: list[str], wholes: list[_Whole], padded: bool) -> str:
    """Return which argument of a layer depends on the tokens, or ""."""
    if padded:
        return ""  # its arguments are recorded for every batch
    first, second = wholes[:2]
    for name, before, after in zip(names, first.arguments, second.arguments, strict=True):
        (old, _), (new, _) = tree_flatten_with_path(before), tree_flatten_with_path(after)
        for (path, a), (_, b) in zip(old, new, strict=False):
            if isinstance(a, Tensor) and not _close(a.float(), b):
                key = getattr(path[0], "key", "")
                return f"{name} receives {key!r}, which depends on the tokens or on other layers"
    return ""


def _close(a: Tensor, b: Any) -> bool:
    """Whether two tensors are equal except for rounding."""
    if not isinstance(b, Tensor) or a.shape != b.shape:
        return False
    a, b = a.float(), b.float()
    finite = b[b.isfinite()].abs()
    limit = TOLERANCE * float(finite.max()) if finite.numel() else 0.0
    return torch.allclose(a, b, rtol=0, atol=limit)  # equal infinities, as in masks, agree
