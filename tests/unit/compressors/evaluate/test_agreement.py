"""KL divergence and top-1 agreement: the numbers, their errors, their memory."""

import math
from collections import Counter
from collections.abc import Callable
from typing import Any
from weakref import finalize

import pytest
import torch
from torch import Tensor
from torch.nn.functional import kl_div
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lrc.compressors.corpus.windows import Windows
from lrc.compressors.evaluate import agreement as module
from lrc.compressors.evaluate.agreement import Measures, compare_predictions
from lrc.compressors.evaluate.logits import head_gives_logits
from lrc.compressors.evaluate.perplexity import perplexity
from lrc.configs.errors import DataError, ModelError


def windows_of(tokens: Tensor, *, bos: bool = False) -> Windows:
    return Windows(tokens, "text", None, bos, tokens.numel())


@pytest.fixture
def windows() -> Windows:
    return windows_of(torch.randint(2, 512, (3, 40), generator=torch.Generator().manual_seed(1)))


@torch.no_grad()
def straightforward(dense: Any, compressed: Any, tokens: Tensor) -> Tensor:
    """Return the three measures [3, n_windows, length - 1] from full logits, by torch's own KL."""
    p, q = (
        model(input_ids=tokens).logits[:, :-1].double().log_softmax(-1)
        for model in (dense, compressed)
    )
    forward, reverse = (
        kl_div(b, a, reduction="none", log_target=True).sum(-1) for a, b in ((p, q), (q, p))
    )
    return torch.stack([forward, reverse, (p.argmax(-1) == q.argmax(-1)).double()])


def as_list(measures: Measures | None) -> list[float]:
    assert measures is not None
    return list(vars(measures).values())


@pytest.mark.parametrize("piece", [1, 7, 39, 2**10])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_pieces_give_what_full_logits_give(
    tiny_llama: Callable[..., Any],
    tiny_gemma: Callable[..., Any],
    windows: Windows,
    monkeypatch: pytest.MonkeyPatch,
    family: str,
    dtype: torch.dtype,
    piece: int,
) -> None:
    monkeypatch.setattr(module, "PIECE_LOGITS", piece * 512)
    models = [tiny_llama(seed=s) if family == "llama" else tiny_gemma(seed=s) for s in range(2)]
    dense, compressed = (model.to(dtype) for model in models)
    assert head_gives_logits(dense, windows.tokens[0]) == (family == "llama")
    expected = straightforward(dense, compressed, windows.tokens)
    found = compare_predictions(dense, compressed, windows)
    assert as_list(found.mean) == pytest.approx(expected.mean((1, 2)).tolist(), rel=1e-6, abs=1e-6)
    errors = (expected.mean(2).std(1) / math.sqrt(3)).tolist()
    assert as_list(found.stderr) == pytest.approx(errors, rel=1e-5, abs=1e-6)
    assert (found.tokens, found.window, found.windows, found.bos) == (3 * 39, 40, 3, False)
    assert found.dtype == str(dtype).removeprefix("torch.")
    for part in found.positions:
        first, last = part.context
        values = expected[:, :, first - 1 : last]
        assert as_list(part.mean) == pytest.approx(values.mean((1, 2)).tolist(), abs=1e-6)


def test_ranges_of_positions_cover_every_prediction_once(
    tiny_llama: Callable[..., Any], windows: Windows
) -> None:
    found = compare_predictions(tiny_llama(), tiny_llama(seed=1), windows)
    assert [part.context for part in found.positions] == [(1, 1), (2, 3), (4, 10), (11, 39)]
    weights = [last - first + 1 for first, last in (part.context for part in found.positions)]
    total = sum(w * part.mean.forward for w, part in zip(weights, found.positions, strict=True))
    assert total / 39 == pytest.approx(found.mean.forward, rel=1e-9)
    short = windows_of(windows.tokens[:, :2])
    (only,) = compare_predictions(tiny_llama(), tiny_llama(seed=1), short).positions
    assert only.context == (1, 1)


def test_a_model_agrees_with_itself(tiny_llama: Callable[..., Any], windows: Windows) -> None:
    found = compare_predictions(tiny_llama(), tiny_llama(), windows)
    assert found.mean == Measures(forward=0, reverse=0, agreement=1)
    assert found.stderr == Measures(0, 0, 0)
    assert all(part.mean == found.mean for part in found.positions)


def test_one_window_has_no_standard_error(tiny_llama: Callable[..., Any], windows: Windows) -> None:
    first = windows_of(windows.tokens[:1])
    found = compare_predictions(tiny_llama(), tiny_llama(seed=1), first)
    assert found.stderr is None
    assert found.mean.forward > 0
    assert 0 <= found.mean.agreement < 1


