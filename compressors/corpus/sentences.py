"""Example texts as padded batches of tokens, for encoders."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lrc.configs.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, eq=False)
class Sentences:
    """Tokens of texts that are padded on the right to a common length."""

    tokens: Tensor
    """[n, length], int64, on the CPU."""
    mask: Tensor
    """[n, length], bool; False for padding."""
    segments: Tensor | None = None
    """[n, length], int64: which of a pair of texts a token belongs to; None if the tokenizer does
    not say."""
    labels: Tensor | None = None
    """[n], int64: classes; None if unknown."""

    @property
    def n_tokens(self) -> int:
        """Number of tokens without padding."""
        return int(self.mask.sum())

    def mask_of(self, x: Tensor) -> Tensor:
        """Return the mask of the positions of ``x`` [..., d], which are all positions."""
        return self.mask

    def __getitem__(self, rows: slice) -> "Sentences":
        """Return some of the texts, as long as they are here."""
        parts = (self.tokens, self.mask, self.segments, self.labels)
        return Sentences(*(None if part is None else part[rows] for part in parts))  # type: ignore[arg-type]

    def batches(self, size: int) -> Iterator["Sentences"]:
        """Yield all texts, at most `size` at a time, by length and with little padding."""
        lengths = self.mask.sum(dim=1)
        for rows in lengths.argsort(stable=True).split(size):
            columns = slice(int(lengths[rows].max()))
            yield Sentences(
                self.tokens[rows, columns],
                self.mask[rows, columns],
                None if self.segments is None else self.segments[rows, columns],
                None if self.labels is None else self.labels[rows],
            )

    def inputs(self, device: str | torch.device) -> dict[str, Tensor]:
        """Return the arguments for the forward of an encoder."""
        found = {"input_ids": self.tokens, "attention_mask": self.mask.long()}
        if self.segments is not None:
            found["token_type_ids"] = self.segments
        return {name: tensor.to(device) for name, tensor in found.items()}


def tokenize_sentences(
    texts: Sequence[tuple[str, ...]],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    length: int,
    labels: Sequence[int] | None = None,
) -> Sentences:
    """Tokenize texts, or pairs of texts, with special tokens, and pad them to the longest.

    Texts are cut to `length` tokens.

    Raises
    ------
    DataError
        If the tokenizer has no padding token.
    """
    if tokenizer.pad_token is None:
        raise DataError(
            "model.tokenizer: has no padding token, which batches of texts need; set pad_token in "
            "its tokenizer_config.json"
        )
    columns = [list(column) for column in zip(*texts, strict=True)]
    found = tokenizer(
        *columns,
        truncation=True,
        max_length=length,
        padding="longest",
        padding_side="right",
        return_tensors="pt",
        verbose=False,
    )
    return Sentences(
        found["input_ids"],
        found["attention_mask"].bool(),
        found.get("token_type_ids"),
        None if labels is None else torch.tensor(labels),
    )
