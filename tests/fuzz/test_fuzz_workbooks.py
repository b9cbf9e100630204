"""Mutants of Excel workbooks: each is refused by an FptError, or its rows are those that are in the file.

Changed bytes of the archive are noticed, so that only the original's rows come out. Where the XML in the archive is
changed, the rows have to be those that openpyxl finds with its other reader. FPT_FUZZ_CASES sets the number of mutants,
FPT_FUZZ_SEED selects others.
"""

from __future__ import annotations

import datetime
import io
import os
import random
import re
import resource
import sys
import time
import warnings
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from openpyxl import Workbook, load_workbook

from schemas.data_settings import DataSettings
from schemas.errors import FptError
from stages.prepare.label_table import read_table

SEED = int(os.environ.get("FPT_FUZZ_SEED", "0"))
CASES = int(os.environ.get("FPT_FUZZ_CASES", "200"))
SECONDS = 20
GIBIBYTES = 2
HEADER = ["path", "label", "patient", "note"]
Rows = list[tuple[str, str, str | None]]


def workbook(strings: str) -> bytes:
    """Twelve rows; texts are shared or inline, patients are numbers, texts with zeros, dates and empty."""
    book = Workbook()
    sheet = book.active
    assert sheet is not None
    sheet.append(HEADER)
    patients: list[Any] = [7, "007", 12.0, datetime.date(2024, 5, 31), None, "NaN"]
    for number in range(12):
        sheet.append([f"{number:02}.png", "ab"[number % 2], patients[number % 6], ("x", 1.5, True)[number % 3]])
        if number % 6 == 2:
            sheet.cell(number + 2, 3).number_format = "00000"
    if strings == "inline":
        hidden = book.create_sheet("old")
        hidden.append(["nothing"])
        hidden.sheet_state = "hidden"
    out = io.BytesIO()
    book.save(out)
    return out.getvalue()


ORIGINALS = [workbook("shared"), workbook("inline")]
XML = [
    *(
        b"<c ",
        b"</c>",
        b"<v>",
        b"</row>",
        b't="s"',
        b't="e"',
        b't="b"',
        b"<f>1</f>",
        b'r="A1"',
        b"&amp;",
        b"\0",
        b"9" * 20,
    ),
    *(b"-1", b"", b"<mergeCell ", b'<!DOCTYPE x [<!ENTITY a "aaaa">]>', b"&a;", b"1e999", b"\xff"),
]


def edited(rng: random.Random, data: bytes, words: list[bytes]) -> bytes:
    for _ in range(rng.randint(1, 3)):
        place, length = rng.randrange(len(data) + 1), rng.randint(0, 8)
        new = rng.choice([rng.randbytes(rng.randint(1, 4)), rng.choice(words), data[place : place + 40 * length]])
        data = data[:place] + new + data[place + (length if rng.random() < 0.6 else 0) :]
    return data[: rng.randrange(len(data) + 1)] if rng.random() < 0.05 else data


def flipped(rng: random.Random, data: bytes) -> bytes:
    """Change one byte or two, or cut the file."""
    mutant = bytearray(data)
    for _ in range(rng.randint(1, 2)):
        mutant[rng.randrange(len(mutant))] = rng.randrange(256)
    return bytes(mutant[: rng.randrange(len(mutant))] if rng.random() < 0.05 else mutant)


ELEMENTS = re.compile(rb"<(c|row|v|is|t|si|sheet|sheetData|dimension)\b[^>]*?(/>|>.*?</\1>)", re.DOTALL)
ATTRIBUTES = re.compile(rb'(?<= )(r|t|s|ref|state|count|name|sheetId)="[^"]*"')
VALUES = re.compile(rb">[^<>]+<")


