"""SIGKILL at random moments changes nothing in the end; SOAK_KILLS=50 for the long form."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from soak import soak


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_killed_extraction_ends_with_the_same_bytes(tmp_path: Path) -> None:
    wanted = int(os.environ.get("SOAK_KILLS", "3"))
    hits, stores = soak(tmp_path, wanted)
    assert hits >= wanted
    assert stores >= 1
