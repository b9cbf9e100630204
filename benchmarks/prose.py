"""Count the turns of phrase that the word list avoids, per 1,000 words of docstrings, comments and string literals.

    python benchmarks/prose.py [FOLDER ...]

Without folders: `fpt`, `pipeline`, `stages`, `schemas`, those that exist. One row per pattern, one column per folder;
any other code base can be named for comparison. `--list PATTERN` prints the lines behind one figure.
"""

from __future__ import annotations

import argparse
import ast
import io
import re
import sys
import tokenize
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

WINGS = ("fpt", "pipeline", "stages", "schemas")

PATTERNS = {
    "code says, asks, knows, tells, wants": re.compile(
        r"\b(?:says?|said|asks?|asked|knows?|known to|tells?|told|wants?|wanted|speaks?|spoke)\b", re.IGNORECASE
    ),
    'lines that begin with "Of"': re.compile(r"^\W*Of\b(?! course)"),
    "alone for only": re.compile(r"\balone\b", re.IGNORECASE),
    "judge": re.compile(r"\bjudg(?:e|es|ed|ing|ement|ements|ment)\b", re.IGNORECASE),
    "whole": re.compile(r"\bwhol(?:e|ly)\b", re.IGNORECASE),
    "anew, afresh, beside, mend, learnt": re.compile(
        r"\b(?:anew|afresh|besides?|mend(?:s|ed|ing)?|maybe|learnt)\b", re.IGNORECASE
    ),
    "there is none, where there is": re.compile(r"\b(?:there (?:is|are) none|where there (?:is|are))\b", re.IGNORECASE),
}

WORD = re.compile(r"[A-Za-z][A-Za-z'-]*")


@dataclass(frozen=True)
class Line:
    """One line of prose and where it stands."""

    path: Path
    number: int
    text: str


def prose(path: Path) -> Iterator[Line]:
    """Lines of docstrings, comments and string literals with at least three words.

    Shorter strings are keys, names and formats rather than prose.
    """
    source = path.read_text(encoding="utf-8")
    with_strings = ast.parse(source)
    for node in ast.walk(with_strings):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            for offset, text in enumerate(node.value.splitlines()):
                yield Line(path, node.lineno + offset, text.strip())
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield Line(path, token.start[0], token.string.lstrip("# "))


def lines_of(folder: Path) -> list[Line]:
    """Prose of every Python file below a folder."""
    found = []
    for path in sorted(folder.rglob("*.py")):
        try:
            found += [line for line in prose(path) if len(WORD.findall(line.text)) >= 3]
        except (SyntaxError, UnicodeDecodeError, tokenize.TokenError) as error:
            print(f"{path}: skipped, {error}", file=sys.stderr)
    return found


def rates(lines: list[Line]) -> tuple[int, dict[str, float]]:
    """Number of words, and occurrences of each pattern per 1,000 of them."""
    words = sum(len(WORD.findall(line.text)) for line in lines)
    counts = Counter(dict.fromkeys(PATTERNS, 0))
    for line in lines:
        for name, pattern in PATTERNS.items():
            counts[name] += len(pattern.findall(line.text))
    return words, {name: 1000 * count / max(words, 1) for name, count in counts.items()}


def main() -> None:
    """Print the table, or the lines behind one figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", type=Path)
    parser.add_argument("--list", metavar="PATTERN", help="first letters of a pattern's name: print its lines")
    options = parser.parse_args()
    folders = options.folders or [Path(name) for name in WINGS if Path(name).is_dir()]
    if options.list:
        names = [name for name in PATTERNS if name.startswith(options.list)]
        for folder in folders:
            for line in lines_of(folder):
                if any(PATTERNS[name].search(line.text) for name in names):
                    print(f"{line.path}:{line.number}: {line.text}")
        return
    groups = {str(folder): lines_of(folder) for folder in folders}
    groups["all"] = [line for lines in list(groups.values()) for line in lines]
    columns = {name: rates(lines) for name, lines in groups.items()}
    table = Table("per 1,000 words", *columns)
    table.add_row("words", *(f"{words:,}" for words, _ in columns.values()))
    for pattern in PATTERNS:
        table.add_row(pattern, *(f"{values[pattern]:.2f}" for _, values in columns.values()))
    Console(highlight=False).print(table)


if __name__ == "__main__":
    main()
