"""Scores of encoders on examples of a task: accuracy, and similarity of embeddings."""

import math
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lrc.compressors.corpus.examples import read_examples
from lrc.compressors.corpus.sentences import Sentences, tokenize_sentences
from lrc.compressors.corpus.tokens import check_vocabulary
from lrc.compressors.evaluate.encoder_outputs import mean_pooled, sentence_outputs
from lrc.compressors.io.machine import OnStep
from lrc.compressors.models.model_kinds import kind_of
from lrc.configs.errors import ModelError
from lrc.configs.task_data import EvaluationTask


def evaluation_sentences(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: EvaluationTask
) -> Sentences:
    """Read the examples of a task, as tokens for a model, which may be a skeleton."""
    config: Any = model.config
    classes = config.id2label if kind_of(config).classifies else None
    found = read_examples(task, "evaluation", classes=classes, limit=task.samples)
    sentences = tokenize_sentences(found.texts, tokenizer, length=task.length, labels=found.labels)
    check_vocabulary(sentences.tokens, model.get_input_embeddings())
    return sentences


@torch.inference_mode()
def accuracy_entry(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: EvaluationTask,
    on_step: OnStep,
) -> dict[str, Any]:
    """Measure the accuracy of a classifier, in the form of a metric of lm-eval.

    The standard error is that of a mean of 0s and 1s with an unknown variance.
    """
    sentences, kind = evaluation_sentences(model, tokenizer, task), kind_of(model.config)
    correct: list[Tensor] = []
    for part in sentences.batches(task.batch_size):
        assert part.labels is not None
        predicted = sentence_outputs(model, part, kind, model.device).argmax(dim=-1).cpu()
        correct.append(torch.eq(predicted, part.labels).double())
        on_step(task.name, sum(map(len, correct)), len(sentences.tokens))
    return _entry(torch.cat(correct))


@torch.inference_mode()
def similarity_entry(
    dense: PreTrainedModel,
    compressed: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: EvaluationTask,
    on_step: OnStep,
) -> dict[str, Any]:
    """Measure the mean cosine similarity of the embeddings of two encoders, see `mean_pooled`."""
    sentences = evaluation_sentences(compressed, tokenizer, task)
    found: list[Tensor] = []
    for part in sentences.batches(task.batch_size):
        one, other = (mean_pooled(m, part, m.device).double().cpu() for m in (dense, compressed))
        found.append((one * other).sum(dim=-1))
        on_step(f"similarity {task.name}", sum(map(len, found)), len(sentences.tokens))
    return _entry(torch.cat(found))


def _entry(values: Tensor) -> dict[str, Any]:
    """Return a mean over examples [n] with its standard error, None for one example."""
    if not bool(values.isfinite().all()):
        raise ModelError("the outputs of the model are not finite; compress less")
    count = len(values)
    error = float(values.std()) / math.sqrt(count) if count > 1 else None
    return {
        "value": float(values.mean()),
        "stderr": error,
        "higher_is_better": True,
        "documents": count,
        "version": None,
    }
