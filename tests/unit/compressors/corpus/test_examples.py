"""Tables of labelled texts in all formats, and what is wrong with others."""

import json
from pathlib import Path
from typing import Any

import pytest
from pyarrow import Table
from pyarrow.parquet import write_table
from tests.tiny_encoders import WORDS, tiny_words

from lrc.compressors.corpus.examples import Examples, check_task_data, read_examples
from lrc.compressors.corpus.sentences import tokenize_sentences
from lrc.configs.errors import DataError, RecipeError
from lrc.configs.task_data import EvaluationTask, TaskData

CLASSES = {0: "bad", 1: "good"}
ROWS = [{"sentence": "a fine film", "label": 1}, {"sentence": 'dull, "very"\nlong', "label": 0}]
EXPECTED = Examples([("a fine film",), ('dull, "very"\nlong',)], [1, 0])


def write(folder: Path, rows: list[dict[str, Any]], suffix: str) -> Path:
    path = folder / f"table{suffix}"
    if suffix == ".parquet":
        write_table(Table.from_pylist(rows), path)
    elif suffix == ".csv":
        quoted = [[f'"{str(v).replace(chr(34), 2 * chr(34))}"' for v in r.values()] for r in rows]
        lines = [",".join(rows[0]), *(",".join(row) for row in quoted)]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    else:
        path.write_text("\n".join(map(json.dumps, rows)) + "\n\n", encoding="utf-8")
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_all_formats_have_the_same_examples(suffix: str, tmp_path: Path) -> None:
    spec = TaskData(data=str(write(tmp_path, ROWS, suffix)), text="sentence", label="label")
    assert read_examples(spec, "evaluation", classes=CLASSES) == EXPECTED
    first = read_examples(spec, "evaluation", classes=CLASSES, limit=1)
    assert first == Examples(EXPECTED.texts[:1], [1])
    assert read_examples(spec, "evaluation").labels is None


def test_labels_can_be_names_of_classes(tmp_path: Path) -> None:
    rows = [{"text": "x", "label": "good"}, {"text": "y", "label": "bad"}]
    spec = TaskData(data=str(write(tmp_path, rows, ".jsonl")), label="label")
    assert read_examples(spec, "evaluation", classes=CLASSES).labels == [1, 0]


def test_numbers_that_are_names_are_names(tmp_path: Path) -> None:
    """Of stars, for example: the class 0 is called 1."""
    spec = TaskData(data=str(write(tmp_path, [{"text": "x", "label": "1"}], ".csv")), label="label")
    assert read_examples(spec, "evaluation", classes={0: "1", 1: "2"}).labels == [0]


BAD: dict[str, tuple[str, dict[str, Any], str, str]] = {
    "empty": ("t.jsonl", {}, "\n", "evaluate.task.data {path}: has no rows"),
    "column": ("t.jsonl", {"text": "body"}, '{"a": 1}', "line 1: no column 'body', which evaluate"),
    "label column": ("t.jsonl", {"label": "y"}, '{"text": "a"}', "no column 'y'"),
    "number": ("t.jsonl", {}, '{"text": 3}', "line 1: 'text' must be a string, got '3'"),
    "json": ("t.jsonl", {}, '{"text": "a"}\n{', "line 2: must be one JSON object"),
    "list": ("t.jsonl", {}, "[1]", "line 1: must be a JSON object"),
    "class": (
        "t.jsonl",
        {"label": "y"},
        '{"text": "a", "y": 2}',
        "must be a class of the model, which are 0 (bad), 1 (good), got '2'",
    ),
    "unknown class": ("t.jsonl", {"label": "y"}, '{"text": "a", "y": "ugly"}', "got 'ugly'"),
    "no label": ("t.jsonl", {"label": "y"}, '{"text": "a", "y": -1}', "got '-1'"),
    "truth": ("t.jsonl", {"label": "y"}, '{"text": "a", "y": true}', "got 'true'"),
    "fields": ("t.csv", {}, "text,label\na\n", "row 1: must have as many fields"),
    "parquet": ("t.parquet", {}, "text", "is not a valid Parquet file"),
    "binary": ("t.csv", {}, b"text\n\xff\xfe", "must be UTF-8 text"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_tables_are_refused(case: str, tmp_path: Path) -> None:
    name, options, content, message = BAD[case]
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError) as error:
        read_examples(TaskData(data=str(path), **options), "evaluation", classes=CLASSES)
    assert message.format(path=path) in str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data": "{folder}"}, "is a folder; give a file in it"),
        ({"data": "{folder}/no.csv"}, "no such file"),
        ({"data": "{folder}/t.txt"}, "must be the path of a .jsonl, .csv, .parquet file"),
        ({"data": "sst2"}, "or a data set of the Hub (org/name), got 'sst2'"),
        ({"data": "{folder}/t.csv", "split": "test"}, "calibration.task.split: is for data sets"),
    ],
)
def test_data_must_exist(options: dict[str, str], message: str, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("text\na\n")
    (tmp_path / "t.txt").write_text("a\n")
    found = {key: value.format(folder=tmp_path) for key, value in options.items()}
    with pytest.raises(RecipeError) as error:
        check_task_data(TaskData(**found), "calibration")
    assert message in str(error.value)


def test_data_of_the_hub_that_cannot_be_reached_is_an_error() -> None:
    spec = EvaluationTask(data="no-such-org/no-such-data")
    check_task_data(spec, "evaluation")
    with pytest.raises(DataError, match="cannot read split 'validation' from the Hugging Face Hub"):
        read_examples(spec, "evaluation")


def test_batches_hold_every_text_once_with_little_padding() -> None:
    texts = [(" ".join(WORDS[:n]),) for n in (5, 1, 9, 2, 9)]
    found = tokenize_sentences(texts, tiny_words(), length=8, labels=range(5))
    parts = list(found.batches(2))
    assert [part.tokens.shape[1] for part in parts] == [4, 8, 8]  # two special tokens; cut at 8
    assert sorted(int(y) for part in parts for y in part.labels) == [0, 1, 2, 3, 4]  # type: ignore[union-attr]
    for part in parts:
        for row, label in enumerate(part.labels):  # type: ignore[arg-type]
            own = found.tokens[label][found.mask[label]]
            assert part.tokens[row][part.mask[row]].tolist() == own.tolist()


def test_a_tokenizer_needs_a_padding_token() -> None:
    tokenizer = tiny_words()
    tokenizer.pad_token = None
    with pytest.raises(DataError, match="has no padding token"):
        tokenize_sentences([("a film",)], tokenizer, length=8)
