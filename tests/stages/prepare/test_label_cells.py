"""Multi-label and ordinal studies: parsing, errors, splits, and the manifest."""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from task_studies import GRADES, LABELS, draw_grades, draw_labelled

from schemas.data_settings import DataSettings
from schemas.errors import DataError, ManifestError, SettingsError
from schemas.manifest import SPLITS, Manifest, ManifestRow, PrepareSummary
from schemas.parse import parse_settings
from stages.groups import find_clusters
from stages.manifest import read_manifest, write_manifest
from stages.parquet import CONTENT
from stages.prepare import prepare
from stages.prepare.label_table import read_table
from stages.prepare.labelled_image import LabelledImage
from stages.prepare.stratified_split import draw_splits

TABLE = "path,label,x,y z\na.png,y z|x,1,1\nb.png,,0,0\nc.png, x ,1.0,False\n"
ITEMS = [LabelledImage("a.png", "x|y z"), LabelledImage("b.png", ""), LabelledImage("c.png", "x")]


def read(tmp_path: Path, content: str, **settings: Any) -> list[LabelledImage]:
    (tmp_path / "labels.csv").write_text(content)
    data = DataSettings.model_validate({"task": "multilabel", "labels": "labels.csv", **settings})
    return read_table(data, tmp_path, tmp_path / "images").items


def run(root: Path, **settings: Any) -> tuple[Manifest, PrepareSummary]:
    data = DataSettings.model_validate({"images": "images", "labels": "labels.csv", **settings})
    summary = prepare(data, root, root / "manifest")
    return read_manifest(root / "manifest/manifest.parquet"), summary


@pytest.mark.parametrize(
    ("content", "settings"),
    [
        (TABLE, {}),
        (TABLE, {"label_columns": ["x", "y z"]}),
        (TABLE, {"label_columns": ["y z", "x"]}),
        (TABLE.replace("|", " / "), {"label_separator": "/"}),
        (TABLE.replace(",", ";"), {}),
        (TABLE.replace(",", "\t"), {"label_columns": ["x", "y z"]}),
        (TABLE.replace("y z|x", "x||y z|x"), {}),
    ],
)
def test_the_same_labels(tmp_path: Path, content: str, settings: dict[str, Any]) -> None:
    assert read(tmp_path, content, **settings) == ITEMS


@pytest.mark.parametrize(
    ("cell", "message"),
    [("", "line 2: empty"), ("-1", "line 2: '-1'"), ("yes", "line 2: 'yes'"), ("0.5", "line 2: '0.5'")],
)
def test_cells_that_are_neither_0_nor_1_are_refused(tmp_path: Path, cell: str, message: str) -> None:
    with pytest.raises(DataError, match=r"1 cell of column 'x'(.|\n)*neither 0 nor 1") as caught:
        read(tmp_path, TABLE.replace("y z|x,1,1", f"y z|x,{cell},1"), label_columns=["x", "y z"])
    assert message in str(caught.value)


def test_a_missing_label_column_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.label_columns\.1: no column 'yz', did you mean 'y z'\?"):
        read(tmp_path, TABLE, label_columns=["x", "yz"])