def rearranged(rng: random.Random, data: bytes) -> bytes:
    """Remove, repeat or exchange elements, or write other attributes and values: the XML stays sound."""
    kind = rng.randrange(5)
    found = list((ELEMENTS, ELEMENTS, ELEMENTS, ATTRIBUTES, VALUES)[kind].finditer(data))
    if not found:
        return data
    one, other = sorted((rng.choice(found), rng.choice(found)), key=lambda match: match.start())
    if kind == 0:
        return data[: one.start()] + data[one.end() :]
    if kind == 1:
        return data[: one.start()] + one[0] + data[one.start() :]
    if kind == 2 and one.end() <= other.start():
        return data[: one.start()] + other[0] + data[one.end() : other.start()] + one[0] + data[other.end() :]
    if kind == 3:
        value = rng.choice(
            [b"", b"A1", b"C3", b"s", b"b", b"e", b"n", b"inlineStr", b"str", b"d", b"999999", b"hidden", b"-1"]
        )
        return data[: one.start()] + one[1] + b'="' + value + b'"' + data[one.end() :]
    if kind == 4:
        value = rng.choice([b"0", b"1", b"99", b"1e3", b"-1", b"nan", b"x", b" 3.0 ", b"9" * 16, b"00.png", b"a"])
        return data[: one.start() + 1] + value + data[one.end() - 1 :]
    return data


def inner(rng: random.Random, raw: bytes) -> bytes:
    """Change one or two members of the archive, which is valid afterwards."""
    with zipfile.ZipFile(io.BytesIO(raw)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    likely = [name for name in members if "worksheets" in name or "sharedStrings" in name or "workbook.xml" in name]
    for name in rng.sample(likely if rng.random() < 0.8 else list(members), rng.randint(1, 2)):
        sound = rng.random() < 0.8
        members[name] = rearranged(rng, members[name]) if sound else edited(rng, members[name], XML)
        if rng.random() < 0.05:
            del members[name]
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return out.getvalue()


def read(folder: Path, raw: bytes) -> Rows:
    (folder / "labels.xlsx").write_bytes(raw)
    data = DataSettings(labels="labels.xlsx", group_column="patient", label_column="label")
    table = read_table(data, folder, folder)
    return [(item.path, item.label, item.group) for item in table.items]


def reference(raw: bytes) -> list[str] | None:
    """All values of the visible sheets by openpyxl's reader for editing; None if it refuses another part."""
    try:
        book = load_workbook(io.BytesIO(raw), data_only=True)
    # It raises nearly anything, also for sheets that are hidden.
    except Exception:
        return None
    cells = (
        cell for sheet in book.worksheets if sheet.sheet_state == "visible" for row in sheet.iter_rows() for cell in row
    )
    return [str(cell.value).replace("\0", "") for cell in cells if cell.value is not None]


def known(text: str, values: set[str]) -> bool:
    """Whether a cell has this text, apart from blanks, zeros of its format, and times of a date at midnight."""
    short = text.strip()
    return short in values or short.lstrip("0") in {value.removesuffix(".0") for value in values} | {""} or any(
        value.startswith(short) and value.endswith("00:00:00") for value in values
    )  # fmt: skip


@pytest.mark.parametrize("level", ["bytes", "xml"])
def test_mutants_are_refused_or_have_the_rows_of_the_file(tmp_path: Path, level: str) -> None:
    warnings.simplefilter("ignore")
    originals = [read(tmp_path, raw) for raw in ORIGINALS]
    assert len(originals[0]) == 12 and originals[0][1] == ("01.png", "b", "007") and originals[0][2][2] == "00012"
    outcomes: Counter[str] = Counter()
    slowest = 0.0
    for case in range(CASES):
        rng = random.Random(f"{SEED}/{level}/{case}")
        number = rng.randrange(len(ORIGINALS))
        raw = ORIGINALS[number]
        mutant = flipped(rng, raw) if level == "bytes" else inner(rng, raw)
        start = time.process_time()
        try:
            rows = read(tmp_path, mutant)
        except FptError:
            outcomes["refused"] += 1
            continue
        finally:
            slowest = max(slowest, time.process_time() - start)
        if rows == originals[number]:
            outcomes["as the original"] += 1
            continue
        outcomes["other rows"] += 1
        assert level == "xml", f"case {case} of seed {SEED}: changed bytes change rows"
        if (cells := reference(mutant)) is None:
            outcomes["not compared"] += 1
            continue
        values = {value.strip() for value in cells}
        for path, label, group in rows:
            found = all(known(text, values) for text in (path, label, group) if text is not None)
            assert found, f"case {case} of seed {SEED}: {path}, {label}, {group}"
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform != "darwin" else 2**30)
    sys.stdout.write(f"{level}: {dict(outcomes)}, slowest {slowest:.2f} CPU s, peak {peak:.2f} GiB\n")
    assert slowest < SECONDS and peak < GIBIBYTES
    assert outcomes["refused"] > CASES / 20 and CASES - outcomes["refused"] > CASES / 20
