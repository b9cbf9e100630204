"""Build hook: in the wheel, `pipeline`, `stages` and `schemas` are packages below `fpt`.

At the top level of `site-packages` such general names would collide with packages of a user's own project. The
repository and an editable installation keep them at the top level.
"""

from __future__ import annotations

import ast
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

PACKAGE = "fpt"
WINGS = ("pipeline", "schemas", "stages")
"""Packages that move below `PACKAGE`."""

_WING = "|".join(WINGS)
_FROM = re.compile(rb"from\s+(?=(?:" + _WING.encode() + rb")\b)")
_NAME = re.compile(rb"(?=(?:" + _WING.encode() + rb")\b)")
_TEXT = re.compile(rb"[a-zA-Z]{0,2}(?:\"\"\"|'''|\"|')(?=(?:" + _WING.encode() + rb")\b)")
_MODULE = re.compile(rf"({_WING})((?:\.[A-Za-z_]\w*)*)(?:\.|:[\w.]+)?")
"""Text that is the dotted name of a module, with the dot before a name that is appended or with `:object`."""
_IMPORTERS = {"__import__", "files", "find_spec", "import_module", "run_module"}
"""Functions whose first argument names a module."""


class RelocationError(ValueError):
    """An import that cannot be relocated."""


class RelocateWings(BuildHookInterface):  # type: ignore[type-arg]
    """Fill a wheel with relocated packages; an editable wheel stays as it is."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Add every file of the packages to a standard wheel, with rewritten imports."""
        self._folder: Path | None = None
        if self.target_name != "wheel" or version == "editable":
            return
        self._folder = Path(tempfile.mkdtemp(prefix="fpt-wheel-"))
        relocate(Path(self.root), self._folder)
        build_data["force_include"][str(self._folder / PACKAGE)] = PACKAGE

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:  # noqa: ARG002
        """Remove the rewritten files."""
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)


def relocate(root: Path, target: Path) -> None:
    """Copy the packages of a repository to `target/fpt`, with imports that fit their new places.

    Args:
        root: Folder of the four packages.
        target: Folder that gets one package.

    Raises:
        RelocationError: An import cannot be rewritten; the message names file and line.
    """
    modules = {
        ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
        for wing in WINGS
        for path in (root / wing).rglob("*.py")
    }
    for top in (PACKAGE, *WINGS):
        for path in sorted((root / top).rglob("*")):
            if not path.is_file() or "__pycache__" in path.parts or path.name.startswith("."):
                continue
            inner = path.relative_to(root)
            place = target / inner if top == PACKAGE else target / PACKAGE / inner
            place.parent.mkdir(parents=True, exist_ok=True)
            content = path.read_bytes()
            place.write_bytes(rewritten(content, modules, str(inner)) if path.suffix == ".py" else content)


def rewritten(source: bytes, modules: set[str], name: str) -> bytes:
    """Prefix every import of a wing, and every string that names one of its modules.

    Args:
        source: Python, in UTF-8.
        modules: Dotted names of all modules of the wings.
        name: File, for errors.

    Raises:
        RelocationError: The module is bound by its own name (`import stages.x`), or its name cannot be determined.
    """
    tree = ast.parse(source, name)
    starts = [0]
    for line in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    places = set()
    for edit in _edits(tree, modules, name):
        start = starts[edit.line - 1] + edit.column
        match = edit.pattern.match(source, start)
        if match is None:
            raise RelocationError(f"{name}:{edit.line}: a reference to a wing cannot be located.")
        places.add(match.end())
    for place in sorted(places, reverse=True):
        source = source[:place] + f"{PACKAGE}.".encode() + source[place:]
    ast.parse(source, name)
    return source


class _Edit(NamedTuple):
    """A place that needs the prefix, at the end of what `pattern` matches."""

    line: int
    """From 1."""
    column: int
    """In bytes."""
    pattern: re.Pattern[bytes]
    """Text between the start of the node and the name of the wing."""


def _edits(tree: ast.Module, modules: set[str], name: str) -> Iterator[_Edit]:
    skipped = _not_names(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            if not node.level and _wing(node.module or ""):
                yield _Edit(node.lineno, node.col_offset, _FROM)
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if _wing(alias.name):
                    if alias.asname is None:
                        raise RelocationError(
                            f"{name}:{node.lineno}: `import {alias.name}` binds {alias.name.partition('.')[0]!r}; "
                            "write `from ... import ...`."
                        )
                    yield _Edit(alias.lineno, alias.col_offset, _NAME)
        elif isinstance(node, ast.Call) and _called(node) in _IMPORTERS and node.args:
            edit = _text_edit(node.args[0], modules, bare=True)
            yield from () if edit is None else (edit,)
        elif id(node) not in skipped and isinstance(node, ast.Constant | ast.JoinedStr):
            edit = _text_edit(node, modules, bare=False)
            yield from () if edit is None else (edit,)


def _text_edit(node: ast.expr, modules: set[str], *, bare: bool) -> _Edit | None:
    """The edit of a string that names a module; `bare`: also of one that is only the name of a wing."""
    first = node.values[0] if isinstance(node, ast.JoinedStr) and node.values else node
    if not isinstance(first, ast.Constant) or not isinstance(first.value, str):
        return None
    match = _MODULE.fullmatch(first.value)
    if match is None or not (bare or match[2]):
        return None
    if match[2] and ".".join((match[1] + match[2]).split(".")[:2]) not in modules:
        return None
    return _Edit(node.lineno, node.col_offset, _TEXT)


def _not_names(tree: ast.Module) -> set[int]:
    """Identities of docstrings, and of the pieces of f-strings: those are edited at the start of the f-string."""
    pieces = [piece for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for piece in node.values]
    return {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)} | {id(piece) for piece in pieces}


def _called(node: ast.Call) -> str:
    function = node.func
    if isinstance(function, ast.Attribute):
        return function.attr
    return function.id if isinstance(function, ast.Name) else ""


def _wing(module: str) -> bool:
    return module.partition(".")[0] in WINGS
