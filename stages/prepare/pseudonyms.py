"""Replace identifiers of patients by keyed hashes, with a key that stays in the study's private folder."""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import os
import re
import secrets
from pathlib import Path

from schemas.errors import DataError, StorageError

KEY_FILE = "key"
_KEY_BYTES = 32
_KEY = re.compile(rb"[0-9a-f]{64}\n?")
_DIGITS = 32
"""Hexadecimal digits of a pseudonym: 128 bits."""


def pseudonym(identifier: str, key: bytes) -> str:
    """Return the HMAC-SHA256 of an identifier, 32 hexadecimal digits."""
    return hmac.new(key, identifier.strip().encode("utf-8", "surrogatepass"), hashlib.sha256).hexdigest()[:_DIGITS]


def study_key(folder: Path | None) -> bytes:
    """Return the key of a study, created at first use and readable by its owner only.

    Args:
        folder: The study's folder `.fpt`, which Git and DVC ignore; None: a key that is forgotten, for a check.

    Raises:
        DataError: The file of the key is damaged.
        StorageError: It cannot be read or written.
    """
    if folder is None:
        return secrets.token_bytes(_KEY_BYTES)
    path = folder / KEY_FILE
    try:
        if not path.exists():
            _create(path)
        content = path.read_bytes()
    except OSError as error:
        raise StorageError(
            f"The key of the study, {path}, cannot be read or written: {error.strerror}.",
            "Identifiers of patients are only stored as hashes with this key.",
            "Make the folder writable and the file readable.",
        ) from error
    if _KEY.fullmatch(content) is None:
        raise DataError(
            f"The key of the study, {path}, is damaged.",
            "It should hold 64 hexadecimal digits.",
            "Restore it from a copy, or delete it: all patients then get new pseudonyms.",
        )
    return bytes.fromhex(content.decode())


def _create(path: Path) -> None:
    """Write a new key, completely or not at all; a key that appears meanwhile is kept."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f"{KEY_FILE}.{secrets.token_hex(8)}")
    with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:  # noqa: PTH123
        file.write(secrets.token_hex(_KEY_BYTES).encode() + b"\n")
    try:
        with contextlib.suppress(FileExistsError):
            os.link(draft, path)
    finally:
        draft.unlink()
