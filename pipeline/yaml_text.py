"""Load YAML of settings safely: only data, no duplicate keys, and no small text that expands to a huge document."""

from __future__ import annotations

import re
from collections.abc import Hashable
from typing import Any

import yaml

from schemas.errors import SettingsError
from schemas.text import visible

MAX_DEPTH = 32
"""Levels of nesting; the settings have four."""
MAX_VALUES = 100_000
"""Values per document; those behind an alias count each time."""

_UNUSABLE = re.compile("[\0\ud800-\udfff]")


class _Loader(yaml.SafeLoader):
    """YAML loader without tags that run code, and without silently overwritten duplicate keys."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = self._count = 0
        self._sizes: dict[yaml.Node, int] = {}

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Compose a value within the limits of depth and number; an alias counts as many values as its target."""
        mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
        alias, before = self.check_event(yaml.AliasEvent), self._count
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise yaml.composer.ComposerError(None, None, f"more than {MAX_DEPTH} levels of nesting", mark)
        node = super().compose_node(parent, index)
        self._depth -= 1
        if node is None:
            return node
        if alias and node not in self._sizes:
            raise yaml.composer.ComposerError(None, None, "an alias inside of its own target", mark)
        self._count += self._sizes[node] if alias else 1
        if self._count > MAX_VALUES:
            raise yaml.composer.ComposerError(None, None, f"more than {MAX_VALUES:,} values", mark)
        if not alias:
            self._sizes[node] = self._count - before
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """Construct a value; an invalid one raises an error with its line."""
        try:
            value = super().construct_object(node, deep=deep)
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
            # For example month 13 in a date, `!!int x`, or an integer with more digits than Python converts.
            kind = node.tag.rpartition(":")[2]
            raise yaml.constructor.ConstructorError(None, None, f"not a valid {kind}", node.start_mark) from None
        if isinstance(value, str) and (unusable := _UNUSABLE.search(value)):
            problem = f"text with {visible(unusable[0])}, which no path, column or class can contain"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
        if isinstance(value, int) and value.bit_length() > 64:
            raise yaml.constructor.ConstructorError(None, None, "an integer of more than 64 bits", node.start_mark)
        return value

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Hashable] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, Hashable):
                if key in seen:
                    raise yaml.constructor.ConstructorError(None, None, f"key {key!r} twice", key_node.start_mark)
                seen.add(key)
        return super().construct_mapping(node, deep=deep)


def load_yaml(text: str, source: str) -> Any:
    """Read one YAML document.

    Raises:
        SettingsError: Names the line of a syntax error, of a duplicate key, or of a value beyond the limits.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.reader.ReaderError as error:
        where, problem = f"character {error.position + 1:,}", f"U+{error.character:04X} is not allowed in YAML"
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        words = (getattr(error, "context", None), getattr(error, "problem", None))
        problem = " ".join(filter(None, words)) or "not YAML"
        where = f"line {mark.line + 1}, column {mark.column + 1}" if mark is not None else source
    raise SettingsError(f"{source} is not valid YAML.", [(where, problem)], f"Correct {source}.")
