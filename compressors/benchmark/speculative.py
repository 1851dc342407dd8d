"""Greedy speculative decoding with static caches; on a GPU a round is one CUDA graph.

In every round a drafter proposes some tokens, one after the other, and its parent reads all of them
in one step. The parent's own choices replace the drafts from the first that differs, so that the
text is the one that the parent writes alone [1]_. The loop of `transformers.generate` launches
every kernel from Python, which takes longer than the kernels of a small model.

References
----------
.. [1] Y. Leviathan et al., "Fast Inference from Transformers via Speculative Decoding", ICML 2023.
   https://arxiv.org/abs/2211.17192
"""

import inspect
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from transformers import StaticCache
from transformers.cache_utils import StaticLayer

from lrc.compressors.benchmark.decoders import WARM_UP, recorded
from lrc.compressors.benchmark.rotary_tables import ConstantTables


class RewindableModel:
    """A model with a static cache that can be read again from an earlier position.

    Parameters
    ----------
    model
        A causal language model of transformers, in eval mode.
    longest : int
        Size of the cache in tokens.

    Raises
    ------
    ValueError
        If the model has other caches than those of full attention.
    """

    def __init__(self, model: Any, longest: int) -> None:
        self._model = model
        names = inspect.signature(model.forward).parameters
        self._takes = {"position_ids", "logits_to_keep"} & names.keys()
        self._cache_name = "cache" if "cache" in names else "past_key_values"
        self._longest = longest
        self._cache = StaticCache(config=model.config, max_cache_len=longest)
        self._layers: list[Any] = self._cache.layers
        others = {type(layer).__name__ for layer in self._layers} - {StaticLayer.__name__}
        if others:
            raise ValueError(
                f"{type(model).__name__} has layers with a {min(others)}, which cannot go back to "
                "an earlier token; speculative decoding needs full attention in all layers"
            )

    def prefill(self, prompt: Tensor) -> Tensor:
        """Read a prompt [1, n] into the emptied cache; return the next token [1, 1]."""
        self._cache.reset()
        return self._forward(prompt, prompt.new_zeros(1), 1)

    def read(self, tokens: Tensor, start: Tensor, *, last: int) -> Tensor:
        """Return the most likely next token after each of the last tokens.

        Nothing depends on numbers on the host, so that the call can be recorded. The mask is given,
        because transformers looks at the length of the cache to choose one.

        Parameters
        ----------
        tokens : Tensor, shape [1, n]
            What the cache contains from `start` on is replaced.
        start : Tensor, shape [1]
            Position of the first token, at most the number of tokens read so far.
        last : int
            Number of positions to predict after.

        Returns
        -------
        Tensor, shape [1, last]
        """
        for layer in self._layers:
            layer.cumulative_length.copy_(start[0])
        rows = start + torch.arange(tokens.shape[1], device=tokens.device)
        columns = torch.arange(self._longest, device=tokens.device)
        dtype = self._model.dtype
        mask = torch.zeros(len(rows), self._longest, dtype=dtype, device=tokens.device)
        mask = mask.masked_fill(columns > rows[:, None], torch.finfo(dtype).min)
        return self._forward(tokens, start, last, attention_mask=mask[None, None])

    def _forward(self, tokens: Tensor, start: Tensor, last: int, **mask: Tensor) -> Tensor:
        positions = start + torch.arange(tokens.shape[1], device=tokens.device)
        options = {"position_ids": positions[None], "logits_to_keep": last}
        found = self._model(
            input_ids=tokens,
            use_cache=True,
            **mask,
            **{self._cache_name: self._cache},
            **{name: options[name] for name in self._takes},
        )
        choices: Tensor = found.logits[:, -last:].argmax(-1)
        return choices


