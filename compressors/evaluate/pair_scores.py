"""Scores of encoder-decoder models on pairs of texts: perplexity of the targets."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lrc.compressors.corpus.examples import read_examples
from lrc.compressors.corpus.pairs import IGNORED, Pairs, tokenize_pairs
from lrc.compressors.corpus.tokens import check_vocabulary
from lrc.compressors.evaluate.encoder_outputs import sentence_outputs
from lrc.compressors.io.machine import OnStep
from lrc.compressors.models.model_kinds import kind_of
from lrc.configs.errors import ModelError
from lrc.configs.task_data import EvaluationTask


def evaluation_pairs(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: EvaluationTask
) -> Pairs:
    """Read the examples of a task, as tokens for a model, which may be a skeleton."""
    found = read_examples(task, "evaluation", limit=task.samples)
    pairs = tokenize_pairs(found.texts, tokenizer, model, length=task.length)
    check_vocabulary(pairs.tokens, model.get_input_embeddings())
    return pairs


@torch.inference_mode()
def perplexity_metric(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: EvaluationTask,
    on_step: OnStep,
) -> dict[str, Any]:
    """Measure the perplexity of the targets per token, in the form of a metric of lm-eval.

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
    stderr = math.sqrt(spread) / float(tokens.sum())
    return {
        "value": math.exp(mean),
        "stderr": stderr * math.exp(mean) if n > 1 else None,
        "higher_is_better": False,
        "documents": n,
        "version": None,
    }
