"""Kills `fpt extract` at random moments, then compares the store with one that was never disturbed.

PYTHONPATH=.:tests python tests/soak.py 50
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from study import make_study

from pipeline.params import dump_settings

EXTRACT = [sys.executable, "-c", "from pipeline.cli import main; main()", "extract"]


def array_bytes(cache: Path) -> dict[str, bytes]:
    """Every file of the arrays, metadata included."""
    (group,) = cache.glob("*/features.zarr")
    return {str(path.relative_to(group)): path.read_bytes() for path in group.rglob("*") if path.is_file()}


def make(root: Path, images: int) -> None:
    """A study whose extraction takes a few times its start."""
    study = make_study(root, images, compute={"threads": 1, "device": "cpu", "extract_batch_size": 1})
    (root / "params.yaml").write_text(dump_settings(study.settings))


def soak(folder: Path, kills: int, images: int = 40, seed: int = 0) -> tuple[int, int]:
    """Kill as often as asked, on as many studies as that takes; every finished store must equal the calm one.

    Returns:
        (kills that hit a running extraction, stores that were compared).
    """
    make(folder / "calm", images)
    start = time.monotonic()
    _extract(folder / "calm").wait(300)
    whole = time.monotonic() - start
    expected = array_bytes(folder / "calm/.fpt/cache")
    pick, hits, stores = random.Random(seed), 0, 0
    while hits < kills:
        root = folder / f"killed-{stores}"
        make(root, images)
        finished = False
        while not finished:
            process = _extract(root)
            try:
                # The start takes most of it: the moments are drawn so that half of them lie in the work itself.
                wait = pick.uniform(0.55 * whole, whole) if pick.random() < 0.8 else pick.uniform(0, whole)
                finished = process.wait(wait if hits < kills else 300) == 0
                if not finished:
                    raise RuntimeError(f"extract failed: {process.stderr.read() if process.stderr else b''!r}")
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                hits += 1
        stores += 1
        found = array_bytes(root / ".fpt/cache")
        different = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
        if different:
            raise AssertionError(f"after {hits} kills {different} differ")
    return hits, stores


def _extract(root: Path) -> subprocess.Popen[bytes]:
    environment = {name: value for name, value in os.environ.items() if name != "FPT_CACHE_DIR"}
    return subprocess.Popen(EXTRACT, cwd=root, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        begin = time.monotonic()
        done, compared = soak(Path(name), int(sys.argv[1]) if len(sys.argv) > 1 else 50)
        sys.stdout.write(f"{done} kills, {compared} stores equal, {time.monotonic() - begin:.0f} s\n")
