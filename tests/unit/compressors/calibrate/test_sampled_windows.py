"""Text that a model writes itself."""

import pytest
import torch

from lrc.compressors.calibrate.sampled_windows import (
    draw,
    loaded_by_layer,
    sample_windows,
    windows_together,
)
from lrc.compressors.io.machine import no_progress
from lrc.compressors.models.architecture import build
from lrc.compressors.models.source import locate
from lrc.compressors.models.weights import WeightReader
from lrc.configs.recipe import Model


def sample(model, *, seed=0, together=16, bos=None, shape=(7, 12), starts=None):
    generator = torch.Generator().manual_seed(seed)
    options = {"bos": bos, "on_step": no_progress, "together": together, "starts": starts}
    return sample_windows(model, shape, generator=generator, **options)


def test_tokens_are_drawn_with_their_probabilities():
    logits = torch.tensor([0.1, 0.0, 0.6, 0.3]).log()  # a probability of 0 is never drawn
    uniform = (torch.arange(1000).double() + 0.5) / 1000
    counts = draw(logits.expand(1000, 4), uniform).bincount(minlength=4)
    assert counts.tolist() == [100, 0, 600, 300]
    almost_one = torch.tensor([1 - 2**-53], dtype=torch.float64)
    assert draw(torch.tensor([[0.0, 0.0, -200.0]]), almost_one).tolist() == [1]


def test_windows_do_not_depend_on_the_batch_but_on_the_seed(tiny_llama):
    model = tiny_llama().eval()
    windows = sample(model)
    assert torch.equal(windows, sample(model, together=3))
    assert not torch.equal(windows, sample(model, seed=1))
    assert windows[:, 0].unique().numel() > 1
    assert sample(model, bos=5)[:, 0].tolist() == [5] * 7


def test_windows_are_those_of_the_predictions_of_the_whole_model(tiny_llama):
    model = tiny_llama().eval()
    windows = sample(model)
    generator = torch.Generator().manual_seed(0)
    torch.randint(model.config.vocab_size, (7,), generator=generator)
    drawn = torch.rand(7, 12, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        logits = model(windows).logits  # without a cache
    for last in range(11):
        assert torch.equal(draw(logits[:, last], drawn[:, last]), windows[:, last + 1])


def test_starts_are_continued_as_if_the_model_had_written_them(tiny_llama):
    model = tiny_llama().eval()
    windows = sample(model)
    assert torch.equal(sample(model, starts=windows[:, :5], together=3), windows)
    others = sample(model, seed=1)
    assert torch.equal(sample(model, starts=others[:, :5])[:, :5], others[:, :5])


@pytest.mark.parametrize("tied", [True, False])
def test_layer_by_layer_the_text_is_the_same(tiny_llama, tmp_path, tied):
    model = tiny_llama(tie_word_embeddings=tied).eval()
    model.save_pretrained(tmp_path)
    architecture = build(locate(Model(path=str(tmp_path), dtype="float32")))
    reader, loads = WeightReader(tmp_path, architecture), []
    fill = reader.fill_

    def counted(name, **options):
        loaded = [p for layer in architecture.layers for p in layer.parameters() if not p.is_meta]
        assert not loaded
        loads.append(name)
        fill(name, **options)

    reader.fill_ = counted
    options = {"device": "cpu", "dtype": torch.float32}
    with loaded_by_layer(architecture, reader, **options) as skeleton:
        assert torch.equal(sample(skeleton), sample(model))
    assert loads == ["", *architecture.layer_names * 11]
    assert all(parameter.is_meta for parameter in architecture.model.parameters())


def test_keys_and_values_limit_the_batch(tiny_llama, tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    architecture = build(locate(Model(path=str(tmp_path), dtype="float32")))
    config = architecture.model.config
    model = tiny_llama().eval()
    cache = model(torch.zeros(1, 10, dtype=torch.long), use_cache=True).past_key_values
    n_bytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert config.num_hidden_layers == len(cache.layers)
    together = windows_together(architecture, 10, dtype=torch.float32, free=2 * 5 * n_bytes)
    assert together == 5
    assert windows_together(architecture, 10, dtype=torch.float32, free=0) == 1
