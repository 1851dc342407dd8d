"""Outputs of models of padded texts: logits, and mean-pooled embeddings."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from lrc.compressors.corpus.pairs import Pairs
from lrc.compressors.corpus.sentences import Sentences
from lrc.compressors.models.model_kinds import ModelKind


def sentence_outputs(
    model: Any, part: Sentences | Pairs, kind: ModelKind, device: str | torch.device
) -> Tensor:
    """Return the outputs of a model for some texts.

    Of an encoder [n, n_outputs]: logits of a classifier; embeddings of length 1 otherwise. Of an
    encoder-decoder model, the logits [n, n_target, vocabulary].
    """
    if isinstance(part, Pairs):
        predicted: Tensor = model(**part.inputs(device), use_cache=False).logits
        return predicted
    if kind.classifies:
        logits: Tensor = model(**part.inputs(device)).logits
        return logits
    return mean_pooled(model, part, device)


def mean_pooled(model: Any, part: Sentences, device: str | torch.device) -> Tensor:
    """Return the embeddings [n, d_model] of some texts, scaled to length 1.

    The mean of the last hidden states over the tokens of each text, special tokens included, as in
    Sentence-BERT (https://arxiv.org/abs/1908.10084).
    """
    inputs = part.inputs(device)
    hidden: Tensor = model.base_model(**inputs).last_hidden_state  # [n, length, d_model]
    mask = inputs["attention_mask"][..., None].to(hidden.dtype)
    return normalize((hidden * mask).sum(dim=1) / mask.sum(dim=1), dim=-1)
