"""Names -> documents -> text -> tokens -> windows."""

import gzip
import json
import logging
from dataclasses import replace

import pytest
import torch

from lrc.compressors.corpus import documents, hub
from lrc.compressors.corpus.chat import chat_renderer
from lrc.compressors.corpus.documents import check_source
from lrc.compressors.corpus.excerpts import joined
from lrc.compressors.corpus.python_docs import paragraphs, without_repeats
from lrc.compressors.corpus.tokens import default_bos, tokenize
from lrc.configs.errors import DataError, RecipeError

CHAT_TEMPLATE = "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"


def read_documents(source, **options):
    return list(documents.read_documents(source, **options))


def chat_text(found, tokenizer):
    """Return the text of documents by the tokenizer's chat template."""
    rendered = map(chat_renderer(tokenizer), found)
    return "".join(joined(text for text in rendered if text is not None))


# Documents


def test_no_paragraph_of_python_docs_is_in_both_parts():
    parts = [
        [
            " ".join(p.split())
            for text in read_documents("python-docs", part=part)
            for p in paragraphs(text)
        ]
        for part in ("calibration", "evaluation")
    ]
    assert not set(parts[0]) & set(parts[1])
    assert len(parts[0]) + len(parts[1]) == len(set(parts[0])) + len(set(parts[1])) > 1000


def test_python_docs_gives_about_two_thirds_to_calibration():
    sizes = [
        sum(map(len, read_documents("python-docs", part=part)))
        for part in ("calibration", "evaluation")
    ]
    assert sizes[0] / sum(sizes) == pytest.approx(0.65, abs=0.01)
    assert sum(sizes) > 300_000


def test_repeats_are_dropped_whatever_their_white_space():
    documents = {"a": "one\n\ntwo  words\n\none", "b": "two\n   words\n\nthree", "c": "one\n"}
    assert without_repeats(documents) == {"a": "one\n\ntwo  words", "b": "three"}


def test_jsonl_rows_are_read_and_blank_lines_ignored(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(
        b'\xef\xbb\xbf{"body": "one"}\r\n\n   \n{"body": "", "n": 1}\n{"body": "tw\\u00f6"}'
    )
    assert read_documents(str(path), part="calibration", field="body") == ["one", "", "twö"]


def test_a_text_file_is_one_document(tmp_path):
    path = tmp_path / "book.TXT"
    path.write_text("a\n\nb\n", encoding="utf-8")
    assert read_documents(str(path), part="evaluation") == ["a\n\nb\n"]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("empty.jsonl", b"", ["empty"]),
        ("blank.jsonl", b"\n \n", ["no text"]),
        ("blank.txt", b" \n", ["no text"]),
        ("nul.txt", b"abc\0def", ["NUL", "UTF-16"]),
        ("nul.jsonl", b'{"text": "a"}\n\0', ["NUL"]),
        ("latin.txt", b"caf\xe9", ["UTF-8", "0xe9", "offset 3"]),
        ("latin.jsonl", b'{"text": "a"}\n{"text": "caf\xe9"}', ["line 2", "0xe9"]),
        ("bad.jsonl", b'{"text": "a"}\n\n{"text": ', ["line 3", "one JSON object"]),
        ("deep.jsonl", b"[" * 100_000, ["line 1", "one JSON object"]),
        ("list.jsonl", b'["a"]', ["line 1", "JSON object", '["a"]']),
        ("other.jsonl", b'{"body": "a", "n": 1}', ["line 1", "'text'", "'body', 'n'", "field"]),
        ("chat.jsonl", b'{"messages": []}', ["chat_template: true"]),
        ("number.jsonl", b'{"text": 7}', ["line 1", "string", "'7'"]),
        ("half.jsonl", b'{"text": "\\ud800"}', ["line 1", "surrogate"]),
    ],
)
def test_damaged_files_are_refused_in_one_clear_sentence(tmp_path, name, content, words):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        read_documents(str(path), part="calibration")
    for word in [str(path), *words]:
        assert word in str(caught.value)


def test_a_directory_is_refused(tmp_path):
    with pytest.raises(RecipeError, match="is a folder"):
        check_source(str(tmp_path), part="evaluation")


