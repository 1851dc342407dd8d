"""Count the parameters of a model sliced as in the SliceGPT paper.

"20 % slicing" is a fraction of the width, not of the parameters: every block gains a matrix on its
residual branch, and the head is untied, which can outweigh what was removed.
"""

from dataclasses import dataclass
from typing import Any

import torch
from accelerate import init_empty_weights
from transformers import AutoModelForCausalLM, PreTrainedConfig

from lrc.compressors.slicing.families import find_family

MULTIPLE = 8  # the paper's code rounds widths down to it, for tensor cores


@dataclass(frozen=True)
class Count:
    """Stored parameters of a model before and after slicing; tied ones count once."""

    width: int
    dense: int
    sliced: int
    shortcuts: int
    """Part of `sliced`."""


def count_sliced(config: PreTrainedConfig, sparsity: float) -> Count:
    """Count the parameters of a model after a fraction of its width is sliced off.

    As in the code of [1]_: ``k = int((1 - sparsity) * D)``, rounded down; one rotation per block;
    norms without parameters, whose biases are moved to the linears that read them, including the
    head. The head is not sliced, so the last block writes D numbers.

    Parameters
    ----------
    config : PreTrainedConfig
        The model is built without weights.
    sparsity : float
        In [0, 1).

    Raises
    ------
    ModelError
        If the family is unknown.

    References
    ----------
    .. [1] S. Ashkboos et al., "SliceGPT: Compress Large Language Models by Deleting Rows and
       Columns", ICLR 2024. https://arxiv.org/abs/2401.15024
    """
    with init_empty_weights():
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    family = find_family(model)
    D = config.hidden_size
    k = int((1 - sparsity) * D) // MULTIPLE * MULTIPLE
    tied = model.all_tied_weights_keys  # names, because on the meta device none is shared any more
    dense = sum(p.numel() for name, p in model.named_parameters() if name not in tied)
    blocks = family.stream(model)

    def weight(name: str) -> int:
        return int(model.get_submodule(name).weight.numel())

    def bias(name: str) -> int:
        found = getattr(model.get_submodule(name), "bias", None)
        return 0 if found is None else int(found.numel())

    touched, stream = 0, sum(weight(name) for name in family.embeddings) // D * k
    for norm in family.norms(model):
        touched += weight(norm.name) + bias(norm.name)
        for name in norm.readers:
            touched += weight(name) + bias(name)
            width = D if name == family.head else k
            d_out = weight(name) // D
            stream += d_out * width + (d_out if bias(norm.name) else bias(name))
    for block in blocks:
        width = D if block is blocks[-1] else k
        for name in block.writers:
            touched += weight(name) + bias(name)
            stream += (weight(name) + bias(name)) // D * width
    touched += sum(weight(name) for name in family.embeddings)
    if f"{family.head}.weight" in tied:
        touched -= weight(family.head)
    shortcuts = (len(blocks) - 1) * k * k + k * D
    return Count(k, dense, dense - touched + stream + shortcuts, shortcuts)
