"""Remembered descriptions of LPMs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from schemas.errors import UnsupportedModelError
from stages.lpm.descriptions import remembered_lpm
from stages.lpm.loading import describe_lpm


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / ".fpt").mkdir()
    return tmp_path / ".fpt" / "lpm"


def test_a_description_is_the_same_from_the_file(folder: Path, tmp_path: Path) -> None:
    expected = describe_lpm("test_vit", 64)
    assert remembered_lpm(folder, "test_vit", 64, tmp_path, True) == expected
    (file,) = folder.iterdir()
    file.write_text(expected.model_copy(update={"heads": 7}).model_dump_json())
    assert remembered_lpm(folder, "test_vit", 64, tmp_path, True).heads == 7


def test_other_arguments_have_another_description(folder: Path, tmp_path: Path) -> None:
    sizes = {remembered_lpm(folder, "test_vit", size, tmp_path, True).image_size for size in (64, 96)}
    assert sizes == {64, 96}
    remembered_lpm(folder, "test_convnext", 64, tmp_path, False)
    with pytest.raises(UnsupportedModelError):
        remembered_lpm(folder, "test_convnext", 64, tmp_path, True)


@pytest.mark.parametrize("content", ["", "{}", '{"name": "test_vit", "of a later version": 1}'])
def test_a_damaged_file_is_replaced(folder: Path, tmp_path: Path, content: str) -> None:
    expected = remembered_lpm(folder, "test_vit", 64, tmp_path, True)
    (file,) = folder.iterdir()
    file.write_text(content)
    assert remembered_lpm(folder, "test_vit", 64, tmp_path, True) == expected
    assert file.read_text() == expected.model_dump_json()


def test_outside_a_study_nothing_is_written(tmp_path: Path) -> None:
    remembered_lpm(tmp_path / ".fpt" / "lpm", "test_vit", 64, tmp_path, True)
    assert list(tmp_path.iterdir()) == []


def test_a_remembered_description_needs_neither_torch_nor_timm(folder: Path, tmp_path: Path) -> None:
    remembered_lpm(folder, "test_vit", 64, tmp_path, True)
    code = (
        "import sys; from pathlib import Path; from stages.lpm.descriptions import remembered_lpm;"
        f"remembered_lpm(Path({str(folder)!r}), 'test_vit', 64, Path({str(tmp_path)!r}), True);"
        "sys.exit(bool({'torch', 'timm'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
