"""Every file in a folder is an image, or is reported as skipped, by name or as a count."""

from __future__ import annotations

import io
import os
import socket
from pathlib import Path

import pytest
from PIL import Image

from stages.image_kinds import is_read, kind_of_bytes
from stages.prepare.image_files import find_image_files, skipped_lines


def encoded(kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (20, 20), "red").save(buffer, kind)
    return buffer.getvalue()


DICOM_REPORT = bytes(128) + b"DICM\x02\0\x02\0UI\x1e\x001.2.840.10008.5.1.4.1.1.88.11"


def found(folder: Path) -> tuple[list[str], dict[str, str]]:
    result = find_image_files(folder)
    images = [path.relative_to(folder).as_posix() for path in result.images]
    return images, {one.path.relative_to(folder).as_posix(): one.reason for one in result.skipped}


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "BMP", "WebP"])
def test_kinds_that_are_read(kind: str) -> None:
    assert kind_of_bytes(encoded(kind)) == kind
    assert is_read(kind)


@pytest.mark.parametrize(
    ("start", "kind"),
    [
        (encoded("GIF"), "GIF"),
        (DICOM_REPORT, "DICOM without an image"),
        (b"\0" * 344 + b"ni1\0", "NIfTI pair"),
        (b"\0\0\0\x18ftypheic", "HEIC"),
        (b"BMI,age\n31,40\n and so on", None),
        (b"RIFF\0\0\0\0AVI LIST", None),
        (b"path,label\n", None),
        (b"", None),
    ],
)
def test_kinds_that_are_not(start: bytes, kind: str | None) -> None:
    assert kind_of_bytes(start) == kind
    assert kind is None or not is_read(kind)


def test_images_by_content_and_what_is_skipped(tmp_path: Path) -> None:
    for name in ("a.png", "b.jfif", "c", "d.png ", "deep/e.JPG"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(encoded("JPEG"))
    (tmp_path / "f.gif").write_bytes(encoded("GIF"))
    (tmp_path / "g.dcm").write_bytes(b"damaged")
    (tmp_path / "h").write_bytes(b"\0" * 128 + b"DICM")
    (tmp_path / "report.dcm").write_bytes(DICOM_REPORT)
    (tmp_path / "i.nef").write_bytes(encoded("TIFF"))
    for name in ("Thumbs.db", "notes.txt", "more.txt", ".DS_Store", "desktop.ini"):
        (tmp_path / name).write_text("text")
    images, skipped = found(tmp_path)
    assert images == ["a.png", "b.jfif", "c", "d.png ", "deep/e.JPG", "g.dcm", "h"]
    assert skipped == {
        "f.gif": "GIF, not read yet",
        "report.dcm": "DICOM without an image",
        "i.nef": "camera raw, not read yet",
        "Thumbs.db": ".db",
        "desktop.ini": ".ini",
        "notes.txt": ".txt",
        "more.txt": ".txt",
        ".DS_Store": "hidden",
    }
    lines = skipped_lines(find_image_files(tmp_path).skipped, tmp_path)
    assert lines == [
        "Skipped 1 file (DICOM without an image): report.dcm",
        "Skipped 1 file (GIF, not read yet): f.gif",
        "Skipped 1 file (camera raw, not read yet): i.nef",
        "Skipped 5 files that are not images (2 .txt, 1 hidden, 1 .db, 1 .ini).",
    ]


def test_links_pipes_and_sockets_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # the name of a socket may not be long
    (tmp_path / "a.png").write_bytes(encoded("PNG"))
    (tmp_path / "gone").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to("loop")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    (tmp_path / "back").symlink_to(tmp_path)
    # A broken link with the suffix of an image counts as one, so that reading it raises an error.
    (tmp_path / "lost.png").symlink_to("nowhere.png")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("socket")
        images, skipped = found(tmp_path)
    assert images == ["a.png", "lost.png"]
    assert skipped.pop("loop").startswith("link that cannot be followed")
    assert skipped == {
        "gone": "broken link",
        "pipe": "named pipe",
        "zero": "device",
        "back": "link to a folder that is read already",
        "socket": "socket",
    }
