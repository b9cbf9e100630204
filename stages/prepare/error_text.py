"""Text fragments of error messages about data: long lists cut short, and spelling suggestions."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from schemas.text import visible


def listed(lines: Iterable[str], shown: int = 20) -> str:
    """Indent the first `shown` lines and count the rest."""
    every = list(lines)
    rest = [f"... and {len(every) - shown} more"] if len(every) > shown else []
    # One entry per line: a line break in a file name must not look like another entry.
    return "\n".join(f"  {visible(line)}" for line in every[:shown] + rest)


def did_you_mean(word: str, words: Iterable[str]) -> str:
    """Return `, did you mean 'label'?` if one of `words` is similar (ignoring case), else an empty string."""
    by_folded = {candidate.casefold(): candidate for candidate in words}
    near = difflib.get_close_matches(word.casefold(), by_folded, n=1)
    return f", did you mean {by_folded[near[0]]!r}?" if near else ""
