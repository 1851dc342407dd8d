"""Kinds of models that can be compressed, told from their configs."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_MAPPING_NAMES,
)

from lrc.compressors.models.auto_class import auto_class
from lrc.configs.errors import ModelError


@dataclass(frozen=True)
class ModelKind:
    """What a model computes, and the class of transformers that loads it."""

    auto_class: Any
    pipeline: str
    """Name of the task on the Hub."""
    encoder: bool = False
    """Whether tokens see those after them, so that texts are padded and come with a mask."""
    classifies: bool = False
    """Whether the outputs are logits of classes."""
    translates: bool = False
    """Whether it is an encoder-decoder model: an encoder reads a source text, and a decoder
    predicts the next token of a target text."""

    @property
    def padded(self) -> bool:
        """Whether texts are padded and come with a mask, instead of being windows of one length."""
        return self.encoder or self.translates


CAUSAL = ModelKind(AutoModelForCausalLM, "text-generation")
IMAGES = ModelKind(AutoModelForImageTextToText, "image-text-to-text")
MULTIMODAL = ModelKind(AutoModelForMultimodalLM, "any-to-any")
CLASSIFIER = ModelKind(
    AutoModelForSequenceClassification, "text-classification", encoder=True, classifies=True
)
EMBEDDING = ModelKind(AutoModel, "feature-extraction", encoder=True)
ENCODER_DECODER = ModelKind(AutoModelForSeq2SeqLM, "text2text-generation", translates=True)
PREDICTING = {kind.auto_class: kind for kind in (CAUSAL, IMAGES, MULTIMODAL)}
"""Kinds that predict the next token."""


def kind_of(config: Mapping[str, Any] | PreTrainedConfig) -> ModelKind:
    """Return the kind of the model that a config describes; `CAUSAL` if transformers has no class.

    Encoder-decoder models are those whose config says so, and that predict tokens. Encoders are the
    types that transformers also has a model of masked tokens for, unless their config says that
    tokens attend to earlier ones only.

    Parameters
    ----------
    config : mapping or PreTrainedConfig
        The content of its ``config.json``, or the config that was read from it.
    """
    raw = isinstance(config, Mapping)
    saved, model_type, decoder, both = (
        config.get(key) if raw else getattr(config, key, None)
        for key in ("architectures", "model_type", "is_decoder", "is_encoder_decoder")
    )
    model_type = str(model_type)
    predicting = MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES.get(model_type)
    if both and predicting is not None and predicting in (saved or [predicting]):
        return ENCODER_DECODER
    if not decoder and model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        tables: dict[ModelKind, Mapping[str, Any]] = {
            CLASSIFIER: MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
            EMBEDDING: MODEL_MAPPING_NAMES,
        }
        for kind, table in tables.items():
            if table.get(model_type) in (saved or []):
                return kind
    return PREDICTING.get(auto_class(config), CAUSAL)


def problem_type(config: Any, kind: ModelKind) -> str:
    """Return the name of transformers for the loss of a classifier; "" of other models.

    Unless the config names it, it follows from the number of outputs, as in transformers.
    """
    if not kind.classifies:
        return ""
    single = "regression" if config.num_labels == 1 else "single_label_classification"
    return getattr(config, "problem_type", None) or single


def refuse_encoder(kind: ModelKind, where: str, what: str) -> None:
    """Raise `ModelError` if a model is an encoder, which `what` does not support."""
    if kind.encoder:
        raise ModelError(
            f"{where}: {what} is for causal language models, got an encoder; 'lrc compress' "
            "measures encoders, on the task that its recipe has under 'evaluate'"
        )


def refuse_encoder_decoder(
    kind: ModelKind,
    where: str,
    what: str,
    remedy: str = "'lrc eval' and 'lrc generate' support these",
) -> None:
    """Raise `ModelError` if a model is an encoder-decoder model, which `what` does not support."""
    if kind.translates:
        raise ModelError(
            f"{where}: {what} is for decoder-only models, got an encoder-decoder model; {remedy}"
        )


def longest_input(model: Any) -> int | None:
    """Return the highest number of tokens of a text; None if nothing limits it."""
    embeddings = getattr(model.base_model, "embeddings", None)
    positions = getattr(embeddings, "position_embeddings", None)
    if isinstance(positions, nn.Embedding):
        unused = 0 if positions.padding_idx is None else positions.padding_idx + 1  # RoBERTa
        return positions.num_embeddings - unused
    limit = getattr(model.config, "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None
