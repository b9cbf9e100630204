"""`model.json` of a bundle, read without torch: a missing model is noticed before torch is imported."""

from __future__ import annotations

import json
from pathlib import Path

from schemas.base import digest
from schemas.errors import BundleError
from schemas.methods import model_inputs
from schemas.results import BundleSpec
from stages.files import read_regular

SPEC = "model.json"
RESTORE = "Restore the file (git, DVC or a backup), or run `fpt train` again."


def encode_spec(spec: BundleSpec) -> bytes:
    """Return the content of `model.json`: the spec, and the digest of its canonical JSON as `sha256`."""
    content = spec.model_dump(mode="json")
    return (json.dumps({**content, "sha256": digest(content)}, indent=1, ensure_ascii=False) + "\n").encode()


def _decode_spec(data: bytes, path: Path) -> BundleSpec:
    """Parse the output of `encode_spec`.

    Raises:
        BundleError: If it was changed.
        ValueError, RecursionError: If it is not a spec.
    """
    content = json.loads(data)
    if not isinstance(content, dict) or "sha256" not in content:
        raise ValueError("has no digest")
    if content.pop("sha256") != digest(content):
        raise BundleError(
            f"{path} is not what training wrote: its content differs from its digest.",
            "It was edited or damaged. Classes and features belong to the weights and cannot be changed by hand.",
            RESTORE,
        )
    spec = BundleSpec.model_validate(content)
    if not _consistent(spec):
        raise ValueError("classes, features and network do not fit each other")
    return spec


def _consistent(spec: BundleSpec) -> bool:
    """Return whether the network fits the classes and features of the spec."""
    network, features = spec.network, spec.features
    inputs = model_inputs(network)
    missing = ("pooled" in inputs and not features.pooled) or ("statistics" in inputs and not features.statistics)
    if network.classes != len(spec.classes) or missing:
        return False
    return network.matches(features)


def read_spec(folder: Path) -> BundleSpec:
    """Read the spec of a bundle and check its digest; the weights are not read.

    Raises:
        BundleError: If the file is missing, changed, or of another version.
    """
    data, path = read_part(folder, SPEC), folder / SPEC
    try:
        return _decode_spec(data, path)
    except BundleError:
        raise
    except (ValueError, RecursionError):
        raise BundleError(
            f"{path} cannot be understood.",
            "It was damaged, or written by another version of fpt, or its method is that of a plugin (--plugin FILE).",
            RESTORE,
        ) from None


def read_part(folder: Path, name: str) -> bytes:
    """Read a file of a bundle.

    Raises:
        BundleError: If it is missing or cannot be read.
    """
    try:
        return read_regular(folder / name)
    except (FileNotFoundError, NotADirectoryError):
        raise BundleError(
            f"There is no model bundle in {folder}: {name} is missing.", repair="Run `fpt train`."
        ) from None
    except OSError as error:
        raise BundleError(
            f"{folder / name} cannot be read: {error.strerror}.",
            repair="Make it readable, or run `fpt train` again.",
        ) from None
