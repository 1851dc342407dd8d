"""Scores of encoders and encoder-decoder models on the examples of a task.

Accuracy of classifiers, similarity of embeddings, and perplexity of target texts, all in the form
of a metric of lm-eval.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lrc.compressors.corpus.examples import read_examples
from lrc.compressors.corpus.pairs import IGNORED, Pairs, tokenize_pairs
from lrc.compressors.corpus.sentences import Sentences, tokenize_sentences
from lrc.compressors.corpus.tokens import check_vocabulary
from lrc.compressors.evaluate.encoder_outputs import mean_pooled, sentence_outputs
from lrc.compressors.io.finite import all_finite
from lrc.compressors.io.machine import OnStep
from lrc.compressors.models.model_kinds import kind_of
from lrc.configs.errors import ModelError
from lrc.configs.task_data import EvaluationTask


def evaluation_sentences(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: EvaluationTask
) -> Sentences:
    """Read the examples of a task for an encoder, which may be a skeleton."""
    config: Any = model.config
    classes = config.id2label if kind_of(config).classifies else None
    found = read_examples(task, "evaluation", classes=classes, limit=task.samples)
    sentences = tokenize_sentences(found.texts, tokenizer, length=task.length, labels=found.labels)
    check_vocabulary(sentences.tokens, model.get_input_embeddings())
    return sentences


def evaluation_pairs(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: EvaluationTask
) -> Pairs:
    """Read the examples of a task for an encoder-decoder model, which may be a skeleton."""
    found = read_examples(task, "evaluation", limit=task.samples)
    pairs = tokenize_pairs(found.texts, tokenizer, model, length=task.length)
    check_vocabulary(pairs.tokens, model.get_input_embeddings())
    return pairs


@torch.inference_mode()
def accuracy_metric(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: EvaluationTask,
    on_step: OnStep,
) -> dict[str, Any]:
    """Measure the accuracy of a classifier."""
    sentences, kind = evaluation_sentences(model, tokenizer, task), kind_of(model.config)
    correct: list[Tensor] = []
    for part in sentences.batches(task.batch_size):
        assert part.labels is not None
        predicted = sentence_outputs(model, part, kind, model.device).argmax(dim=-1).cpu()
        correct.append(torch.eq(predicted, part.labels).double())
        on_step(task.name, sum(map(len, correct)), len(sentences.tokens))
    return _mean(torch.cat(correct))


@torch.inference_mode()
def similarity_metric(
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
    return _mean(torch.cat(found))


@torch.inference_mode()
def perplexity_metric(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: EvaluationTask,
    on_step: OnStep,
) -> dict[str, Any]:
    """Measure the perplexity of the targets per token.

    The decoder reads the targets themselves (teacher forcing). The standard error is that of the
    mean over tokens as a ratio of sums over examples, times the perplexity (first order).
    """
    pairs, kind = evaluation_pairs(model, tokenizer, task), kind_of(model.config)
    sums: list[Tensor] = []
    counts: list[Tensor] = []
    for part in pairs.batches(task.batch_size):
        logits = sentence_outputs(model, part, kind, model.device).float()
        labels = part.labels.to(logits.device)
        each = cross_entropy(
            logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none"
        )
        sums.append(each.view(labels.shape).double().sum(dim=1).cpu())
        counts.append((part.labels != IGNORED).sum(dim=1).double())
        on_step(task.name, sum(map(len, sums)), len(pairs.labels))
    losses, tokens = torch.cat(sums), torch.cat(counts)
    mean, n = float(losses.sum() / tokens.sum()), len(losses)
    if not mean < math.log(torch.finfo(torch.float64).max):  # nor is it NaN
        raise ModelError(
            f"the mean negative log-likelihood of the targets is {mean} nats a token; compress less"
        )
    residuals = losses - mean * tokens
    spread = float(residuals.square().sum()) * n / max(1, n - 1)
    stderr = math.sqrt(spread) / float(tokens.sum()) * math.exp(mean)
    return _metric(math.exp(mean), stderr, n, higher_is_better=False)


def _mean(values: Tensor) -> dict[str, Any]:
    """Return the mean over examples [n]; the standard error takes their variance as unknown."""
    if not all_finite(values):
        raise ModelError("the outputs of the model are not finite; compress less")
    n = len(values)
    stderr = float(values.std()) / math.sqrt(n) if n > 1 else 0.0
    return _metric(float(values.mean()), stderr, n, higher_is_better=True)


def _metric(value: float, stderr: float, n: int, *, higher_is_better: bool) -> dict[str, Any]:
    """Return a metric of `n` examples; of a single one, there is no standard error."""
    return {
        "value": value,
        "stderr": stderr if n > 1 else None,
        "higher_is_better": higher_is_better,
        "documents": n,
        "version": None,
    }
