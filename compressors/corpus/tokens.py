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

    With `chat_template` every document is first rendered by the tokenizer's template: messages
    as they are, plain text as one user turn (blank text is left out: it would be an empty turn).

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
    return SEPARATOR.join(
        _rendered(number, document, tokenizer)
        for number, document in enumerate(documents, 1)
        if isinstance(document, list) or document.strip()
    )


def _rendered(number: int, document: Document, tokenizer: "PreTrainedTokenizerBase") -> str:
    messages = document if isinstance(document, list) else [{"role": "user", "content": document}]
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False))
    except Exception as error:  # jinja2 errors, and whatever a template raises itself
        raise DataError(
            f"calibration.chat_template: the tokenizer's template refuses document {number}:"
            f" {error}; repair its messages or set chat_template: false"
        ) from error


def tokenize(text: str, tokenizer: "PreTrainedTokenizerBase") -> Tensor:
    """Tokenize a text in one piece, adding no special token.

    Returns
    -------
    Tensor, shape [n_tokens], int64
    """
    # verbose=False: the text is cut into windows, so its length against the model's does not matter
    encoded = tokenizer(text, add_special_tokens=False, verbose=False)
    return torch.tensor(encoded["input_ids"], dtype=torch.int64)


def default_bos(tokenizer: "PreTrainedTokenizerBase") -> int | None:
    """Return the BOS token if the tokenizer starts every text with it by default.

    Tried on a text rather than read from an attribute: having a BOS token and adding it are two
    things, and post-processors add it without saying so anywhere else.
    """
    probe = tokenizer("a", verbose=False)["input_ids"]
    bos = tokenizer.bos_token_id
    return bos if isinstance(bos, int) and probe and probe[0] == bos else None


def check_vocabulary(tokens: Tensor, embedding: Any) -> None:
    """Refuse tokens that a model's embedding has no row for.

    Raises
    ------
    DataError
    """
    rows, largest = getattr(embedding, "num_embeddings", None), int(tokens.max())
    if isinstance(rows, int) and largest >= rows:  # on a GPU an index error kills the process
        raise DataError(
            f"model.tokenizer: the tokenizer gives token {largest}, the model knows {rows} tokens;"
            " use the tokenizer that belongs to the model"
        )
