"""The build hook: which imports and strings get the prefix, and which stay."""

from __future__ import annotations

from pathlib import Path

import pytest

from hatch_build import RelocationError, relocate, rewritten

MODULES = {"stages", "stages.evaluate", "stages.evaluate.report", "pipeline", "pipeline.cli", "schemas", "schemas.base"}
ROOT = Path(__file__).parents[2]


def rewrite(text: str) -> str:
    return rewritten(text.encode(), MODULES, "file.py").decode()


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("from stages import files", "from fpt.stages import files"),
        ("from stages.evaluate.report import (\n    a,\n    b as stages,\n)", None),
        ("def f():\n    é = 1; from  pipeline.cli import main\n", None),
        ("import os, stages.evaluate as e, schemas as b", "import os, fpt.stages.evaluate as e, fpt.schemas as b"),
        ("files('stages.evaluate').joinpath('x')", "files('fpt.stages.evaluate').joinpath('x')"),
        ("import_module(f'stages.evaluate.{name}')", "import_module(f'fpt.stages.evaluate.{name}')"),
        ("import_module(f'stages.{name}')", "import_module(f'fpt.stages.{name}')"),
        ("importlib.import_module('stages')", "importlib.import_module('fpt.stages')"),
        ("TABLE = {'x': 'stages.evaluate.report:draw'}", "TABLE = {'x': 'fpt.stages.evaluate.report:draw'}"),
        ('x = """stages.evaluate"""', 'x = """fpt.stages.evaluate"""'),
    ],
)  # fmt: skip
def test_references_to_the_packages_get_the_prefix(before: str, after: str | None) -> None:
    expected = after or before.replace("stages.evaluate.report import", "fpt.stages.evaluate.report import").replace(
        "pipeline.cli", "fpt.pipeline.cli"
    )
    assert rewrite(before) == expected


@pytest.mark.parametrize(
    "text",
    [
        "from . import stages",
        "from mystages import stages",
        "from stages_of import x",
        "import pipelines",
        "tree['stages'], tree['stages.unknown'], 'schemas are here', f'stages {x}'",
        '"""stages.evaluate"""',
        "stages = {'stages': 1}; stages.pop('stages')",
        "# from stages import files",
        "print('from stages import files')",
    ],
)
def test_everything_else_stays(text: str) -> None:
    assert rewrite(text) == text


@pytest.mark.parametrize("text", ["import stages.evaluate", "import os, pipeline"])
def test_a_name_that_the_import_binds_is_refused(text: str) -> None:
    with pytest.raises(RelocationError, match=r"file\.py:1: `import (stages\.evaluate|pipeline)` binds"):
        rewrite(text)


def test_an_import_that_cannot_be_located_is_refused() -> None:
    with pytest.raises(RelocationError, match=r"file\.py:1: .* cannot be located"):
        rewrite("from \\\n    stages.evaluate import x; from\\\n stages import y")


def test_every_file_of_the_repository_is_relocated(tmp_path: Path) -> None:
    relocate(ROOT, tmp_path)
    package = tmp_path / "fpt"
    for wing in ("pipeline", "schemas", "stages"):
        originals = {path.relative_to(ROOT) for path in (ROOT / wing).rglob("*.py")}
        assert {path.relative_to(package) for path in (package / wing).rglob("*.py")} == originals
    assert (package / "stages/evaluate/report.html.j2").read_bytes() == (
        ROOT / "stages/evaluate/report.html.j2"
    ).read_bytes()
    for path in package.rglob("*.py"):
        for line in path.read_text(encoding="utf-8").splitlines():
            assert not line.strip().startswith(("from stages", "from pipeline", "from schemas")), path
