"""Tables whose values are not those that were written are refused, also where every page checksum fits."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stages.parquet import CONTENT, read_table, write_table

TABLE = pa.table({"label": ["a", "b"], "p": pa.array([0.25, 0.75], pa.float32())}).replace_schema_metadata({"k": "v"})


def rewritten(path: Path, table: pa.Table, metadata: dict[bytes, bytes]) -> None:
    """Write other values under the digest of the first ones, as a tool that edits the file would."""
    write_table(TABLE, path)
    digest = pq.read_schema(path).metadata[CONTENT]
    pq.write_table(table.replace_schema_metadata({**metadata, CONTENT: digest}), path, write_page_checksum=True)


def test_what_was_written_is_read(tmp_path: Path) -> None:
    rewritten(tmp_path / "t.parquet", TABLE, {b"k": b"v"})
    assert read_table(tmp_path / "t.parquet").equals(TABLE)


@pytest.mark.parametrize(
    ("table", "metadata"),
    [
        (TABLE.set_column(0, "label", [["b", "a"]]), {b"k": b"v"}),
        (TABLE.set_column(1, "p", [pa.array([0.75, 0.25], pa.float32())]), {b"k": b"v"}),
        (TABLE.rename_columns(["split", "p"]), {b"k": b"v"}),
        (TABLE.slice(1), {b"k": b"v"}),
        (TABLE, {b"k": b"w"}),
    ],
)
def test_other_values_under_the_same_digest_are_refused(
    tmp_path: Path, table: pa.Table, metadata: dict[bytes, bytes]
) -> None:
    rewritten(tmp_path / "t.parquet", table, metadata)
    with pytest.raises(ValueError, match="not those that were written"):
        read_table(tmp_path / "t.parquet")
