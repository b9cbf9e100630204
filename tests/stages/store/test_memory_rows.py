"""Free memory, also within the limit of a container."""

from __future__ import annotations

from pathlib import Path

import pytest

from stages.store import memory_rows
from stages.store.memory_rows import CONTROL_GROUPS, available_memory


def control_group(folder: Path, version: int, limit: str, used: int, cached: int) -> None:
    """Write the files of a control group and make it the only one."""
    _, limit_file, usage_file, cached_key = CONTROL_GROUPS[2 - version]
    (folder / limit_file).write_text(f"{limit}\n")
    (folder / usage_file).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 5\n{cached_key} {cached}\nfile_dirty 7\n")


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(memory_rows, "CONTROL_GROUPS", tuple((tmp_path, *files) for _, *files in CONTROL_GROUPS))
    return tmp_path


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(("used", "cached", "free"), [(600_000, 0, 400_000), (900_000, 50_000, 150_000), (2**21, 0, 0)])
def test_the_limit_of_a_container_counts(groups: Path, version: int, used: int, cached: int, free: int) -> None:
    control_group(groups, version, "1000000", used, cached)
    assert available_memory() == free


@pytest.mark.parametrize(("version", "limit"), [(1, str(2**63 - 4096)), (2, "max")])
def test_without_a_limit_the_free_memory_of_the_machine_counts(groups: Path, version: int, limit: str) -> None:
    control_group(groups, version, limit, 600_000, 0)
    assert 2**20 < available_memory() < 2**50


def test_damaged_files_of_a_control_group_are_ignored(groups: Path) -> None:
    control_group(groups, 2, "1000000", 600_000, 0)
    (groups / "memory.stat").write_text("no numbers here\n")
    assert available_memory() > 2**20
