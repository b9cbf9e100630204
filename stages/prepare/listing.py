"""How errors about data name what is wrong: a few lines of many, and the nearest right word."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from schemas.text import visible


def listed(lines: Iterable[str], shown: int = 20) -> str:
    """Indent the first lines, one each, and count the rest."""
    every = list(lines)
    rest = [f"... and {len(every) - shown} more"] if len(every) > shown else []
    # Each line is one item: a line break in a file name must not look like another item.
    return "\n".join(f"  {visible(line)}" for line in every[:shown] + rest)


def did_you_mean(word: str, words: Iterable[str]) -> str:
    """`, did you mean 'label'?` where a word is near (also in other capitals), else an empty text."""
    by_folded = {known.casefold(): known for known in words}
    near = difflib.get_close_matches(word.casefold(), by_folded, n=1)
    return f", did you mean {by_folded[near[0]]!r}?" if near else ""
