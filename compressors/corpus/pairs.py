"""Pairs of a source and a target text as padded batches of tokens, for encoder-decoder models."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from lrc.configs.errors import DataError, ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
"""Label of a position whose prediction does not count, as in transformers."""


@dataclass(frozen=True, eq=False)
class Pairs:
    """Tokens of source and target texts, each padded on the right to a common length.

    The two lengths differ, so that the shape of a tensor tells to which of the texts it belongs.
    """

    sources: Tensor
    """[n, n_source], int64, on the CPU: input of the encoder."""
    source_mask: Tensor
    """[n, n_source], bool; False for padding."""
    inputs_of_decoder: Tensor
    """[n, n_target], int64: the start token, and the target without its last token."""
    labels: Tensor
    """[n, n_target], int64: the target; `IGNORED` for padding, and what is not to be predicted."""
    target_mask: Tensor
    """[n, n_target], bool; False for padding."""

    @property
    def n_source(self) -> int:
        """Positions of a source text."""
        return self.sources.shape[1]

    @property
    def tokens(self) -> Tensor:
        """[n, n_source + n_target], int64: what encoder and decoder read."""
        return torch.cat([self.sources, self.inputs_of_decoder], dim=1)

    @property
    def n_tokens(self) -> int:
        """Number of predicted tokens."""
        return int((self.labels != IGNORED).sum())

    def mask_of(self, x: Tensor) -> Tensor:
        """Return the mask of the positions of ``x`` [..., d], which are of one of the texts."""
        masks = (self.source_mask, self.target_mask)
        return next(mask for mask in masks if mask.numel() * x.shape[-1] == x.numel())

    def __getitem__(self, rows: slice) -> "Pairs":
        """Return some of the pairs, as long as they are here."""
        return Pairs(*(part[rows] for part in vars(self).values()))

    def batches(self, size: int) -> Iterator["Pairs"]:
        """Yield all pairs in order, at most `size` at a time."""
        for start in range(0, len(self.sources), size):
            yield self[start : start + size]

    def inputs(self, device: str | torch.device) -> dict[str, Tensor]:
        """Return the arguments for the forward of an encoder-decoder model.

        Padding of the target needs no mask: the decoder does not see later tokens.
        """
        found = {
            "input_ids": self.sources,
            "attention_mask": self.source_mask.long(),
            "decoder_input_ids": self.inputs_of_decoder,
        }
        return {name: tensor.to(device) for name, tensor in found.items()}


def tokenize_pairs(
    texts: Sequence[tuple[str, ...]],
    tokenizer: "PreTrainedTokenizerBase",
    model: Any,
    *,
    length: int,
) -> Pairs:
    """Tokenize pairs of texts with special tokens, and pad sources and targets to the longest.

    Both are cut to `length` tokens. The `model` shifts the targets to the right.

    Raises
    ------
    DataError
        If the tokenizer has no padding token.
    ModelError
        If the config of the model has no start token or no padding token.
    """
    if tokenizer.pad_token is None:
        raise DataError(
            "model.tokenizer: has no padding token, which batches of texts need; set pad_token in "
            "its tokenizer_config.json"
        )
    sources, targets = (list(column) for column in zip(*texts, strict=True))
    options: Any = {
        "truncation": True,
        "max_length": length,
        "padding": "longest",
        "padding_side": "right",
        "return_tensors": "pt",
        "verbose": False,
    }
    read, written = tokenizer(sources, **options), tokenizer(text_target=targets, **options)
    mask = written["attention_mask"].bool()
    labels = written["input_ids"].masked_fill(~mask, IGNORED)
    try:
        shifted = model.prepare_decoder_input_ids_from_labels(labels=labels)
    except Exception as error:  # of the model class, for values of its config
        raise ModelError(
            "model: its class cannot make the inputs of the decoder from targets "
            f"({type(error).__name__}: {str(error)[:200]}); set decoder_start_token_id and "
            "pad_token_id in its config.json to what the model was trained with"
        ) from error
    return _distinct(
        Pairs(read["input_ids"], read["attention_mask"].bool(), shifted, labels, mask), model
    )


def split_windows(windows: Tensor, model: Any, *, bos: bool) -> Pairs:
    """Split windows of a text in halves: the first is the source, the second the target.

    The source ends with the end token, as in training. The target is a continuation: it has no end,
    and its BOS token, which is there if tokenizers add one, is not predicted.

    Parameters
    ----------
    windows : Tensor, shape [n, length]
    model : PreTrainedModel
        Its config gives the special tokens.
    bos : bool
        Whether windows start with a BOS token.
    """
    n, half = len(windows), source_tokens(windows.shape[1])
    ends = [windows.new_full((n, 1), token) for token in _end_tokens(model)]
    sources = torch.cat([windows[:, :half], *ends], dim=1)
    start = windows.new_full((n, 1), start_token(model))
    first = windows[:, :1] if bos else windows[:, :0]
    labels = torch.cat([first, windows[:, half:]], dim=1)
    shifted = torch.cat([start, labels[:, :-1]], dim=1)
    labels[:, : first.shape[1]] = IGNORED
    everywhere = torch.ones_like(labels, dtype=torch.bool)
    return _distinct(
        Pairs(sources, torch.ones_like(sources, dtype=torch.bool), shifted, labels, everywhere),
        model,
    )


def source_tokens(length: int) -> int:
    """Return how many tokens of a window are the source text."""
    return length // 2


def start_token(model: Any) -> int:
    """Return the token from which the decoder of a model starts; raises `ModelError`."""
    found = getattr(model.config, "decoder_start_token_id", None)
    if not isinstance(found, int):
        raise ModelError(
            "model: its config.json has no decoder_start_token_id, from which its decoder starts; "
            "set it to what the model was trained with"
        )
    return found


def _end_tokens(model: Any) -> list[int]:
    found = getattr(model.config, "eos_token_id", None)
    return [found] if isinstance(found, int) else []


def _distinct(pairs: Pairs, model: Any) -> Pairs:
    """Add a column of padding to the sources if they are as long as the targets."""
    if pairs.n_source != pairs.labels.shape[1]:
        return pairs
    token = getattr(model.config, "pad_token_id", None) or 0
    sources, mask = pad(pairs.sources, (0, 1), value=token), pad(pairs.source_mask, (0, 1))
    return Pairs(sources, mask, pairs.inputs_of_decoder, pairs.labels, pairs.target_mask)
