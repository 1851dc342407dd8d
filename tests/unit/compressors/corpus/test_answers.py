"""Tokens of answers in conversations, and the loss on them."""

import json
from itertools import pairwise

import pytest
import torch

from lrc.compressors.corpus.answers import answer_tokens, evenly_kept
from lrc.compressors.corpus.chat import Conversation, chat_renderer
from lrc.compressors.corpus.windows import calibration_windows
from lrc.configs.errors import DataError
from lrc.configs.recipe import Calibration

TEMPLATE = (
    "{% for m in messages %}<s>{{ m.role }}\n{{ m.content | trim }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
SYSTEM_FIRST = "<s>system\nBe kind.</s>\n" + TEMPLATE
LAST_THINKS = TEMPLATE.replace(
    "\n{{ m.content",
    "\n{% if loop.last and m.role == 'assistant' %}<think></think>{% endif %}{{ m.content",
)


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


CHAT = [
    turn("user", "Say yes or no."),
    turn("assistant", "yes"),
    turn("user", "Say yes again, please."),
    turn("assistant", " yes, yes "),
]


def counted_text(tokenizer, *documents) -> list[str]:
    """Return the texts of the runs of tokens that count."""
    ids, counted = answer_tokens(documents, chat_renderer(tokenizer), tokenizer)
    assert ids.shape == counted.shape
    runs: list[list[int]] = []
    before = False
    for token, counts in zip(ids.tolist(), counted.tolist(), strict=True):
        if counts:
            runs = runs if before else [*runs, []]
            runs[-1].append(token)
        before = counts
    return [tokenizer.decode(run) for run in runs]


@pytest.mark.parametrize(
    "template", [TEMPLATE, SYSTEM_FIRST, LAST_THINKS, TEMPLATE.replace(" | trim", "")]
)
def test_answers_and_what_ends_them_count(make_tokenizer, template):
    tokenizer = make_tokenizer(chat_template=template)
    found = counted_text(tokenizer, Conversation(CHAT, "here"))
    assert [each.replace(" ", "").strip() for each in found] == ["yes</s>", "yes,yes</s>"]


def test_documents_without_messages_count_whole(make_tokenizer):
    tokenizer = make_tokenizer(chat_template=TEMPLATE)
    ids, counted = answer_tokens(
        ["plain", " ", Conversation(CHAT[:1], "here")], chat_renderer(tokenizer), tokenizer
    )
    assert tokenizer.decode(ids) == "<s>user\nplain</s>\n\n\n<s>user\nSay yes or no.</s>\n"
    assert tokenizer.decode(ids[counted]).strip() == "<s>user\nplain</s>"
    assert counted[0]
    assert not counted[-1]


def test_an_answer_that_the_template_changes_is_refused(make_tokenizer):
    shouting = make_tokenizer(chat_template=TEMPLATE.replace("| trim", "| upper"))
    with pytest.raises(DataError, match=r"here, message 2: the chat template changes .*'yes'"):
        counted_text(shouting, Conversation(CHAT, "here"))


def test_documents_are_kept_evenly(make_tokenizer):
    documents = [f"{number:03}" for number in range(100)]
    assert evenly_kept(documents, len, 300) == documents
    kept = [int(each) for each in evenly_kept(documents, len, 40)]
    assert 20 <= 3 * len(kept) <= 40
    assert {b - a for a, b in pairwise(kept)} == {kept[1] - kept[0]}
    assert evenly_kept(["a long one"], len, 3) == ["a long one"]


@pytest.mark.parametrize("bos", [False, True])
def test_windows_say_which_of_their_tokens_count(make_tokenizer, tmp_path, bos):
    path = tmp_path / "chat.jsonl"
    path.write_text(f"{json.dumps({'messages': CHAT})}\n" * 30, encoding="utf-8")
    tokenizer = make_tokenizer(chat_template=TEMPLATE, bos=bos)
    options = Calibration(
        source=str(path), samples=5, length=40, chat_template=True, loss="answers"
    )
    found = calibration_windows(options, tokenizer, generator=torch.Generator().manual_seed(0))
    assert found.counted is not None
    assert found.tokens.shape == found.counted.shape == (5, 40)
    assert 0.1 < found.counted.float().mean() < 0.6
    for tokens, counted in zip(found.tokens, found.counted, strict=True):
        text = tokenizer.decode(tokens[counted])
        assert set(text) <= set("yes, </>\n")  # the first one may be cut
    assert bos is False or not found.counted[:, 0].any()
    # The text, and so the windows, are those of a loss on all tokens.
    others = calibration_windows(
        options.model_copy(update={"loss": "all"}),
        tokenizer,
        generator=torch.Generator().manual_seed(0),
    )
    assert others.counted is None
    assert torch.equal(others.tokens, found.tokens)
