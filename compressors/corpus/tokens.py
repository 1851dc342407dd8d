"""Documents -> text -> token ids."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lrc.compressors.corpus.documents import Document
from lrc.configs.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SEPARATOR = "\n\n"
"""Between two documents, as in the perplexity of GPTQ, SliceGPT and SVD-LLM."""


def join_documents(
    documents: Sequence[Document], tokenizer: "PreTrainedTokenizerBase", *, chat_template: bool
) -> str:
    """Join documents by a blank line.

    With `chat_template` every document is first rendered by the tokenizer's template; plain text
    becomes one user turn, and blank text is dropped.

    Raises
    ------
    DataError
        If the tokenizer has no chat template, or the template refuses a conversation.
    """
    if not chat_template:
        return SEPARATOR.join(d for d in documents if isinstance(d, str))
    if not tokenizer.chat_template:
        raise DataError(
            f"calibration.chat_template: the tokenizer ({tokenizer.name_or_path or 'unnamed'}) has"
            " no chat template; set chat_template: false or name the tokenizer of an instruct"
            " model under model.tokenizer"
        )
    rendered = []
    for number, document in enumerate(documents, 1):
        if isinstance(document, str):
            if not document.strip():
                continue
            document = [{"role": "user", "content": document}]
        try:
            rendered.append(str(tokenizer.apply_chat_template(document, tokenize=False)))
        except Exception as error:  # jinja2 errors, and whatever a template raises itself
            raise DataError(
                f"calibration.chat_template: the tokenizer's template refuses document {number}:"
                f" {error}; repair its messages or set chat_template: false"
            ) from error
    return SEPARATOR.join(rendered)


def tokenize(text: str, tokenizer: "PreTrainedTokenizerBase") -> Tensor:
    """Return the tokens [n_tokens] (int64) of a text, without special tokens."""
    # verbose=False: no warning about the length, as the text is cut into windows
    encoded = tokenizer(text, add_special_tokens=False, verbose=False)
    return torch.tensor(encoded["input_ids"], dtype=torch.int64)


def default_bos(tokenizer: "PreTrainedTokenizerBase") -> int | None:
    """Return the BOS token if the tokenizer adds it by default.

    Tried on a text, because no attribute tells whether a post-processor adds it.
    """
    probe = tokenizer("a", verbose=False)["input_ids"]
    bos = tokenizer.bos_token_id
    return bos if isinstance(bos, int) and probe and probe[0] == bos else None


def check_vocabulary(tokens: Tensor, embedding: Any) -> None:
    """Raise `DataError` for tokens that a model's embedding has no row for."""
    rows, largest = getattr(embedding, "num_embeddings", None), int(tokens.max())
    if isinstance(rows, int) and largest >= rows:  # on a GPU an index error kills the process
        raise DataError(
            f"model.tokenizer: the tokenizer gives token {largest}, the model has {rows} tokens;"
            " use the tokenizer that belongs to the model"
        )
