"""Ctrl-C sent to real processes: finished work is kept, and the next run computes the rest."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from study import Study, make_study

from pipeline.interrupt import interrupted_message
from pipeline.params import dump_settings
from schemas.features import ExtractionReceipt
from stages.store.reader import open_store

SLOW = """
import signal, time
signal.signal(signal.SIGINT, signal.default_int_handler)
import stages.extract.shard_task as work
compute = work.compute_features
def slow(*arguments):
    open("forwards", "a").write("x")
    time.sleep({seconds})
    return compute(*arguments)
work.compute_features = slow
from pipeline.cli import main
main()
"""
"""Simulates the slow forward pass of a large LPM, and restores Ctrl-C, which background processes ignore."""

NAMES = ("keys", "values", "indices", "side")


@pytest.fixture
def study(tmp_path: Path) -> Study:
    compute = {"threads": 1, "device": "cpu", "extract_batch_size": 2}
    # One shard, of 12 images and 6 forward passes.
    made = make_study(tmp_path / "study", 4, compute=compute, features={"shard_size": 32})
    (made.root / "params.yaml").write_text(dump_settings(made.settings))
    return made


def start(study: Study, *words: str, seconds: float) -> subprocess.Popen[str]:
    environment = {**os.environ, "FPT_CACHE_DIR": str(study.cache)}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    program = [sys.executable, "-c", SLOW.format(seconds=seconds), *words]
    options: dict[str, Any] = {"cwd": study.root, "env": environment, "start_new_session": True, "text": True}
    return subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)


def wait_for_passes(study: Study, process: subprocess.Popen[str], passes: int) -> None:
    """Wait until a number of forward passes have started."""
    counted, end = study.root / "forwards", time.monotonic() + 60
    while not counted.exists() or counted.stat().st_size < passes:
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.02)


def stored(study: Study) -> dict[str, list[bytes]]:
    """Return image -> bytes of all its features."""
    receipt = ExtractionReceipt.model_validate_json((study.features / "receipt.json").read_bytes())
    with closing(open_store(study.cache, receipt)) as reader:
        rows = {row.id: reader.read([row.id], NAMES) for row in study.manifest.rows}
    return {name: [arrays[key].tobytes() for key in NAMES] for name, arrays in rows.items()}


def test_an_interrupted_extraction_keeps_what_is_computed_and_is_resumed(study: Study) -> None:
    process = start(study, "extract", seconds=0.4)
    wait_for_passes(study, process, 3)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    kept = int(re.search(r"Interrupted\. (\d+) of 12 rows are in the store\. Run `fpt extract` again\.", err)[1])
    assert 4 <= kept < 12 and kept % 2 == 0
    process = start(study, "extract", "--json", seconds=0)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    report = json.loads(out)
    assert (report["cached"], report["computed"], report["rows"]) == (kept, 12 - kept, 12)
    interrupted = stored(study)
    shutil.rmtree(study.cache)
    study.extract()
    assert interrupted == stored(study)


def test_a_second_ctrl_c_stops_at_once_and_damages_nothing(study: Study) -> None:
    process = start(study, "extract", seconds=120)
    wait_for_passes(study, process, 1)
    process.send_signal(signal.SIGTERM)
    assert process.stderr is not None
    # Printed while the forward pass is still running.
    assert "Press Ctrl-C again" in process.stderr.readline()
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=10) == 130
    assert "Finished shards are kept" in process.stderr.read()
    study.extract()
    assert len(stored(study)) == 12


def test_each_verb_tells_what_it_keeps() -> None:
    assert interrupted_message(["train", "--set", "train.lr=1e-3"], KeyboardInterrupt()) == (
        "Interrupted. Finished epochs are kept. Run `fpt train --set train.lr=1e-3` again."
    )
    assert interrupted_message(["cost"], KeyboardInterrupt()) == "Interrupted."
    for verb in ("prepare", "extract", "train", "sweep", "evaluate", "predict"):
        assert f"`fpt {verb}` again" in interrupted_message([verb], KeyboardInterrupt())
