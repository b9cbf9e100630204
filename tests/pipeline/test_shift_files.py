"""Files of a shift bench."""

from __future__ import annotations

import csv
from pathlib import Path

from pipeline.bench_result import rows_as_csv
from pipeline.shift_bench import condition_rows, held_out_sites, write_shift
from schemas.manifest import Manifest, ManifestRow
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


def test_a_held_out_site_is_compared_with_the_sites_of_the_training_images() -> None:
    places = [
        ("north", "train"),
        ("north", "test"),
        ("south", "val"),
        ("south", "test"),
        ("east", "test"),
        (None, "test"),
    ]
    rows = tuple(
        ManifestRow(id=f"{number:064x}", path=f"{number}.png", label="a", group=f"{number}", split=split, site=site)
        for number, (site, split) in enumerate(places)
    )
    manifest = Manifest(classes=("a", "b"), rows=rows)
    assert held_out_sites(manifest) == ["east"]
    assert condition_rows(manifest, Condition(shift="unchanged")) == [rows[1], rows[3], rows[5]]
    assert condition_rows(manifest, Condition(shift="noise", strength=1)) == [rows[1], rows[3], rows[5]]
    assert condition_rows(manifest, Condition(shift="site", site="east")) == [rows[4]]
    only_east = Manifest(classes=("a", "b"), rows=(rows[0], rows[4]))
    assert condition_rows(only_east, Condition(shift="unchanged")) == [rows[4]]
