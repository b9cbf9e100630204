"""Count the turns of phrase that the word list avoids, per 1,000 words of docstrings, comments and string literals.

    python benchmarks/prose.py [FOLDER ...]
    python benchmarks/prose.py --entries [FOLDER ...]
    python benchmarks/prose.py --list PATTERN [FOLDER ...]

The default folders are `fpt`, `pipeline`, `stages` and `schemas`, if they exist; other code bases can be named for
comparison. Prints one row per pattern and one column per folder. `--entries` prints absolute counts with one row per
file or folder directly below each folder instead, and `--list` the lines behind one figure.
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
from rich.table import Column, Table

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
    """One line of prose and its location."""

    path: Path
    number: int
    text: str


def prose(path: Path) -> Iterator[Line]:
    """Yield the lines of all docstrings, comments and string literals of a file."""
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
    """Return the lines with three words or more in a Python file, or in all Python files below a folder.

    Shorter strings are keys, names and formats rather than prose.
    """
    lines = []
    for path in sorted(folder.rglob("*.py")) if folder.is_dir() else [folder]:
        try:
            lines += [line for line in prose(path) if len(WORD.findall(line.text)) >= 3]
        except (SyntaxError, UnicodeDecodeError, tokenize.TokenError) as error:
            print(f"{path}: skipped, {error}", file=sys.stderr)
    return lines


def occurrences(lines: list[Line]) -> tuple[int, Counter[str]]:
    """Count the words, and the occurrences of each pattern."""
    words = sum(len(WORD.findall(line.text)) for line in lines)
    counts = Counter(dict.fromkeys(PATTERNS, 0))
    for line in lines:
        for name, pattern in PATTERNS.items():
            counts[name] += len(pattern.findall(line.text))
    return words, counts


def entries(folder: Path) -> list[Path]:
    """Return the Python files and the folders with Python files directly below a folder, or the file itself."""
    if not folder.is_dir():
        return [folder]
    return [path for path in sorted(folder.iterdir()) if path.suffix == ".py" or any(path.rglob("*.py"))]


def rate_table(folders: list[Path]) -> Table:
    """Tabulate occurrences per 1,000 words: one row per pattern, one column per folder."""
    groups = {str(folder): lines_of(folder) for folder in folders}
    groups["all"] = [line for lines in list(groups.values()) for line in lines]
    columns = {name: occurrences(lines) for name, lines in groups.items()}
    table = Table("per 1,000 words", *columns)
    table.add_row("words", *(f"{words:,}" for words, _ in columns.values()))
    for pattern in PATTERNS:
        rates = (1000 * counts[pattern] / max(words, 1) for words, counts in columns.values())
        table.add_row(pattern, *(f"{rate:.2f}" for rate in rates))
    return table


def entry_table(folders: list[Path]) -> Table:
    """Tabulate occurrences: one row per file or folder below the folders, one column per pattern."""
    table = Table(Column("occurrences", no_wrap=True), "words", *PATTERNS)
    for entry in (entry for folder in folders for entry in entries(folder)):
        words, counts = occurrences(lines_of(entry))
        table.add_row(str(entry), f"{words:,}", *(str(counts[pattern] or "") for pattern in PATTERNS))
    return table


def main() -> None:
    """Print a table, or the lines behind one figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", type=Path)
    parser.add_argument(
        "--list", metavar="PATTERN", help="print the lines of the patterns that start with these letters"
    )
    parser.add_argument("--entries", action="store_true", help="absolute counts per file or folder below each FOLDER")
    options = parser.parse_args()
    folders = options.folders or [Path(name) for name in WINGS if Path(name).is_dir()]
    if options.list:
        names = [name for name in PATTERNS if name.startswith(options.list)]
        for folder in folders:
            for line in lines_of(folder):
                if any(PATTERNS[name].search(line.text) for name in names):
                    print(f"{line.path}:{line.number}: {line.text}")
        return
    console = Console(highlight=False)
    if options.entries:
        console.width = max(console.width, 130)
    console.print(entry_table(folders) if options.entries else rate_table(folders))


if __name__ == "__main__":
    main()
