"""Generated blocks of documentation pages, each between two marks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

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


def rewrite_blocks(pages: Sequence[str], begin: str, end: str, content: str) -> None:
    """Replace the content between two marks in the files of pages.

    Raises:
        DataError: A page has no such marks.
    """
    for page in map(Path, pages):
        page.write_text(with_block(page.read_text(encoding="utf-8"), begin, end, content), encoding="utf-8")
