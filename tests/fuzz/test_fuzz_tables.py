"""Random tables and class folders end in a manifest of exactly the given rows, or in an `FptError`.

One hour: FPT_FUZZ_CASES=100000 FPT_FUZZ_SEED=1 python -m pytest tests/fuzz/test_fuzz_tables.py --timeout=0
"""

from __future__ import annotations

import csv
import io
import os
import random
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from schemas.data_settings import DataSettings
from schemas.errors import FptError
from stages.manifest import read_manifest
from stages.prepare import prepare
from stages.prepare.label_table import read_table

SEED = int(os.environ.get("FPT_FUZZ_SEED", "0"))
CASES = int(os.environ.get("FPT_FUZZ_CASES", "0"))

NAMES = [
    "a",
    "Ä b",
    "=1+1",
    "-x",
    "@y",
    "'=z",
    'q"u',
    "tab\tin",
    "new\nline",
    "c,d",
    "e;f",
    "g|h",
    "  out ",
    "nan",
    "日本",
]
CELLS = [
    "",
    " ",
    "NaN",
    "none",
    "?",
    "x",
    "y",
    "0",
    "1",
    "-1",
    '"',
    "'",
    "train",
    "Val",
    "testing",
    "p1",
    "\x07",
    "\x1b[31m",
]
ENCODINGS = ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "latin-1", "cp1252", "utf-32"]


