"""Held-out sites, columns that the manifest keeps, and few-shot studies."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from prepared import fails, rows_of, run, table
from pydantic import ValidationError

from schemas.data_settings import DataSettings
from stages.groups import cluster_of

Rows = list[dict[str, str]]


@pytest.fixture
def rows(study: Path) -> Rows:
    """Twenty images of ten patients; every fifth patient is from the south."""
    made = rows_of(study)
    for row in made:
        row["site"] = "south" if int(row["patient"].split("-")[1]) % 5 == 0 else "north"
        row["age"] = "0" + row["patient"][-1]
    return made


def test_all_test_images_are_of_the_held_out_sites(study: Path, rows: Rows) -> None:
    name = table(study, rows)
    manifest, _ = run(study, labels=name, site_column="site", test_sites=["south"])
    assert {row.split for row in manifest.rows if row.site == "south"} == {"test"}
    assert {row.split for row in manifest.rows if row.site == "north"} == {"train", "val"}
    again, _ = run(study, labels=name, site_column="site", test_sites=["south"])
    assert again == manifest


def test_validation_images_may_be_given(study: Path, rows: Rows) -> None:
    for row in rows:
        row["split"] = "val" if row["patient"].endswith("-1") else ""
    manifest, _ = run(study, labels=table(study, rows), site_column="site", test_sites=["south"])
    split_of = {row.path: row.split for row in manifest.rows}
    assert all((split_of[row["path"]] == "test") == (row["site"] == "south") for row in rows)
    assert all(split_of[row["path"]] == "val" for row in rows if row["split"])


def test_contradictions(study: Path, rows: Rows) -> None:
    name = table(study, rows)
    text = fails(study, labels=name, site_column="site", test_sites=["soth"])
    assert "'soth', did you mean 'south'?" in text
    for row in rows:
        row["split"] = "train" if row["site"] == "south" else ""
    assert "contradicts data.test_sites" in fails(
        study, labels=table(study, rows), site_column="site", test_sites=["south"]
    )


def test_a_patient_of_two_sites_is_tested(study: Path, rows: Rows) -> None:
    rows[0]["site"], rows[1]["site"] = "south", "north"
    assert rows[0]["patient"] == rows[1]["patient"]
    manifest, _ = run(study, labels=table(study, rows), site_column="site", test_sites=["south"])
    assert {row.split for row in manifest.rows if row.group == rows[0]["patient"]} == {"test"}


def test_kept_columns_are_in_the_manifest(study: Path, rows: Rows) -> None:
    name = table(study, rows)
    manifest, _ = run(study, labels=name, keep_columns=["age", "site"])
    assert {row.path: row.kept for row in manifest.rows} == {
        row["path"]: {"age": row["age"], "site": row["site"]} for row in rows
    }
    plain, _ = run(study, labels=name)
    assert all(row.kept == {} and row.site is None for row in plain.rows)
    assert "data.keep_columns.0: no column 'ag'" in fails_again(study, name)


def fails_again(study: Path, name: str) -> str:
    with pytest.raises(ValueError) as caught:
        run(study, labels=name, keep_columns=["ag"])
    return str(caught.value)


def test_few_shots_keep_the_test_images(study: Path, rows: Rows) -> None:
    name = table(study, rows)
    full, _ = run(study, labels=name)
    few, result = run(study, labels=name, shots=1)
    assert list(few.of("test")) == list(full.of("test"))
    clusters = cluster_of(few)
    patients = {split: {clusters[row.path] for row in few.of(split)} for split in ("train", "val")}
    assert Counter({split: len(found) for split, found in patients.items()}) == {"train": 2, "val": 2}
    assert result.images == len(few.rows) < 20


def test_settings_that_make_no_sense() -> None:
    for settings, message in (
        ({"test_sites": ["a"]}, "test_sites needs site_column"),
        ({"site_column": "site"}, "need a labels table"),
        ({"keep_columns": ["age"]}, "need a labels table"),
        ({"allow_leaks": ["near", "near"]}, "allow_leaks lists an entry twice"),
        ({"allow_leaks": ["everything"]}, "content"),
    ):
        with pytest.raises(ValidationError, match=message):
            DataSettings.model_validate(settings)
