"""Remembered descriptions of LPMs, so that a run on cached features imports neither timm nor the model."""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

from pydantic import ValidationError

from schemas.errors import StorageError
from schemas.features import FEATURE_VERSION, LpmInfo
from schemas.version import __version__
from stages.files import atomic_write, read_regular


def remembered_lpm(folder: Path, name: str, image_size: int, root: Path, with_tokens: bool) -> LpmInfo:
    """Return what `stages.lpm.loading.describe_lpm` returns, which a file keeps for the next call.

    Only names from timm's list are remembered: the same name of a repository or a folder can be another model tomorrow.

    Args:
        folder: Folder of the files; nothing is kept if the one around it does not exist, as outside a study.
        name: As in `describe_lpm`, like the other arguments.
        image_size: Side of the input, in pixels.
        root: Folder that a relative folder in the name starts at.
        with_tokens: Whether keys, values or hidden tokens are taken from it.

    Raises:
        UnsupportedModelError: As in `describe_lpm`.
        WeightsError: As in `describe_lpm`.
    """
    key = json.dumps([name, image_size, with_tokens, version("timm"), __version__, FEATURE_VERSION])
    path = folder / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"
    if ":" not in name and path.is_file():
        try:
            return LpmInfo.model_validate_json(read_regular(path))
        except (ValidationError, OSError):
            # Damaged, or of a version with other fields: described again.
            pass
    # Imported late: this takes seconds.
    from stages.lpm.loading import describe_lpm

    info = describe_lpm(name, image_size, root, with_tokens)
    if ":" not in name and folder.parent.is_dir():
        # A study that cannot be written to is described each time.
        with suppress(StorageError):
            atomic_write(path, info.model_dump_json().encode())
    return info
