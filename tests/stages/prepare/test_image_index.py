"""The index of read images: unchanged files are not read again, changed ones always are, the result is the same."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from pictures import picture, save

from schemas.data_settings import DataSettings
from stages.prepare.image_digests import Digests, digest_images
from stages.prepare.image_index import FileState, ImageIndex
from stages.prepare.image_record import ReadLimits
from stages.prepare.labelled_image import LabelledImage

LIMITS = ReadLimits.of(DataSettings())


class Folder:
    """An image folder with an index for which every file is settled at once."""

    def __init__(self, root: Path) -> None:
        self.images, self.index = root / "images", root / "index"
        for number in range(6):
            save(picture(number), self.images / f"{number}.png")

    def read(self, limits: ReadLimits = LIMITS, settled: float = 0.0, **options: bool) -> tuple[Digests, int]:
        """What is read, and how many files had to be decoded."""
        index = ImageIndex.open(self.index, self.images, limits, **options)
        index.settled = settled
        items = [LabelledImage(path.name, "x") for path in sorted(self.images.iterdir())]
        calls: list[int] = []
        new = sum(index.find(item.path, FileState.of(self.images / item.path)) is None for item in items)
        digests = digest_images(items, self.images, limits, lambda done, _: calls.append(done), index)
        assert len(calls) == new + (new < len(items)), "one call for all known files, and one for each other"
        plain = digest_images(items, self.images, limits)
        assert (digests.records, digests.failures) == (plain.records, plain.failures)
        assert list(digests.records) == list(plain.records)
        return digests, new


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path)


def test_a_second_run_decodes_nothing(folder: Folder) -> None:
    assert folder.read()[1] == 6
    before = [file.stat().st_mtime_ns for file in folder.index.iterdir()]
    assert folder.read()[1] == 0
    assert [file.stat().st_mtime_ns for file in folder.index.iterdir()] == before, "nothing to write"
    assert folder.read(fresh=True)[1] == 6


def test_only_what_changed_is_decoded(folder: Folder) -> None:
    folder.read()
    save(picture(10), folder.images / "0.png")
    save(picture(11), folder.images / "new.png")
    (folder.images / "1.png").unlink()
    (folder.images / "2.png").rename(folder.images / "renamed.png")
    assert folder.read()[1] == 3
    assert folder.read()[1] == 0


def test_a_change_that_keeps_size_and_time(folder: Folder) -> None:
    folder.read()
    path = folder.images / "0.png"
    status, content = path.stat(), bytearray(path.read_bytes())
    content[-20] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert path.stat().st_size == status.st_size and path.stat().st_mtime_ns == status.st_mtime_ns
    digests, decoded = folder.read()
    assert decoded == 1 and "0.png" in digests.failures


def test_failures_are_read_again(folder: Folder) -> None:
    (folder.images / "bad.png").write_bytes(b"no image")
    assert folder.read()[1] == 7
    assert folder.read()[1] == 1


def test_other_limits_and_other_folders(folder: Folder) -> None:
    folder.read()
    assert folder.read(ReadLimits(LIMITS.max_pixels, 40))[1] == 6
    shutil.copytree(folder.images, folder.images.with_name("moved"))
    folder.images = folder.images.with_name("moved")
    assert folder.read()[1] == 6


@pytest.mark.parametrize("keep", [0, 0.3, 0.9])
def test_a_damaged_index_only_costs_time(folder: Folder, keep: float) -> None:
    folder.read()
    (file,) = folder.index.iterdir()
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * keep)])
    assert folder.read()[1] == 6
    assert folder.read()[1] == 0


def test_a_changed_byte_of_the_index_changes_no_result(folder: Folder) -> None:
    folder.read()
    (file,) = folder.index.iterdir()
    content = file.read_bytes()
    decoded = []
    for position in range(4, len(content), len(content) // 40):
        file.write_bytes(content[:position] + bytes([content[position] ^ 255]) + content[position + 1 :])
        # Compared with a run without an index in `read`. A byte of unused statistics may go unnoticed.
        decoded.append(folder.read()[1])
    assert set(decoded) <= {0, 6} and decoded.count(6) > 20


def test_a_file_that_was_just_written_is_not_trusted(folder: Folder) -> None:
    assert folder.read(settled=3600)[1] == 6
    assert folder.read(settled=3600)[1] == 6
