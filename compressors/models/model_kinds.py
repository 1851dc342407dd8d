"""Kinds of models that can be compressed, told from their configs."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_MAPPING_NAMES,
)

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


CAUSAL = ModelKind(AutoModelForCausalLM, "text-generation")
CLASSIFIER = ModelKind(
    AutoModelForSequenceClassification, "text-classification", encoder=True, classifies=True
)
EMBEDDING = ModelKind(AutoModel, "feature-extraction", encoder=True)


def kind_of(config: Any) -> ModelKind:
    """Return the kind of the model that a config describes."""
    return kind_named(
        getattr(config, "architectures", None) or [],
        getattr(config, "model_type", ""),
        decoder=bool(getattr(config, "is_decoder", False)),
    )


def kind_named(architectures: Collection[str], model_type: str, *, decoder: bool) -> ModelKind:
    """Return the kind of a model by its class names and its type.

    Encoders are the types that transformers also has a model of masked tokens for. With `decoder`,
    they are configured to attend to earlier tokens only.
    """
    if decoder or model_type not in MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        return CAUSAL
    tables: dict[ModelKind, Mapping[str, Any]] = {
        CLASSIFIER: MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
        EMBEDDING: MODEL_MAPPING_NAMES,
    }
    for kind, table in tables.items():
        if table.get(model_type) in architectures:
            return kind
    return CAUSAL


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
            f"{where}: {what} is for causal language models, got an encoder; the recipe key "
            "evaluate.task measures encoders"
        )


def longest_input(model: Any) -> int | None:
    """Return the highest number of tokens of an encoder; None if nothing limits it."""
    embeddings = getattr(model.base_model, "embeddings", None)
    positions = getattr(embeddings, "position_embeddings", None)
    if isinstance(positions, nn.Embedding):
        unused = 0 if positions.padding_idx is None else positions.padding_idx + 1  # RoBERTa
        return positions.num_embeddings - unused
    limit = getattr(model.config, "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None
