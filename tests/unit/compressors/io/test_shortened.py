"""Lists in messages."""

from lrc.compressors.io.shortened import shortened


def test_only_the_first_five_items_are_named_and_the_others_counted() -> None:
    assert shortened(list("abcde"), ", ") == "a, b, c, d, e"
    assert shortened(list("abcdefg")) == "a; b; c; d; e (and 2 more)"
    assert shortened([]) == ""
