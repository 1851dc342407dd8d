"""SliceGPT with one rotation for the whole model, so that what is left is a plain smaller model.

A rotation of its own for every block fits each better, but leaves a D x D matrix on every residual
branch, which no stock class has and which weighs more than slicing takes away from small models.
One rotation needs none: a smaller `hidden_size` is all that changes.

The width of the norms. Fused, a norm of the dense model computes ``x / sqrt(|x|^2 / D + eps)``.
The slice ``z = Q_k^T x`` has k numbers, and the stock class would divide its squares by k. The
stream therefore carries ``y = sqrt(k / D) z``: then ``|y|^2 / k == |z|^2 / D``, and
``sqrt(D / k) y / sqrt(|y|^2 / k + eps) == z / sqrt(|z|^2 / D + eps)`` with the same `eps`. The
factor ``sqrt(D / k)`` goes into the linears behind the norm, rather than into its weight, whose
rounding to 16 bits all of them would share; norm weights become ones.
"""

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from lrc.compressors.calibrate.states import LIVE
from lrc.compressors.calibrate.stream import apply
from lrc.compressors.calibrate.sums import Sums
from lrc.compressors.linalg import tensor_cores
from lrc.compressors.models.architecture import Architecture
from lrc.compressors.slicing.ascent import Ascent
from lrc.compressors.slicing.families import Family, Norm, find_family
from lrc.compressors.slicing.method import Budget, Sliced, SliceMethod, Work
from lrc.compressors.slicing.rotation import principal_axes
from lrc.configs.errors import ModelError, RecipeError
from lrc.configs.slicing import SliceBase
from lrc.configs.slicing import Slicegpt as Options

PLAIN = ("llama", "mistral", "qwen2", "qwen3")
"""Families whose stock classes hold a sliced model: RMSNorm, and a `head_dim` of their own."""
ROWS = 8192  # of a matrix that are in float64 at one time: an embedding is large


class Slicegpt(SliceMethod):
    """Keeps the principal components of the residual stream.

    After [1]_, which rotates every block differently; see the module. The second
    moment is summed over the inputs of all norms, each token divided by its root mean square: that
    is what the linears behind a norm see of it. The plain sum is that of the last layers and of a
    few tokens, whose states are a hundred times as large: the first 24 of the 61 norms of
    SmolLM2-135M add less than 0.1 % to it. Of its 576 dimensions 504 (432) then leave perplexity
    28.97 (64.32) on python-docs, and tokens that count alike 25.46 (44.34); dense it has 18.17.

    References
    ----------
    .. [1] S. Ashkboos et al., "SliceGPT: Compress Large Language Models by Deleting Rows and
       Columns", ICLR 2024. https://arxiv.org/abs/2401.15024
    """

    source = "SliceGPT, ICLR 2024, https://arxiv.org/abs/2401.15024"
    reads_text = True

    def plan(
        self, architecture: Architecture, options: SliceBase, budget: Budget
    ) -> PreTrainedConfig:
        """Return the config of the widest smaller model within the budget.

        Raises
        ------
        RecipeError
        """
        assert isinstance(options, Options)
        config = architecture.model.config
        roles = _Roles(architecture, _find_plain_family(architecture, budget))
        D = config.hidden_size
        step = options.multiple
        if config.model_type == "llama":  # LlamaConfig refuses widths that are no multiple of heads
            step = math.lcm(step, config.num_attention_heads)
        widths = [k for k in (*range(step, D, step), D) if roles.bytes(k) <= budget.bytes]
        words = f"the dense model has {budget.dense_bytes} bytes"
        if roles.untied:
            words += (
                f", this one needs a head of its own, and so has {roles.bytes(D)} at the full "
                f"width of {D}"
            )
        if not widths:
            least = min(step, D)
            raise RecipeError(
                [
                    f"{budget.where}: at most {budget.bytes} bytes are allowed, but sliced to its "
                    f"smallest width of {least} (a multiple of {step}) the model has "
                    f"{roles.bytes(least)}; {words}; allow more bytes, or slice with 'drop'"
                ]
            )
        k = widths[-1]
        if roles.bytes(k) > budget.dense_bytes:
            raise RecipeError(
                [
                    f"{budget.where}: the model would only grow: the dense model has "
                    f"{budget.dense_bytes} bytes; sliced it needs a head of its own, and has "
                    f"{roles.bytes(k)} at {k} of {D}, its widest within {budget.bytes}; allow at "
                    f"most {budget.dense_bytes} bytes, or slice with 'modegpt' or 'drop', which "
                    "leave the head tied"
                ]
            )
        return _narrowed(config, k)

    def carry_out(self, work: Work, options: SliceBase, config: PreTrainedConfig) -> Sliced:
        """Find the axes on the calibration text, then slice one tensor after the other.

        Raises
        ------
        ModelError
            If the residual stream is not finite.
        """
        assert isinstance(options, Options)
        family = find_family(work.architecture.model)
        moment = stream_moment(work, family)
        Q, _ = principal_axes(moment)
        D, k = len(Q), config.hidden_size
        kept = (Q[:, :k] * (moment @ Q[:, :k])).sum() / moment.diagonal().sum()
        untied = f"{family.head}.weight" in work.architecture.tied
        facts = {
            "width": k,
            "dense_width": D,
            "stream_energy_kept": float(kept),
            "head_untied": untied,
        }
        final = _narrowed(work.architecture.model.config, k)
        return Sliced(final, _slice(work, family, Q[:, :k]), facts)


