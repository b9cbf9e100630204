from __future__ import annotations

from pathlib import Path

import pytest
from study import Study, make_study


@pytest.fixture
def study(tmp_path: Path) -> Study:
    """24 images of three classes, prepared, not extracted."""
    return make_study(tmp_path)
