"""Read and write the extraction receipt, the small file that DVC tracks instead of the large store."""

from __future__ import annotations

from pathlib import Path

from pydantic import ValidationError

from schemas.errors import CacheCorruptError, CacheIncompleteError
from schemas.features import ExtractionReceipt
from stages.files import atomic_write, read_regular


def write_extraction_receipt(receipt: ExtractionReceipt, path: Path) -> None:
    """Write an extraction receipt atomically.

    Raises:
        StorageError: If the folder cannot be written.
    """
    atomic_write(path, (receipt.model_dump_json(indent=1) + "\n").encode())


def read_extraction_receipt(path: Path) -> ExtractionReceipt:
    """Read an extraction receipt.

    Raises:
        CacheIncompleteError: If it does not exist.
        CacheCorruptError: If it is damaged or inconsistent.
    """
    try:
        receipt = ExtractionReceipt.model_validate_json(read_regular(path))
    except FileNotFoundError:
        raise CacheIncompleteError(
            f"There is no extraction receipt at {path}.", repair="Run `fpt extract` first."
        ) from None
    except OSError as error:
        raise CacheCorruptError(
            f"The extraction receipt {path} cannot be read: {error.strerror}.",
            path.name,
            repair="Make it readable, or run `fpt extract`: it writes a new one.",
        ) from error
    except ValidationError:
        receipt = None
    if receipt is None or receipt.fingerprint != receipt.spec.fingerprint:
        raise CacheCorruptError(
            f"The extraction receipt {path} is damaged.",
            path.name,
            "It was changed, or written by another version.",
            "Run `fpt extract`: it writes a new one.",
        )
    return receipt
