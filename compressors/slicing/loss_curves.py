"""What a model's loss rises by, predicted, when an MLP loses channels: a curve for each layer."""

import torch
from torch import Tensor

from lrc.compressors.calibrate import statistics
from lrc.compressors.calibrate.activation_cache import cache_files
from lrc.compressors.slicing.layout import Mlp
from lrc.compressors.slicing.mlp import loss_curve
from lrc.compressors.slicing.slice_method import Work
from lrc.compressors.solvers.linalg import whitening_factor
from lrc.compressors.solvers.moments import Moment

NEEDS = frozenset({"inputs", "whole_inputs", "gradients", "whole_gradients"})


@torch.no_grad()
def mlp_curves(work: Work, mlps: list[Mlp], *, damp: float) -> list[Tensor]:
    """Return for each MLP the loss, nats a token, with 1, 2, ..., d_int of its channels.

    The second-order rise of the loss by an error E of an MLP's last weight alone, inputs and
    gradients taken as independent: ``tr(G E C E^T) / 2`` with the second moments a token of the
    gradients at its output and of its channels, both in the dense model. That is the measure by
    which decompositions with gradients share out ranks.
    """
    architecture, curves = work.architecture, []
    tokens = work.windows()
    with torch.enable_grad():
        statistics.collect(
            architecture,
            work.reader,
            tokens,
            {mlp.output: NEEDS for mlp in mlps},
            work.journal,
            labels=work.labels,
            seed=work.seed,
            device=work.device,
            memory_limit_gib=work.memory_limit_gib,
            on_step=work.on_step,
        )
    for layer, mlp in enumerate(mlps):
        known = statistics.load(work.journal, layer, mlp.output)
        C, G = (_mean(moment, known.n_tokens) for moment in (known.inputs, known.gradients))
        L, _ = whitening_factor(G.to(work.device), damp)
        W = work.reader.read(f"{mlp.output}.weight", device=work.device).double()
        curve = loss_curve(L.T @ W, C.to(work.device), damp=damp)
        curves.append(curve.cpu() / 2)
        work.on_step("widths", layer + 1, len(mlps))
    work.journal.forget("statistics", *cache_files(work.journal))
    return curves


def _mean(moment: Moment | None, n_tokens: int) -> Tensor:
    assert moment is not None, "it was asked for"
    assert moment.full is not None, "it was asked for as a whole"
    return moment.full.double() / n_tokens
