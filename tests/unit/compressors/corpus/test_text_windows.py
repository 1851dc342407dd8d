"""Windows of calibration and evaluation text, also of long files."""

import hashlib
import json
import tracemalloc

import pytest
import torch

from lrc.compressors.corpus import documents, windows
from lrc.compressors.corpus.excerpts import joined
from lrc.compressors.corpus.tokens import tokenize
from lrc.compressors.corpus.windows import (
    calibration_windows,
    disjoint_windows,
    evaluation_windows,
    random_windows,
)
from lrc.configs.errors import DataError
from lrc.configs.recipe import Calibration, Perplexity

CHAT_TEMPLATE = "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def read_documents(source, **options):
    return list(documents.read_documents(source, **options))


# Windows


def test_random_windows_follow_the_published_draw():
    ids = torch.arange(5000)
    windows = random_windows(ids, samples=128, length=32, generator=generator(), bos=None)
    starts = torch.randint(0, 5000 - 32, (128,), generator=generator())
    assert torch.equal(windows, torch.stack([ids[s : s + 32] for s in starts]))
    assert windows.dtype == torch.int64


def test_bos_takes_the_place_of_a_calibration_window_s_last_token():
    draws = {"samples": 4, "length": 8}
    plain = random_windows(torch.arange(100), **draws, generator=generator(), bos=None)
    windows = random_windows(torch.arange(100), **draws, generator=generator(), bos=7)
    assert windows.shape == plain.shape
    assert torch.equal(windows[:, 1:], plain[:, :-1])
    assert (windows[:, 0] == 7).all()


def test_a_text_of_exactly_one_window_is_enough():
    windows = random_windows(torch.arange(8), samples=1, length=8, generator=generator(), bos=None)
    assert windows.tolist() == [list(range(8))]


@pytest.mark.parametrize(
    ("tokens", "remedy"), [(20, "samples to at most 2"), (7, "length to at most 7")]
)
def test_too_little_calibration_text_says_how_much_there_is(tokens, remedy):
    with pytest.raises(DataError) as caught:
        random_windows(torch.arange(tokens), samples=3, length=8, generator=generator(), bos=None)
    assert f"holds {tokens} tokens" in str(caught.value)
    assert "3 x 8 = 24" in str(caught.value)
    assert remedy in str(caught.value)


def test_disjoint_windows_cover_the_text_and_drop_the_rest():
    ids = torch.arange(23)
    assert torch.equal(disjoint_windows(ids, window=5, limit=None, bos=None).flatten(), ids[:20])
    assert torch.equal(disjoint_windows(ids, window=5, limit=2, bos=None).flatten(), ids[:10])
    windows = disjoint_windows(ids, window=5, limit=None, bos=7)
    assert torch.equal(windows[:, 1:].flatten(), ids[:20])
    assert windows[:, 0].tolist() == [7] * 4


def test_too_little_evaluation_text_is_refused(tmp_path, tiny_tokenizer):
    path = tmp_path / "short.txt"
    path.write_text("short")
    with pytest.raises(DataError, match=r"evaluate\.perplexity short: .* one window of 2,048"):
        evaluation_windows(Perplexity(source=str(path)), tiny_tokenizer)


