"""Files of a shift bench."""

from __future__ import annotations

import csv
from pathlib import Path

from pipeline.bench_result import rows_as_csv
from pipeline.shift_bench import write_shift
from schemas.shift import Condition, ShiftResult, ShiftRow
from schemas.sweeps import Spread


def test_a_site_that_reads_as_a_formula_is_escaped(tmp_path: Path) -> None:
    row = ShiftRow(
        shots="all", method="linear", condition=Condition(shift="site", site="=1+1"), adapt=None, images=4,
        metrics={"auc": Spread(mean=0.5, std=None, values=(0.5,))},
    )  # fmt: skip
    result = ShiftResult(rows=(row,), seed=0, batch=8, left_out={}, machine={}, versions={})
    write_shift(result, tmp_path)
    (line,) = csv.DictReader((tmp_path / "shift.csv").open())
    assert (line["site"], line["strength"], line["auc"], line["brier"]) == ("'=1+1", "0", "0.5", "")


def test_numbers_of_a_table_stay_numbers() -> None:
    rows = [{"method": "-x", "auc": -0.5, "runs": 2, "rate": 1e-05, "val": None}]
    assert rows_as_csv(rows) == b"method,auc,runs,rate,val\n'-x,-0.5,2,1e-05,\n"
    assert rows_as_csv([]) == b""
