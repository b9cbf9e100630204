"""Images within the limits of the settings of a study."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from image_files import gradient
from PIL import Image

from schemas.data_settings import DataSettings
from schemas.errors import ImageError
from schemas.rendering import DEFAULT_RENDERING
from stages.study_images import within_limits


def test_an_image_is_read_within_the_limits(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.fromarray(gradient()).save(path)
    with within_limits(path, DataSettings(), DEFAULT_RENDERING) as image:
        assert np.array_equal(np.asarray(image), gradient())
    for limits in ({"min_side": 31}, {"max_pixels": 40 * 30 - 1}):
        with pytest.raises(ImageError), within_limits(path, DataSettings(**limits), DEFAULT_RENDERING):
            pass


def test_corrupt_data_is_accepted_only_by_the_setting(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.fromarray(gradient()).save(path)
    data = bytearray(path.read_bytes())
    data[-16] ^= 1  # The checksum of the pixels.
    path.write_bytes(data)
    with pytest.raises(ImageError, match="checksum"), within_limits(path, DataSettings(), DEFAULT_RENDERING):
        pass
    with within_limits(path, DataSettings(on_warning="accept"), DEFAULT_RENDERING) as image:
        assert image.size == (40, 30)