@pytest.mark.parametrize(
    ("source", "hint"),
    [
        ("wikitex2", "did you mean 'wikitext2'?"),
        ("C4", "did you mean 'c4'?"),
        ("python-doc", "did you mean 'python-docs'?"),
        ("wikitext.jsonl", "did you mean 'wikitext2'?"),
        ("nowhere/text.jsonl", "no such file: nowhere/text.jsonl"),
        ("news.csv", "path of a .jsonl or .txt file"),
    ],
)
def test_unknown_sources_are_refused_with_a_hint(source, hint):
    with pytest.raises(RecipeError) as caught:
        check_source(source, part="calibration")
    assert hint in str(caught.value)
    assert str(caught.value).startswith("calibration.source: ")


def test_a_misspelt_file_suggests_its_neighbour(tmp_path):
    (tmp_path / "harvest.jsonl").touch()
    with pytest.raises(RecipeError, match=r"did you mean '.*harvest\.jsonl'"):
        check_source(str(tmp_path / "havrest.jsonl"), part="evaluation")


def test_self_is_for_calibration_only():
    check_source("self", part="calibration")
    with pytest.raises(RecipeError, match="calibration only"):
        check_source("self", part="evaluation")


# Hub sources, through the real `datasets` on local files


@pytest.fixture
def local_hub(tmp_path, monkeypatch):
    """Folders laid out as the two Hub repositories are."""
    wikitext = tmp_path / "wikitext"
    for split in ("train", "test"):
        file = wikitext / "wikitext-2-raw-v1" / f"{split}-00000-of-00001.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(json.dumps({"text": f" {split} {i}\n"}) + "\n" for i in range(3)))
    (wikitext / "README.md").write_text(
        "---\nconfigs:\n- config_name: wikitext-2-raw-v1\n  data_files:\n"
        "  - split: train\n    path: wikitext-2-raw-v1/train-*\n"
        "  - split: test\n    path: wikitext-2-raw-v1/test-*\n---\n"
    )
    c4 = tmp_path / "c4"
    for place in hub.HUB_SOURCES["c4"].values():
        file = c4 / place.file
        file.parent.mkdir(parents=True, exist_ok=True)
        rows = (json.dumps({"text": f"{place.split} {i:05}", "url": ""}) for i in range(1200))
        with gzip.open(file, "wt") as zipped:
            zipped.write("\n".join(rows))
    for name, folder in (("wikitext2", wikitext), ("c4", c4)):
        parts = hub.HUB_SOURCES[name].items()
        moved = {part: replace(place, path=str(folder)) for part, place in parts}
        monkeypatch.setitem(hub.HUB_SOURCES, name, moved)
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path


def test_wikitext2_calibrates_on_train_and_evaluates_on_test(local_hub):
    assert read_documents("wikitext2", part="calibration") == [f" train {i}\n" for i in range(3)]
    assert read_documents("wikitext2", part="evaluation") == [f" test {i}\n" for i in range(3)]


@pytest.mark.parametrize("offline", [False, True])
def test_c4_is_read_as_far_as_needed(local_hub, monkeypatch, offline):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", offline)
    rows = read_documents("c4", part="calibration", characters=30)
    assert rows == ["train 00000", "train 00001", "train 00002"]
    rows = read_documents("c4", part="evaluation")
    assert (len(rows), rows[0], rows[-1]) == (1100, "validation 00000", "validation 01099")


def test_an_unreachable_hub_says_what_to_do_instead():
    with pytest.raises(DataError) as caught:
        read_documents("wikitext2", part="evaluation")
    for word in ("Salesforce/wikitext", ".jsonl or .txt", "HF_HUB_OFFLINE=1"):
        assert word in str(caught.value)


# Text and tokens


def test_documents_are_joined_by_a_blank_line_and_tokenized_once(tiny_tokenizer, caplog):
    text = "".join(joined(["one", "", "two"]))
    assert text == "one\n\n\n\ntwo"
    with caplog.at_level(logging.WARNING):
        ids = tokenize(text * 200, tiny_tokenizer)  # far longer than model_max_length
    assert tiny_tokenizer.decode(ids) == text * 200
    assert ids.dtype == torch.int64
    assert not caplog.records


