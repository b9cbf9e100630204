"""The model bundle: `model.safetensors` with the trained weights, `model.json` with everything else (`bundle_spec`)."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from schemas.errors import BundleError
from schemas.results import BundleSpec
from stages.files import atomic_write
from stages.methods.base import Model, build_model
from stages.train.bundle_spec import SPEC, encode_spec, read_part, read_spec
from stages.train.source_statistics import SOURCE, Kind, Moments, encode

WEIGHTS = "model.safetensors"


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


def read_weights(folder: Path, spec: BundleSpec) -> Mapping[str, torch.Tensor]:
    """Read the weights of a bundle, and check them against the digest in its spec.

    Raises:
        BundleError: If the file is missing or damaged, or is not that of the spec.
    """
    data = read_part(folder, WEIGHTS)
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