def _find_plain_family(architecture: Architecture, budget: Budget) -> Family:
    where = f"{budget.where.rpartition('.')[0]}.method"
    try:
        family = find_family(architecture.model)
    except ModelError as error:
        raise RecipeError([f"{where}: {str(error).removeprefix('model: ')}"]) from error
    kind = architecture.model.config.model_type
    if kind not in PLAIN:
        reason = (
            "its LayerNorm would subtract the mean of what is left of the residual stream"
            if family.layer_norm
            else "its classes compute with the width of the residual stream"
        )
        raise RecipeError(
            [
                f"{where}: 'slicegpt' gives plain models of {', '.join(PLAIN)} only, not of "
                f"{kind!r}: {reason}; slice with 'modegpt' or 'drop'"
            ]
        )
    return family


def _narrowed(config: Any, width: int) -> PreTrainedConfig:
    """Return the config of a sliced model; what was derived from the width is written out."""
    narrow = copy.deepcopy(config)
    heads = config.num_attention_heads
    narrow.head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    narrow.hidden_size = width
    narrow.tie_word_embeddings = False
    assert isinstance(narrow, PreTrainedConfig)
    return narrow


class _Roles:
    """What every stored parameter of the dense model is to the residual stream."""

    def __init__(self, architecture: Architecture, family: Family) -> None:
        model = architecture.model
        self.dense: dict[str, Tensor] = model.state_dict(keep_vars=True)
        self.untied = f"{family.head}.weight" in architecture.tied
        self.source = {name: architecture.tied.get(name, name) for name in self.dense}
        self.width: int = model.config.hidden_size
        norms = family.norms(model)
        self.norms = {f"{norm.name}.weight" for norm in norms}
        self.behind = {f"{name}.weight": norm for norm in norms for name in norm.readers}
        """Weight of a reader -> its norm."""
        self.embeddings = {f"{name}.weight" for name in family.embeddings}
        blocks = family.stream(model)
        self.writers = {
            f"{name}.{leaf}"
            for block in blocks
            for name in block.writers
            for leaf in ("weight", "bias")
        }

    def bytes(self, width: int) -> int:
        """Return what the tensors of a model of this width take: each is linear in it."""
        touched = {*self.norms, *self.behind, *self.embeddings, *self.writers}
        total = 0
        for name, tensor in self.dense.items():
            n = tensor.numel() // self.width * width if name in touched else tensor.numel()
            total += n * tensor.dtype.itemsize
        return total


