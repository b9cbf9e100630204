"""The model bundle: `model.safetensors` with the trained weights, `model.json` with everything else."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from schemas.base import digest
from schemas.errors import BundleError
from schemas.methods import model_inputs
from schemas.results import BundleSpec
from stages.files import atomic_write, read_regular
from stages.methods.base import Model, build_model
from stages.train.source_statistics import SOURCE, Kind, Moments, encode

WEIGHTS, SPEC = "model.safetensors", "model.json"
RESTORE = "Restore the file (git, DVC or a backup), or run `fpt train` again."


@dataclass(frozen=True)
class Bundle:
    """A trained model, ready to predict."""

    spec: BundleSpec
    """Content of `model.json`."""
    network: Model
    """Model in evaluation mode; run it with `infer.bundle_logits`."""

    @property
    def device(self) -> torch.device:
        """Device of the model, from its parameters or (k-NN) buffers."""
        return next(chain(self.network.parameters(), self.network.buffers())).device


def serialise(network: Model) -> tuple[bytes, str]:
    """Return the weights as safetensors bytes, and their sha256."""
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()}
    data: bytes = save_tensors(state, metadata={"format": "pt"})
    return data, hashlib.sha256(data).hexdigest()


def save_bundle(folder: Path, spec: BundleSpec, weights: bytes, source: Mapping[Kind, Moments] | None = None) -> None:
    """Write the files of a bundle, the JSON last, so that a bundle with a JSON is complete.

    Args:
        folder: Of the bundle.
        spec: Content of the JSON.
        weights: From `serialise`.
        source: Statistics of the training images, for adaptation at test time; a file of an earlier model is removed.

    Raises:
        StorageError: If the folder cannot be written.
    """
    (folder / SOURCE).unlink(missing_ok=True)
    atomic_write(folder / WEIGHTS, weights)
    if source:
        atomic_write(folder / SOURCE, encode(source, spec.weights_sha256))
    atomic_write(folder / SPEC, encode_spec(spec))


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
    data, path = _read(folder, SPEC), folder / SPEC
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


def _read(folder: Path, name: str) -> bytes:
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


def read_weights(folder: Path, spec: BundleSpec) -> Mapping[str, torch.Tensor]:
    """Read the weights of a bundle, and check them against the digest in its spec.

    Raises:
        BundleError: If the file is missing or damaged, or is not that of the spec.
    """
    data = _read(folder, WEIGHTS)
    if hashlib.sha256(data).hexdigest() != spec.weights_sha256:
        raise BundleError(
            f"{folder / WEIGHTS} is not the file that {SPEC} describes.",
            "It was damaged or exchanged.",
            "Run `fpt train` again.",
        )
    try:
        weights: Mapping[str, torch.Tensor] = load_tensors(data)
    except SafetensorError as error:
        raise _unfit(folder, error) from None
    return weights


def _unfit(folder: Path, error: Exception) -> BundleError:
    return BundleError(f"{folder / WEIGHTS} does not fit the network of {SPEC}.", str(error), "Run `fpt train` again.")


def load_bundle(folder: Path, device: torch.device | str = "cpu") -> Bundle:
    """Read a bundle and check its weights against the digest in its JSON.

    Raises:
        BundleError: If a file is missing or damaged, or the two files do not match.
    """
    spec = read_spec(folder)
    weights = read_weights(folder, spec)
    network = build_model(spec.network)
    try:
        network.load_state_dict(dict(weights), strict=True)
    except RuntimeError as error:
        raise _unfit(folder, error) from None
    return Bundle(spec, network.eval().to(device))