def picture(path: Path, number: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(number).integers(0, 256, (16, 16), dtype=np.uint8)
    with path.open("wb") as file:
        Image.fromarray(pixels).save(file, "BMP")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write forty images with unusual names."""
    folder = tmp_path_factory.mktemp("fuzz") / "images"
    for number in range(40):
        picture(folder / f"{NAMES[number % len(NAMES)]}{number}.png", number)
    return folder


def a_row(rng: random.Random, names: list[str], number: int) -> dict[str, str]:
    return {
        "path": names[number % len(names)],
        "label": rng.choice(["x", "y", "zz"]),
        "patient": rng.choice(["", f"p{number // 2}", "NaN"]),
        "split": "",
        "note": rng.choice(NAMES),
    }


def spoil(rng: random.Random, raw: bytes) -> bytes:
    """Damage a file in ways typical of editors, transfers and spreadsheets."""
    kind = rng.randrange(8)
    if kind == 0:
        place = rng.randrange(len(raw))
        return raw[:place] + bytes([rng.randrange(256)]) + raw[place + 1 :]
    if kind == 1:
        return raw[: rng.randrange(len(raw))]
    if kind == 2:
        place = rng.randrange(len(raw))
        return raw[:place] + rng.choice([b'"', b"\0", b"\r", b"\n", b",", b";", b"\xff"]) + raw[place:]
    if kind == 3:
        lines = raw.split(b"\n")
        rng.shuffle(lines)
        return b"\n".join(lines)
    if kind == 4:
        return raw.replace(b"\n", rng.choice([b"\r\n", b"\r", b"\n\n", b",\n"]))
    if kind == 5:
        return raw + b"x" * 200_000
    if kind == 6:
        return rng.choice([b"PK\x03\x04", b"\x80\x04", b"PAR1", b"\x1f\x8b"]) + raw
    return rng.randbytes(rng.randrange(400))


def write(rows: list[dict[str, str]], header: list[str], delimiter: str, quoting: int) -> str:
    text = io.StringIO()
    writer = csv.writer(text, delimiter=delimiter, quoting=quoting, lineterminator="\n")  # type: ignore[arg-type]
    writer.writerow(header)
    writer.writerows([row.get(name, "") for name in header] for row in rows)
    return text.getvalue()


def test_a_sound_table_is_read_as_it_is(images: Path, tmp_path: Path) -> None:
    """Exactly the given rows are read, for any separator, quoting, order and encoding."""
    names = sorted(path.name for path in images.iterdir())
    for case in range(CASES or 150):
        rng = random.Random(f"{SEED}/sound/{case}")
        rows = [a_row(rng, names, number) for number in rng.sample(range(len(names)), rng.randint(1, len(names)))]
        header = rng.sample(["path", "label", "patient", "split", "note"], 5)
        text = write(rows, header, rng.choice(",;\t|"), csv.QUOTE_ALL)
        (tmp_path / "labels.csv").write_bytes(text.encode(rng.choice(["utf-8", "utf-8-sig", "utf-16"])))
        table = read_table(DataSettings(labels="labels.csv"), tmp_path, images)
        found = [(item.path, item.label, item.group, item.split) for item in table.items]
        groups = {"": None, "NaN": None}
        expected = [(row["path"], row["label"], groups.get(row["patient"], row["patient"]), None) for row in rows]
        assert sorted(found, key=str) == sorted(expected, key=str), f"case {case} of seed {SEED}"


def test_a_spoilt_table_is_an_error_or_a_table(images: Path, tmp_path: Path) -> None:
    """No other exception, and no row that the CSV module would not read as well."""
    names = sorted(path.name for path in images.iterdir())
    outcomes: Counter[str] = Counter()
    for case in range(CASES or 600):
        rng = random.Random(f"{SEED}/spoilt/{case}")
        rows = [a_row(rng, names, number) for number in range(rng.randint(1, 12))]
        for row in rng.sample(rows, rng.randint(0, min(2, len(rows)))):
            row[rng.choice(list(row))] = rng.choice(CELLS)
        header = [
            "path",
            "label",
            *rng.sample(["patient", "Case", "split", "note", "path", "label"], rng.randint(0, 3)),
        ]
        text = write(rows, header, rng.choice(",;\t|"), rng.choice([csv.QUOTE_ALL, csv.QUOTE_MINIMAL]))
        raw = text.encode(rng.choice(ENCODINGS), errors="replace")
        if rng.random() < 0.7:
            raw = spoil(rng, raw)
        (tmp_path / "labels.csv").write_bytes(raw)
        data = DataSettings.model_validate(
            {
                "labels": "labels.csv",
                "task": rng.choice(["multiclass", "multilabel"]),
                "group_column": rng.choice(["auto", None, "patient"]),
                "split_column": rng.choice(["auto", None]),
            }
        )
        try:
            table = read_table(data, tmp_path, images)
        except FptError:
            outcomes["error"] += 1
            continue
        outcomes["table"] += 1
        assert table.items
        assert all(item.path and (item.label or data.task == "multilabel") for item in table.items)
        assert len({item.path for item in table.items}) == len(table.items)
        # Every cell of every row is in the file.
        plain = raw.decode("utf-16" if raw.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig").replace('""', '"')
        for item in table.items:
            assert item.group is None or item.group in plain
            assert all(name in plain for name in item.label.split("|"))
    assert (outcomes["error"] > 50 and outcomes["table"] > 50) or CASES, outcomes


def a_folder(rng: random.Random, root: Path) -> set[tuple[str, str]]:
    """Write class folders with unusual names, and return (path, label) of every image."""
    expected = set()
    for label in rng.sample(NAMES, rng.randint(1, 3)):
        depth = rng.choice([0, 0, 1])
        for number in range(rng.choice([0, 3, 4, 4, 5])):
            below = f"{rng.choice(NAMES)}{number}/" if depth and rng.random() < 0.9 else ""
            name = f"{label}/{below}{rng.choice(NAMES)}{number}{rng.choice(['.png', '', '.jfif', '.png ', '.PNG'])}"
            if name.split("/")[-1].startswith("."):
                continue
            picture(root / name, rng.randrange(10**9))
            expected.add((name, label.strip()))
    for _ in range(rng.randint(0, 2)):
        place = rng.choice([root, *(path for path in root.iterdir() if path.is_dir())])
        extra = place / rng.choice(["Thumbs.db", "scan.dcm", "stray.png", "pipe", "gone", ".hidden.png", "notes.txt"])
        if extra.exists() or extra.is_symlink():
            continue
        if extra.name == "pipe":
            os.mkfifo(extra)
        elif extra.name == "gone":
            extra.symlink_to("nowhere")
        else:
            extra.write_bytes(rng.randbytes(20))
    return expected


def test_class_folders_of_odd_names(tmp_path: Path) -> None:
    outcomes: Counter[str] = Counter()
    for case in range(CASES or 120):
        rng = random.Random(f"{SEED}/folders/{case}")
        root = tmp_path / "images"
        root.mkdir()
        expected = a_folder(rng, root)
        data = DataSettings.model_validate(
            {
                "images": "images",
                "on_error": rng.choice(["fail", "quarantine"]),
                "group_column": rng.choice(["auto", "auto", None, "folder"]),
            }
        )
        try:
            prepare(data, tmp_path, tmp_path / "out")
        except FptError:
            outcomes["error"] += 1
        else:
            outcomes["manifest"] += 1
            rows = read_manifest(tmp_path / "out/manifest.parquet").rows
            assert {(row.path, row.label) for row in rows} == expected, f"case {case} of seed {SEED}"
        shutil.rmtree(root)
    assert (outcomes["error"] > 10 and outcomes["manifest"] > 10) or CASES, outcomes