@torch.no_grad()
def stream_moment(work: Work, family: Family) -> Tensor:
    """Return the second moment [D, D] of the residual stream, as it enters the norms.

    Every token counts alike at every norm: it is divided by its root mean square.

    Raises
    ------
    ModelError
        If it is not finite; names the layer.
    """
    architecture, tokens = work.architecture, work.windows()
    n_layers = len(architecture.layers)
    norms = family.norms(architecture.model)
    fast = tensor_cores() if work.device.startswith("cuda") else nullcontext()
    sums = Sums()

    def see(x: Tensor) -> None:
        x = x.reshape(-1, x.shape[-1]).float()  # [n_tokens, D]
        scale = x.square().mean(-1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny).rsqrt()
        sums.add_square("stream", x * scale)

    with fast:
        up = Ascent.begin(work, tokens)
        states, width = up.states, up.states.shape[-1]
        total = torch.zeros(width, width, dtype=torch.float64)
        for index, call in enumerate(up.calls):
            name = architecture.layer_names[index]
            inside = [norm for norm in norms if norm.name.startswith(f"{name}.")]
            with up.stream.layer(index) as layer, _watched(architecture, inside, see):
                for rows in up.rows():
                    states[rows] = apply(layer, call, states[rows].to(work.device))
            if index == n_layers - 1:  # the norm before the head, which no layer holds
                for rows in up.rows():
                    see(states[rows].to(work.device))
            # A layer's sum is one of float32; that of all of them need not be.
            total += sums.pop("stream").double().cpu()
            if not bool(torch.isfinite(total).all()):
                raise ModelError(
                    f"model: the residual stream is not finite in {name} on the calibration text; "
                    "its weights are damaged or overflow: check the source model"
                )
            work.on_step("slice", index + 1, n_layers)
    del states, up
    work.journal.forget(f"states{LIVE}")
    return total


@contextmanager
def _watched(
    architecture: Architecture, norms: list[Norm], see: Callable[[Tensor], None]
) -> Iterator[None]:
    """Show what some norms are given."""

    def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        see(args[0])

    modules = [architecture.model.get_submodule(norm.name) for norm in norms]
    hooks = [module.register_forward_pre_hook(hook) for module in modules]
    try:
        yield
    finally:
        for one in hooks:
            one.remove()


@torch.no_grad()
def _slice(work: Work, family: Family, Q: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Read one tensor of the dense model after the other; yield it on the axes `Q` [D, k]."""
    roles = _Roles(work.architecture, family)
    D, k = Q.shape
    Q = Q.to(work.device)
    gauge = math.sqrt(k / D)
    for name, parameter in roles.dense.items():
        if name in roles.norms:
            yield name, torch.ones(k, dtype=parameter.dtype)
            continue
        W = work.reader.read(roles.source[name], device=work.device)
        if name in roles.behind:
            norm = work.reader.read(f"{roles.behind[name].name}.weight", device=work.device)
            scale = norm.double() + family.weight_offset  # [D]
            W = _times(W, scale[:, None] * Q / gauge)  # [d_out, k]
        elif name in roles.embeddings:
            W = _times(W, Q * gauge)  # [vocabulary, k]
        elif name in roles.writers:  # a bias as the one column it is
            columns = W[:, None] if W.ndim == 1 else W  # [D, d_in]
            W = _times(columns.T, Q * gauge).T.reshape(k, *W.shape[1:])  # [k, d_in]
        yield name, W.cpu().contiguous()


def _times(W: Tensor, Q: Tensor) -> Tensor:
    """Return ``W @ Q`` at the precision of `W`, calculated in float64, some rows at a time."""
    return torch.cat([(rows.double() @ Q).to(W.dtype) for rows in W.split(ROWS)])
