"""Format text for messages: names with arbitrary characters, long values, counted nouns."""

from __future__ import annotations

import re

LONGEST_LINE = 400
"""Longest line of an error message, in characters; enough for paths of usual length."""

# C0, DEL and C1 controls, directional marks, embeddings, overrides and isolates, line and paragraph separators, and
# surrogates, which represent the bytes of file names that are not UTF-8.
_UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: object, keep: str = "") -> str:
    r"""Escape characters that a terminal would interpret or hide: controls, directional overrides, lone surrogates.

    Args:
        text: Any object; its `str` is used.
        keep: Characters to leave unescaped, such as line breaks in a message of several lines.

    Returns:
        Text with Python escapes such as `\x1b`.
    """
    return _UNSAFE.sub(lambda match: match[0] if match[0] in keep else _escaped(match[0]), str(text))


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


def json_visible(text: str) -> str:
    r"""Escape like `visible` within a JSON document: escapes are `\u001b`, line breaks between values stay."""
    return _UNSAFE.sub(lambda match: "\n" if match[0] == "\n" else f"\\u{ord(match[0]):04x}", text)


def shortened(line: str, longest: int = LONGEST_LINE) -> str:
    """Cut the middle out of a line that is too long for a message."""
    if len(line) <= longest:
        return line
    head, tail = line[: longest * 2 // 3], line[-longest // 6 :]
    return f"{head} ... {tail} ({len(line):,} characters)"


def images_of(images: int, groups: int, unit: str | None) -> str:
    """Return text such as `38 images of 26 patients`, or `38 images` if the unit of the groups is unknown."""
    return counted(images, "image") + ("" if unit is None else f" of {counted(groups, unit.removesuffix('s'))}")


def counted(number: int, noun: str) -> str:
    """Return the number with its noun: `1 image`, `2 images`, `2 classes`, `2 retries`."""
    many = re.sub("(?<=[^aeiou])y$", "ie", noun) + ("es" if noun.endswith("s") else "s")
    return f"{number:,} {noun if number == 1 else many}"