def test_the_standard_error_is_the_spread_of_means_of_other_windows(
    tiny_llama: Callable[..., Any],
) -> None:
    """Of many samples of 8 windows, the means scatter as much as the error of each says."""
    tokens = torch.randint(2, 512, (96, 12), generator=torch.Generator().manual_seed(5))
    found = [
        compare_predictions(tiny_llama(), tiny_llama(seed=1), windows_of(part))
        for part in tokens.split(8)
    ]
    means = torch.tensor([each.mean.forward for each in found])
    errors = [each.stderr.forward for each in found if each.stderr is not None]
    assert 0.6 < float(means.std()) / (sum(errors) / len(errors)) < 1.6  # measured: see below


def test_exchanging_the_models_exchanges_the_divergences(
    tiny_llama: Callable[..., Any], windows: Windows
) -> None:
    one, other = tiny_llama(), tiny_llama(seed=1)
    there, back = (compare_predictions(*pair, windows) for pair in ((one, other), (other, one)))
    assert as_list(back.mean) == pytest.approx(
        [there.mean.reverse, there.mean.forward, there.mean.agreement], rel=1e-6
    )


def test_positions_are_those_of_the_perplexity(
    tiny_llama: Callable[..., Any], windows: Windows
) -> None:
    model, with_bos = tiny_llama(), windows_of(windows.tokens, bos=True)
    found = compare_predictions(model, tiny_llama(seed=1), with_bos)
    measured = perplexity(model, with_bos)
    assert (found.tokens, found.window) == (measured.tokens, measured.window) == (3 * 39, 39)


class Peak(TorchDispatchMode):
    """Records the largest number of bytes of new tensors that exist at once."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.bytes = 0
        self._users = Counter[int]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self._use(storage.data_ptr(), storage.nbytes(), 1)
                finalize(tensor, self._use, storage.data_ptr(), storage.nbytes(), -1)
        return out

    def _use(self, place: int, size: int, change: int) -> None:
        before = self._users[place]
        self._users[place] += change
        self.now += size * ((before + change > 0) - (before > 0))
        self.bytes = max(self.bytes, self.now)


def test_a_large_vocabulary_takes_less_than_a_gibibyte_at_any_length(
    tiny_llama: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At most eight tensors of the logits that exist at once, here a sixteenth of their number.

    The logits of 2,048 tokens of a vocabulary of 262,144 would take 2 GiB for each model.
    """
    assert 8 * 4 * module.PIECE_LOGITS < 2**30
    piece = module.PIECE_LOGITS // 16
    monkeypatch.setattr(module, "PIECE_LOGITS", piece)
    small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "head_dim": 2}
    models = [tiny_llama(vocab_size=262_144 // 16, seed=seed, **small) for seed in range(2)]
    peaks = []
    for length in (80, 144):
        tokens = torch.arange(length)[None]
        with Peak() as peak:
            found = compare_predictions(*models, windows_of(tokens))
        assert found.mean.forward > 0
        peaks.append(peak.bytes)
    assert 4 * 4 * piece < peaks[0] < 8 * 4 * piece
    assert peaks[1] - peaks[0] < 4 * piece / 64


def test_the_mode_of_the_models_is_restored_and_progress_is_told(
    tiny_llama: Callable[..., Any], windows: Windows
) -> None:
    steps = []
    models = tiny_llama().train(), tiny_llama(seed=1)

    def on_window(done: int, total: int) -> None:
        assert not any(model.training for model in models)
        steps.append((done, total))
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compare_predictions(*models, windows, on_window=on_window)
    assert steps == [(1, 3), (2, 3)]
    assert [model.training for model in models] == [True, False]


def test_logits_that_are_not_finite_are_named(
    tiny_llama: Callable[..., Any], windows: Windows
) -> None:
    model = tiny_llama()
    windows.tokens[1, 5] = 3
    windows.tokens[0][windows.tokens[0] == 3] = 4
    model.model.embed_tokens.weight.data[3] = torch.inf
    for pair in ((tiny_llama(), model), (model, tiny_llama())):
        with pytest.raises(ModelError, match="window 2 of 3 is not finite"):
            compare_predictions(*pair, windows)


def test_windows_that_a_model_cannot_read_are_refused(
    tiny_llama: Callable[..., Any], windows: Windows
) -> None:
    with pytest.raises(DataError, match="the model has 400"):
        compare_predictions(tiny_llama(), tiny_llama(vocab_size=400), windows)
