"""The manifest survives its file, and a file that is none is refused."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas.errors import ManifestError
from schemas.manifest import SPLITS, Manifest, ManifestRow
from stages.manifest import read_manifest, write_manifest

TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8)


def row(number: int, **changes: str) -> ManifestRow:
    fields = {"id": f"{number:064x}", "path": f"{number}.png", "label": "a", "group": f"g{number}", "split": "train"}
    return ManifestRow.model_validate({**fields, **changes})


def manifest(*rows: ManifestRow) -> Manifest:
    return Manifest(classes=("b", "a"), rows=rows)


@given(
    paths=st.lists(TEXT, unique=True, max_size=20),
    labels=st.lists(TEXT, unique=True, min_size=2, max_size=4),
    data=st.data(),
)
def test_round_trip(tmp_path_factory: pytest.TempPathFactory, paths: list[str], labels: list[str], data: st.DataObject):
    rows = tuple(
        row(
            number,
            path=path,
            label=data.draw(st.sampled_from(labels)),
            group=data.draw(TEXT),
            split=data.draw(st.sampled_from(SPLITS)),
        )
        for number, path in enumerate(sorted(paths))
    )
    written = Manifest(classes=tuple(labels), rows=rows)
    folder = tmp_path_factory.mktemp("round")
    write_manifest(written, folder / "a.parquet")
    write_manifest(written, folder / "b.parquet")
    assert read_manifest(folder / "a.parquet") == written
    assert (folder / "a.parquet").read_bytes() == (folder / "b.parquet").read_bytes()


def test_a_folder_with_an_equals_sign_is_no_column(tmp_path: Path) -> None:
    path = tmp_path / "seed=3" / "manifest.parquet"
    write_manifest(manifest(row(1)), path)
    assert read_manifest(path) == manifest(row(1))
    assert pq.read_table(pa.BufferReader(path.read_bytes())).column_names == ["id", "path", "label", "group", "split"]
    metadata = pq.ParquetFile(path).schema_arrow.metadata
    assert json.loads(metadata[b"fpt.classes"]) == ["b", "a"]


def test_missing(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="fpt prepare"):
        read_manifest(tmp_path / "manifest.parquet")
    with pytest.raises(ManifestError, match="fpt prepare"):
        read_manifest(tmp_path)


@pytest.mark.parametrize("keep", [0, 3, 100, -1])
def test_damaged(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "manifest.parquet"
    write_manifest(manifest(row(1), row(2)), path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ManifestError, match=r"damaged(.|\n)*fpt prepare"):
        read_manifest(path)


def test_another_table(tmp_path: Path) -> None:
    path = tmp_path / "manifest.parquet"
    pq.write_table(pa.table({"id": ["x"]}), path)
    with pytest.raises(ManifestError, match="fpt prepare"):
        read_manifest(path)


@pytest.mark.parametrize(
    ("rows", "problem"),
    [
        ((row(2), row(1)), "sorted"),
        ((row(1), row(1)), "sorted"),
        ((row(1, label="c"),), "not one of its classes"),
        ((row(1), row(2, id=f"{1:064x}", split="test")), "two splits"),
        ((row(1, split="external"),), "in the split 'external'"),
    ],
)
def test_contradictions(tmp_path: Path, rows: tuple[ManifestRow, ...], problem: str) -> None:
    write_manifest(manifest(*rows), tmp_path / "m.parquet")
    with pytest.raises(ManifestError, match=problem):
        read_manifest(tmp_path / "m.parquet")


def test_a_changed_value_is_damage_even_where_the_file_is_sound(tmp_path: Path) -> None:
    path = tmp_path / "m.parquet"
    write_manifest(manifest(row(1), row(2)), path)
    table = pq.read_table(pa.BufferReader(path.read_bytes()))
    changed = table.set_column(4, table.schema.field("split"), pa.array(["train", "test"]))
    pq.write_table(changed, path)
    with pytest.raises(ManifestError, match=r"damaged(.|\n)*not those that were written(.|\n)*fpt prepare"):
        read_manifest(path)


def test_a_manifest_of_an_earlier_version_has_no_digest_and_is_read(tmp_path: Path) -> None:
    path = tmp_path / "m.parquet"
    write_manifest(manifest(row(1), row(2)), path)
    table = pq.read_table(pa.BufferReader(path.read_bytes()))
    metadata = {key: value for key, value in table.schema.metadata.items() if key != b"fpt.sha256"}
    assert len(metadata) == len(table.schema.metadata) - 1
    pq.write_table(table.replace_schema_metadata(metadata), path)
    assert read_manifest(path) == manifest(row(1), row(2))


def test_a_fifo_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "m.parquet")
    with pytest.raises(ManifestError, match="Not a regular file"):
        read_manifest(tmp_path / "m.parquet")