def test_calibration_windows_say_where_they_come_from(make_tokenizer, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": f"row {i}"}) + "\n" for i in range(100)))
    recipe = Calibration(source=str(path), samples=3, length=16)
    tokenizer = make_tokenizer(bos=True)
    windows = calibration_windows(recipe, tokenizer, generator=generator())
    text = "\n\n".join(f"row {i}" for i in range(100))
    assert windows.sha256 == hashlib.sha256(text.encode()).hexdigest()
    assert windows.text_tokens == len(tokenize(text, tokenizer))
    assert (windows.source, windows.bos, windows.tokens.shape) == (str(path), True, (3, 16))
    again = calibration_windows(recipe, tokenizer, generator=generator())
    assert torch.equal(windows.tokens, again.tokens)


def test_the_tokens_of_a_perplexity_limit_its_windows(tiny_tokenizer):
    whole = evaluation_windows(Perplexity(source="python-docs", window=64), tiny_tokenizer)
    some = evaluation_windows(
        Perplexity(source="python-docs", window=64, tokens=1000), tiny_tokenizer
    )
    assert some.tokens.shape == (15, 64)
    assert torch.equal(some.tokens, whole.tokens[:15])
    assert some.sha256 == whole.sha256


# Texts that are much longer than their windows


@pytest.fixture(scope="module")
def long_rows(tmp_path_factory):
    """4.2 MB of rows with different numbers."""
    path = tmp_path_factory.mktemp("long") / "rows.jsonl"
    with path.open("w") as file:
        for i in range(70_000):
            file.write(json.dumps({"text": f"row {i} of a text that is long, and so on"}) + "\n")
    return path


def counting(tokenizer, monkeypatch):
    """Count the characters that a tokenizer is given."""
    counted, call = [0], type(tokenizer).__call__

    def spy(self, text, **options):
        counted[0] += len(text)
        return call(self, text, **options)

    monkeypatch.setattr(type(tokenizer), "__call__", spy)
    return counted


@pytest.mark.parametrize("chat", [False, True])
def test_calibration_tokenizes_no_more_of_a_long_file_than_its_windows_need(
    make_tokenizer, long_rows, monkeypatch, chat
):
    monkeypatch.setattr(windows, "WHOLE_CHARACTERS", 2**20)
    tokenizer = make_tokenizer(chat_template=CHAT_TEMPLATE)
    recipe = Calibration(source=str(long_rows), samples=8, length=64, chat_template=chat)
    counted = counting(tokenizer, monkeypatch)
    found = calibration_windows(recipe, tokenizer, generator=generator())
    assert counted[0] < 3 * 8 * 64 * windows.CHARACTERS_PER_TOKEN
    assert found.tokens.shape == (8, 64)
    again = calibration_windows(recipe, tokenizer, generator=generator())
    assert torch.equal(found.tokens, again.tokens)
    # They come from all of the file.
    rows = [int(w) for w in tokenizer.decode(found.tokens.flatten()).split() if w.isdigit()]
    assert min(rows) < 20_000
    assert max(rows) > 50_000


def test_windows_of_a_file_that_is_not_long_are_drawn_from_all_of_it(
    tiny_tokenizer, tmp_path, monkeypatch
):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": f"row {i}"}) + "\n" for i in range(9000)))
    recipe = Calibration(source=str(path), samples=4, length=16)
    found = calibration_windows(recipe, tiny_tokenizer, generator=generator())
    ids = tokenize("\n\n".join(f"row {i}" for i in range(9000)), tiny_tokenizer)
    expected = random_windows(ids, samples=4, length=16, generator=generator(), bos=None)
    assert torch.equal(found.tokens, expected)


@pytest.mark.parametrize("row", ["one endless line. " * 20_000, "x" * 300_000])
def test_a_single_row_may_be_long(tiny_tokenizer, tmp_path, monkeypatch, row):
    monkeypatch.setattr(windows, "WHOLE_CHARACTERS", 2**10)
    path = tmp_path / "line.jsonl"
    path.write_text(json.dumps({"text": row}))
    recipe = Calibration(source=str(path), samples=2, length=16)
    counted = counting(tiny_tokenizer, monkeypatch)
    found = calibration_windows(recipe, tiny_tokenizer, generator=generator())
    assert found.tokens.shape == (2, 16)
    assert counted[0] < 10_000


def test_evaluation_tokenizes_no_more_than_its_windows_need(tiny_tokenizer, long_rows, monkeypatch):
    counted = counting(tiny_tokenizer, monkeypatch)
    spec = Perplexity(source=str(long_rows), window=64, windows=4)
    found = evaluation_windows(spec, tiny_tokenizer)
    assert counted[0] < 300_000
    text = "\n\n".join(f"row {i} of a text that is long, and so on" for i in range(70_000))
    assert found.sha256 == hashlib.sha256(text.encode()).hexdigest()
    assert torch.equal(found.tokens.flatten(), tokenize(text[:10_000], tiny_tokenizer)[:256])


def test_a_long_text_file_is_read_in_blocks_that_join_to_its_text(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "BLOCK", 100)
    text = "\ufefffirst " + "".join(f"word {i}\n\n" * (i % 3) + f"wörd {i}\n" for i in range(200))
    text += "e" * 300 + "\n\n\n"
    path = tmp_path / "book.txt"
    path.write_text(text, encoding="utf-8")
    found = read_documents(str(path), part="evaluation")
    assert len(found) > 10
    assert "".join(joined(found)) == text.removeprefix("\ufeff")
    path.write_bytes(text.encode() + b"\xe9")
    with pytest.raises(DataError, match=f"offset {len(text.encode())}"):
        read_documents(str(path), part="evaluation")


@pytest.mark.parametrize("end", ["\n", "\r\n\r\n", " "])
def test_a_long_text_without_blank_lines_is_not_held_in_memory(
    tiny_tokenizer, tmp_path, monkeypatch, end
):
    monkeypatch.setattr(documents, "BLOCK", 2**16)
    path, text = tmp_path / "lines.txt", f"one sentence in évery line{end}" * 200_000
    path.write_bytes(text.encode())  # 6 MB
    tracemalloc.start()
    longest = max(map(len, documents.read_documents(str(path), part="calibration")))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert longest <= 2 * 2**16
    assert peak < 2**20
    found = evaluation_windows(Perplexity(source=str(path), window=64, windows=4), tiny_tokenizer)
    assert found.sha256 == hashlib.sha256(text.encode()).hexdigest()
    assert torch.equal(found.tokens.flatten(), tokenize(text[:10_000], tiny_tokenizer)[:256])
    pieces = documents.read_documents(str(path), part="calibration")
    assert "".join(joined(map(str, pieces))) == text
