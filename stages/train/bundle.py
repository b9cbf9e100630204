"""The model bundle: `model.safetensors` with the learnable weights, `model.json` with everything else."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from schemas.errors import BundleError
from schemas.results import BundleSpec
from stages.files import atomic_write
from stages.train.network import Network, build_network

WEIGHTS, SPEC = "model.safetensors", "model.json"


@dataclass(frozen=True)
class Bundle:
    """A trained model, ready to predict."""

    spec: BundleSpec
    """What it is."""
    network: Network
    """In evaluation mode."""


def serialise(network: Network) -> tuple[bytes, str]:
    """The weights as safetensors bytes, and their sha256."""
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()}
    data: bytes = save_tensors(state, metadata={"format": "pt"})
    return data, hashlib.sha256(data).hexdigest()


def save_bundle(folder: Path, spec: BundleSpec, weights: bytes) -> None:
    """Write both files; the JSON last, so that a bundle with a JSON is whole.

    Raises:
        StorageError: If the folder cannot be written.
    """
    atomic_write(folder / WEIGHTS, weights)
    atomic_write(folder / SPEC, (spec.model_dump_json(indent=1) + "\n").encode())


def load_bundle(folder: Path, device: torch.device | str = "cpu") -> Bundle:
    """Read a bundle and check its weights against the digest in its JSON.

    Raises:
        BundleError: If a file is missing or damaged, or the two do not belong together.
    """
    try:
        spec = BundleSpec.model_validate_json((folder / SPEC).read_bytes())
        data = (folder / WEIGHTS).read_bytes()
    except FileNotFoundError as error:
        raise BundleError(
            f"There is no model bundle in {folder}: {Path(str(error.filename)).name} is missing.",
            repair="Run `fpt train`.",
        ) from None
    except ValidationError:
        raise BundleError(
            f"{folder / SPEC} cannot be understood.",
            "It was changed, or written by another version.",
            "Run `fpt train` again.",
        ) from None
    if hashlib.sha256(data).hexdigest() != spec.weights_sha256:
        raise BundleError(
            f"{folder / WEIGHTS} is not the file that {SPEC} describes.",
            "It was damaged or exchanged.",
            "Run `fpt train` again.",
        )
    network = build_network(spec.network)
    try:
        network.load_state_dict(load_tensors(data), strict=True)
    except (SafetensorError, RuntimeError) as error:
        raise BundleError(
            f"{folder / WEIGHTS} does not fit the network of {SPEC}.", str(error), "Run `fpt train` again."
        ) from None
    return Bundle(spec, network.eval().to(device))