def test_the_sign_between_labels_is_not_part_of_one(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"'a\|b'(.|\n)*label_separator"):
        read(tmp_path, "path,label\na.png,a|b;c\n", label_separator=";")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"task": "ordinal"}, "needs classes"),
        ({"task": "multilabel"}, "needs a labels table"),
        ({"labels": "l.csv", "label_columns": ["a"]}, "label_columns is for task multilabel"),
        ({"task": "multilabel", "labels": "l.csv", "label_columns": ["a", "a"]}, "lists a column twice"),
        ({"task": "multilabel", "labels": "l.csv", "label_separator": ""}, "at least 1 character"),
        ({"task": "regression"}, "multiclass"),
    ],
)
def test_settings_that_contradict_each_other(data: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        parse_settings({"data": data})


@pytest.mark.parametrize("columns", [None, ["stripes", "bars", "bright"]])
def test_several_labels_become_a_manifest(tmp_path: Path, columns: list[str] | None) -> None:
    draw_labelled(tmp_path)
    manifest, summary = run(tmp_path, task="multilabel", group_column="patient", label_columns=columns)
    assert manifest.task == "multilabel"
    assert manifest.classes == (LABELS if columns is None else tuple(columns))
    for row in manifest.rows:
        number = int(row.path[:3]) // 2
        assert set(manifest.names(row)) == {name for place, name in enumerate(LABELS) if number >> place & 1}
        assert list(manifest.names(row)) == sorted(manifest.names(row), key=manifest.classes.index)
    assert {row.label for row in manifest.rows} >= {"", "bars"}
    for split in SPLITS:
        rows = list(manifest.of(split))
        assert summary.split_images[split] == len(rows)
        for name in LABELS:
            assert summary.counts[split][name] == sum(name in manifest.names(row) for row in rows)
    metadata = pq.ParquetFile(tmp_path / "manifest/manifest.parquet").schema_arrow.metadata
    assert metadata[b"fpt.task"] == b"multilabel"


def test_labels_keep_their_shares_and_patients_their_split() -> None:
    draws = random.Random(0)
    often = {"a": 0.5, "b": 0.2, "c": 0.06, "d": 0.03}
    items = []
    for group in range(300):
        own = {name for name, share in often.items() if draws.random() < share}
        for number in range(draws.randint(1, 4)):
            items.append(LabelledImage(f"{group}/{number}.png", "|".join(sorted(own)), f"g{group}"))
    ids = {item.path: hashlib.sha256(item.path.encode()).hexdigest() for item in items}
    split_of = draw_splits(find_clusters(items, ids, "multilabel"), 0.2, 0.2, 0)
    where = defaultdict(set)
    for item in items:
        where[item.group].add(split_of[item.path])
    assert all(len(splits) == 1 for splits in where.values())
    for name in [*often, None]:
        counts = Counter(split_of[item.path] for item in items if name is None or name in item.label.split("|"))
        for split, share in {"train": 0.6, "val": 0.2, "test": 0.2}.items():
            assert counts[split] / counts.total() == pytest.approx(share, abs=0.02 if name is None else 0.06)


def test_a_ready_split_needs_every_label_everywhere(tmp_path: Path) -> None:
    draw_labelled(tmp_path, 16)
    lines = (tmp_path / "labels.csv").read_text().splitlines()
    rows = [f"{line},{('train', 'val', 'test')[min(n, 2)]}" for n, line in enumerate(lines[1:])]
    (tmp_path / "labels.csv").write_text("\n".join([f"{lines[0]},split", *rows]))
    with pytest.raises(DataError, match=r"no 'bars' in train"):
        run(tmp_path, task="multilabel", split_column="split", group_column=None)


def test_tables_that_are_not_several_labels(tmp_path: Path) -> None:
    draw_labelled(tmp_path, 16)
    text = (tmp_path / "labels.csv").read_text()
    with pytest.raises(DataError, match=r"(.|\n)*data\.classes"):
        run(tmp_path, task="multilabel", classes=["bars", "bright"])
    for change, message in (
        (lambda label: "one", r"1 label in total: 'one'(.|\n)*label_separator"),
        (lambda label: "", "0 labels in total"),
        (lambda label: f"{label}|all", "Every image has the label 'all'"),
    ):
        rows = [line.split(",") for line in text.splitlines()]
        changed = [rows[0], *([row[0], change(row[1]), *row[2:]] for row in rows[1:])]
        (tmp_path / "labels.csv").write_text("\n".join(",".join(row) for row in changed))
        with pytest.raises(DataError, match=message):
            run(tmp_path, task="multilabel")


def test_grades_keep_their_order(tmp_path: Path) -> None:
    draw_grades(tmp_path, 24)
    manifest, summary = run(tmp_path, task="ordinal", classes=GRADES)
    assert (manifest.task, manifest.classes) == ("ordinal", GRADES)
    assert sum(summary.split_images.values()) == summary.images == 24
    with pytest.raises(DataError, match="severe"):
        run(tmp_path, task="ordinal", classes=GRADES[:3])


def row(number: int, label: str) -> ManifestRow:
    return ManifestRow(id=f"{number:064x}", path=f"{number}.png", label=label, group="g", split="train")


def test_manifests_of_one_class_an_image_are_written_as_before(tmp_path: Path) -> None:
    plain = Manifest(classes=("a", "b"), rows=(row(1, "a"), row(2, "b")))
    write_manifest(plain, tmp_path / "m.parquet")
    metadata = pq.ParquetFile(tmp_path / "m.parquet").schema_arrow.metadata
    assert {name: value for name, value in metadata.items() if name.startswith(b"fpt") and name != CONTENT} == {
        b"fpt.classes": json.dumps(["a", "b"]).encode()
    }
    _as_before(plain, tmp_path / "old.parquet")
    assert read_manifest(tmp_path / "old.parquet") == plain


def _as_before(manifest: Manifest, path: Path) -> None:
    """The manifest format from before tasks existed."""
    import pyarrow as pa

    names = ("id", "path", "label", "group", "split")
    schema = pa.schema(
        [pa.field(name, pa.string(), nullable=False) for name in names],
        metadata={b"fpt.classes": json.dumps(manifest.classes).encode()},
    )
    columns = {name: [getattr(row, name) for row in manifest.rows] for name in names}
    pq.write_table(pa.table(columns, schema=schema), path, compression="zstd")


@pytest.mark.parametrize(("task", "label"), [("multilabel", "a|c"), ("multiclass", "a|b"), ("ordinal", "")])
def test_a_label_that_is_no_class_is_damage(tmp_path: Path, task: str, label: str) -> None:
    manifest = Manifest.model_validate({"classes": ("a", "b"), "rows": (row(1, label),), "task": task})
    write_manifest(manifest, tmp_path / "m.parquet")
    with pytest.raises(ManifestError, match="not one of its classes"):
        read_manifest(tmp_path / "m.parquet")


def test_manifests_of_several_labels_come_back(tmp_path: Path) -> None:
    manifest = Manifest(classes=("a", "b"), rows=(row(1, "a|b"), row(2, "")), task="multilabel")
    write_manifest(manifest, tmp_path / "m.parquet")
    assert read_manifest(tmp_path / "m.parquet") == manifest
