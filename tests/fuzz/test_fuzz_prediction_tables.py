"""Predictions with hostile file and class names survive a round trip through CSV, TSV, Parquet and Excel.

One hour: `FPT_FUZZ_CASES=100000 FPT_FUZZ_SEED=1 pytest tests/fuzz/test_fuzz_prediction_tables.py`.
"""

import csv
import io
import os
import re
import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory

import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from openpyxl import load_workbook

from schemas.results import Prediction
from stages.predict import predictions_csv, write_predictions_table
from stages.tables import plain_cell

CASES = int(os.environ.get("FPT_FUZZ_CASES", "60"))
SEED = os.environ.get("FPT_FUZZ_SEED")

attack = settings(
    max_examples=CASES, derandomize=SEED is None, deadline=None, suppress_health_check=list(HealthCheck), database=None
)
HOSTILE = ["=1+1", "+cmd|'/c calc'!A0", "-2", "@SUM(A1)", "'=1", "\t=1", "\r=1", "a,b;c", 'q"uo"te', "two\nlines",
           "two\rlines", "_x0041_", "_x000a_", "\x07bell", "\x1b[31m", " edges ", "\u202egnp.exe", "\ufffe",
           "\ufeffmark", "1e5", "TRUE", "#N/A", "模型"]  # fmt: skip
texts = st.one_of(st.sampled_from(HOSTILE), st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=30))
# How Python represents file names that are not text.
paths = st.one_of(texts, st.binary(min_size=1, max_size=12).map(lambda raw: raw.decode("utf-8", "surrogateescape")))
shares = st.floats(0.0, 1.0).map(lambda value: round(value, 6))


@st.composite
def predictions(draw: st.DrawFn) -> list[Prediction]:
    classes = draw(st.lists(texts, min_size=2, max_size=4, unique=True))
    rows = []
    for path in draw(st.lists(paths, min_size=1, max_size=4)):
        if draw(st.booleans()):
            p = dict(zip(classes, draw(st.lists(shares, min_size=len(classes), max_size=len(classes))), strict=True))
            rows.append(Prediction(path=path, predicted=draw(st.sampled_from(classes)), probabilities=p, error=None))
        else:
            rows.append(Prediction(path=path, predicted=None, probabilities=None, error=draw(texts)))
    return rows


def expected(rows: list[Prediction]) -> list[list[object]]:
    """Return header and rows, with None for empty cells and escapes for bytes that are not text."""
    classes = next((list(row.probabilities) for row in rows if row.probabilities), [])
    header: list[object] = ["path", "predicted", *(f"p_{name}" for name in classes), "error"]
    return [header] + [
        [
            row.path.encode("utf-8", "backslashreplace").decode(),
            row.predicted,
            *((row.probabilities or {}).get(name) for name in classes),
            row.error,
        ]
        for row in rows
    ]


def from_excel(value: object) -> object:
    """Decode a text as Excel does, because openpyxl keeps the escapes in cells of this type."""
    if not isinstance(value, str):
        return value
    return re.sub(r"_x([0-9A-Fa-f]{4})_", lambda found: chr(int(found.group(1), 16)), value)


@seed(int(SEED or 0))
@attack
@pytest.mark.parametrize("delimiter", [",", "\t"])
@given(rows=predictions())
def test_text_formats_hold_every_name_and_no_formula(delimiter: str, rows: list[Prediction]) -> None:
    text = predictions_csv(rows, delimiter)
    found = list(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter))
    plain = expected(rows)
    assert found[0] == plain[0]
    for cells, (path, predicted, *p, error) in zip(found[1:], plain[1:], strict=True):
        assert [plain_cell(cell) for cell in (cells[0], cells[1], cells[-1])] == [path, predicted or "", error or ""]
        assert not any(cell.startswith(("=", "+", "-", "@", "\t", "\r")) for cell in cells)
        assert [float(cell) if cell else None for cell in cells[2:-1]] == p


@seed(int(SEED or 0))
@attack
@given(predictions())
def test_excel_holds_every_name_as_text_and_every_number_as_number(rows: list[Prediction]) -> None:
    with TemporaryDirectory() as folder:
        write_predictions_table(rows, Path(folder) / "p.xlsx")
        sheet = load_workbook(Path(folder) / "p.xlsx")["predictions"]
        cells = list(sheet.iter_rows())
        assert [[from_excel(cell.value) for cell in row] for row in cells] == expected(rows)
        assert all(cell.data_type in "sn" for row in cells for cell in row)
        with zipfile.ZipFile(Path(folder) / "p.xlsx") as book:
            assert b"<f>" not in book.read("xl/worksheets/sheet1.xml")


@seed(int(SEED or 0))
@attack
@given(predictions())
def test_parquet_holds_every_name(rows: list[Prediction]) -> None:
    with TemporaryDirectory() as folder:
        write_predictions_table(rows, Path(folder) / "p.parquet")
        table = pq.read_table(Path(folder) / "p.parquet")
        columns = [column.to_pylist() for column in table.columns]
        assert [table.column_names, *map(list, zip(*columns, strict=True))] == expected(rows)
