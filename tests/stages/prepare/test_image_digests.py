"""Corrupt data for which decoders only warn: `data.on_warning` in prepare."""

from __future__ import annotations

from pathlib import Path

import pytest
from study import make_images

from schemas.data_settings import DataSettings
from schemas.errors import UnreadableImagesError
from stages.prepare import prepare


@pytest.fixture
def data(tmp_path: Path) -> DataSettings:
    """Three classes of four images, one of them without the end of its last chunk."""
    make_images(tmp_path / "images", 4)
    path = tmp_path / "images/grid/0-000.png"
    path.write_bytes(path.read_bytes()[:-12])
    return DataSettings(images="images")


def test_images_with_corrupt_data_cannot_be_read_unless_they_are_accepted(data: DataSettings, tmp_path: Path) -> None:
    with pytest.raises(UnreadableImagesError) as caught:
        prepare(data, tmp_path, tmp_path / "out")
    assert caught.value.failures == (("grid/0-000.png", "the file is truncated"),)
    aside = prepare(data.model_copy(update={"on_error": "quarantine"}), tmp_path, tmp_path / "out")
    assert (aside.images, aside.quarantined, aside.warned) == (11, 1, 0)
    accepted = prepare(data.model_copy(update={"on_warning": "accept"}), tmp_path, tmp_path / "out")
    assert (accepted.images, accepted.quarantined, accepted.warned) == (12, 0, 1)
