"""In which verbs threads of torch wait only briefly before they sleep."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROBE = """\
import os, sys
from pipeline.cli import main
try:
    main(sys.argv[1:])
except SystemExit:
    print(os.environ.get("OMP_WAIT_POLICY"), os.environ.get("GOMP_SPINCOUNT"))
"""


def waiting(folder: Path, words: str, probe: str = PROBE, **variables: str) -> str:
    kept = {name: value for name, value in os.environ.items() if name not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    command = [sys.executable, "-c", probe, *words.split()]
    done = subprocess.run(command, cwd=folder, env=kept | variables, capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.mark.parametrize(
    ("words", "spins"),
    [
        ("extract", "1000"),
        ("predict images", "1000"),
        ("evaluate --images images", "1000"),
        ("train", "None"),
        ("evaluate", "None"),
    ],
)
def test_threads_wait_briefly_in_verbs_that_run_the_lpm(tmp_path: Path, words: str, spins: str) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images/a.png").touch()
    assert waiting(tmp_path, words) == f"None {spins}"


def test_the_environment_of_the_user_stays(tmp_path: Path) -> None:
    assert waiting(tmp_path, "extract", OMP_WAIT_POLICY="ACTIVE") == "ACTIVE None"
    assert waiting(tmp_path, "extract", GOMP_SPINCOUNT="70") == "None 70"


def test_once_torch_is_imported_nothing_is_set(tmp_path: Path) -> None:
    """The threads of this process no longer read the variable, and those of others, such as trainings, would."""
    assert waiting(tmp_path, "extract", "import torch\n" + PROBE) == "None None"
