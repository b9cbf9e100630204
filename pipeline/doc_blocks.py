"""Generated blocks of documentation pages, each between two marks."""

from __future__ import annotations

from schemas.errors import DataError


def with_block(text: str, begin: str, end: str, content: str) -> str:
    """Return a page with the content between two marks replaced.

    Raises:
        DataError: The page has no such marks.
    """
    before, first, rest = text.partition(begin)
    _, last, after = rest.partition(end)
    if not first or not last:
        raise DataError("The page has no block for a generated table.", repair=f"Add the lines {begin} and {end}.")
    return f"{before}{begin}\n{content}{end}{after}"
