"""Flipped and truncated bytes of the manifest and of predictions: the content is read as written, or refused.

FPT_FUZZ_SEED selects other cases, FPT_FUZZ_CASES their number.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from schemas.errors import EvaluationError, ManifestError
from schemas.manifest import Manifest, ManifestRow
from stages.evaluate.predictions import Predictions, read_predictions, write_predictions
from stages.manifest import read_manifest, write_manifest

SEED = int(os.environ.get("FPT_FUZZ_SEED", "0"))
CASES = int(os.environ.get("FPT_FUZZ_CASES", "700"))

SPLITS = ("train", "val", "test")
ROWS = tuple(
    ManifestRow(
        id=f"{number * 7919:064x}",
        path=f"{'benign' if number % 2 else 'malign'}/{number:03d}.png",
        label="benign" if number % 2 else "malign",
        group=f"patient {number // 4}",
        split=SPLITS[number % 3],  # type: ignore[arg-type]
    )
    for number in range(40)
)
MANIFEST = Manifest(classes=("benign", "malign"), rows=tuple(sorted(ROWS, key=lambda row: row.path)))
PREDICTIONS = Predictions(
    ("benign", "malign"), ROWS, np.random.default_rng(1).dirichlet(np.ones(2), len(ROWS)).astype(np.float32)
)


def _predictions(path: Path) -> Any:
    found = read_predictions(path)
    return found.classes, found.rows, found.probabilities.tobytes(), found.model, found.task


FILES: dict[str, tuple[Callable[[Path], None], Callable[[Path], Any], type[Exception]]] = {
    "manifest": (lambda path: write_manifest(MANIFEST, path), read_manifest, ManifestError),
    "predictions": (lambda path: write_predictions(PREDICTIONS, path), _predictions, EvaluationError),
}


@pytest.mark.parametrize("kind", FILES)
def test_damage_is_refused_or_changes_nothing(tmp_path: Path, kind: str) -> None:
    write, read, error = FILES[kind]
    path = tmp_path / "table.parquet"
    write(path)
    whole, content = path.read_bytes(), read(path)
    random = np.random.default_rng(SEED)
    refused = 0
    for case in range(CASES):
        data = bytearray(whole)
        if case % 10 == 0:
            del data[int(random.integers(len(data))) :]
        else:
            for _ in range(1 + case % 3):
                data[int(random.integers(len(data)))] ^= int(random.integers(1, 256))
        path.write_bytes(data)
        try:
            found = read(path)
        except error:
            refused += 1
        else:
            assert found == content, f"case {case} of seed {SEED}"
    assert refused > CASES / 2


@pytest.mark.parametrize("kind", FILES)
def test_every_single_bit_of_the_end_is_refused_or_changes_nothing(tmp_path: Path, kind: str) -> None:
    """The footer has the schema, its metadata and the page offsets, which have no page checksum."""
    write, read, error = FILES[kind]
    path = tmp_path / "table.parquet"
    write(path)
    whole, content = path.read_bytes(), read(path)
    step = max(1, 8 * 1500 // CASES)
    for bit in range(SEED % step, 8 * min(len(whole), 3000), step):
        data = bytearray(whole)
        data[-1 - bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
        try:
            found = read(path)
        except error:
            continue
        assert found == content, f"bit {bit} from the end"
