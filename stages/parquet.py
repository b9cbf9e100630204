"""Parquet tables with a digest of their content, so that changed values are detected when they are read."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

from schemas.base import canonical_json
from stages.files import atomic_write, read_regular

if TYPE_CHECKING:
    import pyarrow as pa

CONTENT = b"fpt.sha256"
"""Key of the digest in the schema's metadata; tables of earlier versions have none."""


def write_table(table: pa.Table, path: Path) -> None:
    """Write a table with page checksums and the digest of its content; equal tables give equal bytes.

    Args:
        table: Columns of text, numbers or bytes of fixed size without nulls, and metadata of the schema.
        path: Target file; missing parent folders are created.

    Raises:
        StorageError: The disk is full or the folder cannot be written.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    metadata = {**(table.schema.metadata or {}), CONTENT: content_digest(table).encode()}
    buffer = pa.BufferOutputStream()
    pq.write_table(table.replace_schema_metadata(metadata), buffer, compression="zstd", write_page_checksum=True)
    atomic_write(path, buffer.getvalue().to_pybytes())


def read_table(path: Path) -> pa.Table:
    """Read a table written by `write_table` or by an earlier version without digests.

    Raises:
        FileNotFoundError: The file does not exist.
        OSError: It cannot be read.
        ValueError: It is damaged or not a Parquet table.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    # From bytes, not from the path: pyarrow would read a folder named "key=value" as a column.
    data = read_regular(path)
    try:
        table = pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True).read()
        expected = (table.schema.metadata or {}).get(CONTENT)
        actual = None if expected is None else content_digest(table).encode()
    except Exception as error:  # pyarrow raises many types for damaged bytes
        raise ValueError(f"{type(error).__name__}: {error}") from error
    if actual != expected:
        raise ValueError("Its values are not those that were written.")
    return table


def content_digest(table: pa.Table) -> str:
    """Return the sha256 (hex) of names, types and values of the columns in order, and of the schema metadata."""
    import pyarrow as pa

    metadata = {key.hex(): value.hex() for key, value in (table.schema.metadata or {}).items() if key != CONTENT}
    content = hashlib.sha256(canonical_json([metadata, table.num_rows]).encode())
    for name, column in zip(table.column_names, table.columns, strict=True):
        content.update(canonical_json([name, str(column.type), column.null_count]).encode())
        if pa.types.is_floating(column.type):
            content.update(column.to_numpy().tobytes())
        elif pa.types.is_fixed_size_binary(column.type):
            content.update(b"".join(column.to_pylist()))
        else:
            content.update(canonical_json(column.to_pylist()).encode())
    return content.hexdigest()
