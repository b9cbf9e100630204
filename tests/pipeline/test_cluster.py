"""Stage one on real workers: whatever dies, the store is the one that a single process writes."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from soak import array_bytes
from study import Study, make_study

from pipeline.cluster.run import on_cluster
from schemas.errors import ClusterError, StorageError, UnreadableImagesError, WeightsError
from schemas.parse import parse_settings

pytestmark = pytest.mark.timeout(240)


def cluster(**keys: Any) -> Any:
    return parse_settings({"cluster": {"kind": "local", **keys}}).cluster


@pytest.fixture
def local(study: Study) -> Study:
    """The study with two workers of one torch thread."""
    study.settings = study.settings.model_copy(update={"cluster": cluster()})
    return study


def test_workers_write_the_same_store_as_a_single_process(local: Study, tmp_path: Path) -> None:
    calm = make_study(tmp_path / "calm")
    expected = calm.extract()
    told: list[int] = []
    receipt = local.extract(execute=on_cluster, progress=lambda progress: told.append(progress.done))
    assert array_bytes(local.cache) == array_bytes(calm.cache)
    assert receipt.fingerprint == expected.fingerprint
    assert told == sorted(told)
    assert told[-1] == 24
    lines = (local.root / ".fpt/logs/extract.log").read_text().splitlines()
    assert "shards 0/6" in lines[0] and "workers 2" in lines[0]
    assert "shards 6/6 images 24" in lines[-1]
    assert not list(local.cache.glob("*/locks/fpt-*"))