def test_the_chat_template_takes_messages_and_makes_text_a_user_turn(make_tokenizer, tmp_path):
    path = tmp_path / "chat.jsonl"
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    path.write_text(json.dumps({"messages": messages}) + '\n{"text": "why"}\n{"text": " "}\n')
    found = read_documents(str(path), part="calibration", chat=True)
    tokenizer = make_tokenizer(chat_template=CHAT_TEMPLATE)
    text = chat_text(found, tokenizer)
    assert text == "<s>user: hi</s><s>assistant: ho</s>\n\n<s>user: why</s>"
    assert tokenize(text, tokenizer)[0] == tokenizer.bos_token_id


CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ([{"type": "text", "text": "one "}, {"type": "text", "text": "two"}], "one two"),
        ([{"type": "text", "text": "one"}], "one"),
        ([], ""),
    ],
)
def test_text_parts_of_a_message_are_joined(make_tokenizer, tmp_path, content, text):
    path = tmp_path / "chat.jsonl"
    path.write_text(json.dumps({"messages": [{"role": "user", "content": content}]}))
    found = read_documents(str(path), part="calibration", chat=True)
    tokenizer = make_tokenizer(chat_template=CHAT_TEMPLATE)
    assert chat_text(found, tokenizer) == f"<s>user: {text}</s>"


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ({"role": "user"}, ["got 'null'"]),
        ({"role": "user", "content": None}, ["got 'null'"]),
        ({"role": "user", "content": 7}, ["'7'"]),
        ({"role": "user", "content": {"text": "a"}}, ["text"]),
        ({"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}, ["part 1"]),
        (
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "audio"}]},
            ["part 2", "audio"],
        ),
        ({"role": "user", "content": [{"type": "text"}]}, ["part 1"]),
        ({"role": "user", "content": ["plain", 3]}, ["part 2"]),
        ({"role": "user", "content": "\ud800"}, ["surrogate"]),
        ({"content": "no role"}, ["'role'"]),
        ({"role": None, "content": "a"}, ["'role'"]),
        ("hi", ["'messages' must be"]),
    ],
)
def test_other_contents_are_refused_with_file_and_line(tmp_path, message, words):
    path = tmp_path / "chat.jsonl"
    good = {"role": "user", "content": "a"}
    rows = [{"messages": [good]}, {"messages": [good, message]}]
    path.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(DataError) as caught:
        read_documents(str(path), part="calibration", chat=True)
    for word in [str(path), "line 2, message 2", *words]:
        assert word in str(caught.value)


def test_tool_calls_need_no_content_but_a_template_that_writes_them(make_tokenizer, tmp_path):
    path = tmp_path / "chat.jsonl"
    message = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    path.write_text(json.dumps({"messages": [message]}))
    found = read_documents(str(path), part="calibration", chat=True)
    with pytest.raises(DataError, match=r"chat\.jsonl, line 1: has tool calls"):
        chat_text(found, make_tokenizer(chat_template=CHAT_TEMPLATE))
    calls = "{{ m.tool_calls[0].function.name }}"
    template = CHAT_TEMPLATE.replace("</s>", calls + "</s>")
    assert chat_text(found, make_tokenizer(chat_template=template)) == "<s>assistant: f</s>"


def test_bad_conversations_are_refused(make_tokenizer, tmp_path):
    path = tmp_path / "chat.jsonl"
    path.write_text('{"messages": []}')
    with pytest.raises(DataError, match=r"line 1.*'messages' must be"):
        read_documents(str(path), part="calibration", chat=True)
    path.write_text('\n{"messages": [{"role": "user", "content": "a"}]}')
    found = read_documents(str(path), part="calibration", chat=True)
    strict = make_tokenizer(chat_template="{{ raise_exception('roles must alternate') }}")
    with pytest.raises(DataError, match=r"refuses .*chat\.jsonl, line 2: roles must alternate"):
        chat_text(found, strict)
    with pytest.raises(DataError, match=r"no chat template.*chat_template: false"):
        chat_renderer(make_tokenizer())


def test_bos_is_found_where_the_tokenizer_adds_it(make_tokenizer):
    assert default_bos(make_tokenizer()) is None
    assert default_bos(make_tokenizer(bos=True)) == 0