class SpeculativeDecoder:
    """A parent that generates one text greedily with the help of a drafter.

    Parameters
    ----------
    parent, drafter
        Models with the same tokens, in eval mode, on the same device.
    prompt : Tensor, shape [1, n]
        Token ids, at least one. `prefill` reads what the tensor then contains.
    tokens : int
        Number of new tokens.
    drafts : int
        Tokens that the drafter proposes in a round.

    Raises
    ------
    ValueError
        If a model has other layers than those with full attention.
    RuntimeError
        If a round cannot be recorded as a CUDA graph.
    """

    rounds: list[int]
    """Number of accepted drafts of each round, since `prefill`."""
    written: int
    """Number of new tokens so far, which the last round may take above those requested."""

    def __init__(
        self, parent: Any, drafter: Any, prompt: Tensor, *, tokens: int, drafts: int
    ) -> None:
        self.prompt, self._tokens, self._drafts = prompt, tokens, drafts
        # The last round may start one token before the end, and so may those before a recording.
        longest = prompt.shape[1] + max(tokens, (WARM_UP + 2) * (drafts + 1)) + drafts + 1
        models = parent, drafter
        self._parent, self._drafter = (RewindableModel(each, longest) for each in models)
        self._text = prompt.new_zeros(1, longest)
        self._length = prompt.new_zeros(1)
        self._accepted = prompt.new_zeros(1)
        self._repeat = self._round
        if prompt.is_cuda:
            self.prefill()
            for _ in range(WARM_UP):
                self._round()
            with ExitStack() as constant:
                for each in models:
                    constant.enter_context(ConstantTables(each, longest).kept())
                self._repeat = recorded(self._round, prompt.device, "a round")  # type: ignore[assignment]

    def prefill(self) -> None:
        """Read the prompt with both models, and choose the first token."""
        n = self.prompt.shape[1]
        self._text[:, :n].copy_(self.prompt)
        self._text[:, n : n + 1] = self._parent.prefill(self.prompt)
        self._drafter.prefill(self.prompt)
        self._length.fill_(n + 1)
        self.written, self.rounds = 1, []

    def decode(self, tokens: int | None = None) -> None:
        """Run rounds until all tokens are there, or the given number of them."""
        while self.written < (self._tokens if tokens is None else tokens):
            self._repeat()
            accepted = int(self._accepted)
            self.rounds.append(accepted)
            self.written += accepted + 1

    @property
    def new_tokens(self) -> Tensor:
        """The tokens after the prompt [tokens]."""
        n = self.prompt.shape[1]
        return self._text[0, n : n + self._tokens].clone()

    def _round(self) -> None:
        """Draft, verify, and append the accepted drafts and one more token.

        Only tensors change, so that a recording can be repeated. The cache of the parent lacks the
        last token of the text; that of the drafter may lack the one before it too, which is the
        last draft of a round in which all were accepted.
        """
        last = self._length - 1  # [1]
        two = self._text.index_select(1, last + torch.arange(-1, 1, device=last.device))
        found = self._drafter.read(two, last - 1, last=1)
        proposed = [found]
        for number in range(1, self._drafts):
            found = self._drafter.read(found, last + number, last=1)
            proposed.append(found)
        drafts = torch.cat(proposed, 1)  # [1, drafts]
        chosen = self._parent.read(
            torch.cat([two[:, 1:], drafts], 1), last, last=self._drafts + 1
        )  # [1, drafts + 1]
        same = (drafts == chosen[:, :-1]).long()
        self._accepted.copy_(same.cumprod(1).sum(1))
        places = self._length + torch.arange(self._drafts + 1, device=last.device)
        self._text.index_copy_(1, places, chosen)  # what is not accepted is overwritten later
        self._length.add_(self._accepted + 1)


def acceptance_by_position(rounds: list[int], drafts: int) -> list[tuple[int, int]]:
    """Return for every position of a draft how many were accepted, and of how many.

    A draft counts if all before it in the same round were accepted: others are never compared.

    >>> acceptance_by_position([2, 0, 1], drafts=2)
    [(2, 3), (1, 2)]
    """
    return [
        (sum(each > i for each in rounds), sum(each >= i for each in rounds)) for i in range(drafts)
    ]
