"""Kinds of files by their first bytes."""

from __future__ import annotations

import gzip
import os
from pathlib import Path

import pytest
from PIL import Image

from stages.image_kinds import READABLE, kind_of, kind_of_bytes

NIFTI = bytes(344) + b"n+1\x00"
OTHERS = {
    "DICOM": bytes(128) + b"DICM\x02\x00",
    "GIF": b"GIF89a\x01\x00",
    "HEIC": b"\x00\x00\x00\x18ftypheic\x00\x00\x00\x00",
    "AVIF": b"\x00\x00\x00\x1cftypavif\x00\x00\x00\x00",
    "JPEG 2000": b"\x00\x00\x00\x0cjP  \r\n\x87\n\x00",
    "JPEG XL": b"\x00\x00\x00\x0cJXL \r\n\x87\n",
    "NIfTI": NIFTI,
    "PDF": b"%PDF-1.7\n",
    "SVG": b'\xef\xbb\xbf<?xml version="1.0"?>\n<!-- a drawing -->\n<svg xmlns="http://www.w3.org/2000/svg">',
    "ZIP": b"PK\x03\x04",
}


@pytest.mark.parametrize("kind", READABLE)
def test_every_readable_kind_is_recognised_whatever_its_name(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "image.dat"
    Image.new("RGB", (20, 20)).save(path, kind)
    assert kind_of(path) == kind


@pytest.mark.parametrize("kind", OTHERS)
def test_kinds_that_cannot_be_read_have_a_name(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "image.png"
    path.write_bytes(OTHERS[kind])
    assert kind_of(path) == kind


def test_a_compressed_volume_is_told_from_other_compressed_files() -> None:
    assert kind_of_bytes(gzip.compress(NIFTI + bytes(5000))) == "NIfTI"
    assert kind_of_bytes(gzip.compress(b"a,b\n" * 500)) == "gzip"
    assert kind_of_bytes(b"\x1f\x8b") == "gzip"


@pytest.mark.parametrize("text", [b"", b"B", b"BMI,age\n23,50\n" + bytes(20), b"RIFF\x00\x00\x00\x00WAVE", b"<html>"])
def test_other_files_have_no_kind(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "a").write_bytes(text)
    assert kind_of(tmp_path / "a") is None


def test_pipes_and_folders_are_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    assert kind_of(tmp_path / "pipe.png") is None
    assert kind_of(tmp_path) is None
    with pytest.raises(FileNotFoundError):
        kind_of(tmp_path / "missing.png")
