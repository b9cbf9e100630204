"""What the options of several verbs share."""

from __future__ import annotations

import pytest

from pipeline.options import comma_separated


@pytest.mark.parametrize(
    ("text", "words"),
    [("", ()), (" , ,", ()), ("a", ("a",)), ("a, b ,a,,c d", ("a", "b", "c d")), ("2,10,2", ("2", "10"))],
)
def test_a_list_has_each_word_once_in_its_order(text: str, words: tuple[str, ...]) -> None:
    assert comma_separated(text) == words
