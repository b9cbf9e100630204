"""Plugins: methods in a Python file or an installed package of a user's own, registered like those of fpt."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

from schemas.base import digest
from schemas.errors import FptError, SettingsError
from schemas.method_row import MethodRow
from schemas.methods import register

GROUP = "fpt.methods"
"""Group of entry points, each of which names a module."""
VARIABLE = "FPT_PLUGINS"
"""Environment variable with the paths of Python files, for the stages of DVC and for other processes."""
GUIDE = "docs/extending.md has an example."

_loaded: set[str] = set()


def load_plugins(files: Sequence[Path] = ()) -> None:
    """Register the methods of these files, of those in `FPT_PLUGINS`, and of installed packages, each once.

    A plugin is a module with `METHOD`, which builds or fits its methods, and `ROWS`, their rows of the registry. Its
    code runs in this process: load only what you trust.

    Raises:
        SettingsError: If a plugin cannot be imported, or lacks either.
    """
    listed = [path for path in os.environ.get(VARIABLE, "").split(os.pathsep) if path]
    listed += [text for path in files if (text := str(path.expanduser().absolute())) not in listed]
    if listed:
        # Processes that this one starts load the same plugins.
        os.environ[VARIABLE] = os.pathsep.join(listed)
    for text in listed:
        if text not in _loaded:
            _register(_import_file(Path(text)), text)
            _loaded.add(text)
    for point in _entry_points():
        if point.value not in _loaded:
            _register(_imported(point.load, point.value), point.value)
            _loaded.add(point.value)


@cache
def _entry_points() -> Sequence[EntryPoint]:
    return tuple(entry_points(group=GROUP))


def _import_file(path: Path) -> ModuleType:
    """Import a file under a name that no other module has."""
    if not path.is_file():
        raise SettingsError(f"There is no plugin {path}.", repair="Correct --plugin, or the variable FPT_PLUGINS.")
    name = f"fpt_plugin_{path.stem}_{digest(str(path))[:8]}"
    spec = spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise SettingsError(f"The plugin {path} is not a Python file.", repair="Name a file that ends with .py.")
    module = module_from_spec(spec)
    sys.modules[name] = module
    loader = spec.loader
    _imported(lambda: loader.exec_module(module), str(path))
    return module


def _imported(load: Any, source: str) -> Any:
    try:
        return load()
    except FptError:
        raise
    except Exception as error:
        raise SettingsError(
            f"The plugin {source} cannot be imported: {type(error).__name__}: {error}",
            repair=f"Correct it. {GUIDE}",
        ) from error


def _register(module: Any, source: str) -> None:
    from stages.methods.base import ClosedFormMethod, GradientMethod

    rows: Any = getattr(module, "ROWS", None)
    valid = isinstance(rows, list | tuple) and bool(rows) and all(isinstance(row, MethodRow) for row in rows)
    if not valid or not isinstance(getattr(module, "METHOD", None), GradientMethod | ClosedFormMethod):
        raise SettingsError(
            f"The plugin {source} has no method.",
            [("ROWS", "must be a list of rows of the registry"), ("METHOD", "must build or fit them")],
            GUIDE,
        )
    for row in rows:
        register(replace(row, module=module.__name__, package=""))
