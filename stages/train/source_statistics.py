"""Statistics of source images (those that a model was trained on), which adaptation at test time compares with.

A bundle gets `source.safetensors` at the end of training with what is cheap: statistics of the vector that the head
reads, and of the class tokens of side networks. What needs a pass of the LPM over images is computed when it is first
asked for, and goes to the folder NAME-source next to the bundle: DVC tracks the bundle, and takes a file that appears
in it later for a change that calls for another training. Both files name the model they belong to by the digest of its
weights, and hold a digest of their own content.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from schemas.errors import BundleError
from stages.files import atomic_write, read_regular
from stages.methods.base import Model
from stages.methods.batch import Batch
from stages.methods.side_prompts import SidePrompts

SOURCE = "source.safetensors"
WRITTEN = "source"
"""Key of the metadata of the file: its model, images and digest, as JSON."""
MOST = 256
"""Training images whose vectors are computed at the end of a training by gradient; FOA is published to need 32."""

Kind = str
"""vectors (what the head reads), activations (class tokens) or norms (patch tokens after each norm)."""


@dataclass(frozen=True)
class Moments:
    """Mean and spread of each number over source images."""

    mean: torch.Tensor
    """Of any shape, float32."""
    spread: torch.Tensor
    """Of the same shape: standard deviation (n - 1) of vectors and activations, variance (n) of norms."""
    images: int
    """Source images."""


def moments_of(parts: Iterable[torch.Tensor]) -> Moments:
    """Return mean and standard deviation over the rows of tensors (b, F), at least one; of one row the deviation is 0.

    Parts are merged one by one in double precision (Chan et al. 1979): all rows of a wide vector need not be in memory.
    """
    count, mean, squares = 0, torch.zeros(()), torch.zeros(())
    for part in parts:
        rows = part.cpu().double()
        own, total = rows.mean(dim=0), count + len(rows)
        apart = own - mean
        squares = squares + (rows - own).square().sum(dim=0) + apart.square() * (count * len(rows) / total)
        mean = mean + apart * (len(rows) / total)
        count = total
    return Moments(mean.float(), (squares / max(1, count - 1)).sqrt().float(), count)


def encode(moments: Mapping[Kind, Moments], weights_sha256: str) -> bytes:
    """Return the content of a file of statistics for the model with these weights."""
    tensors: dict[str, torch.Tensor] = {}
    for kind, one in sorted(moments.items()):
        tensors |= {f"{kind}.mean": one.mean.contiguous(), f"{kind}.spread": one.spread.contiguous()}
    images = json.dumps({kind: one.images for kind, one in sorted(moments.items())})
    own = {"model": weights_sha256, "images": images}
    # One entry: safetensors writes several in random order, and equal trainings would write other bytes.
    written = json.dumps({**own, "sha256": _digest(tensors, own)}, sort_keys=True)
    data: bytes = save_tensors(tensors, metadata={WRITTEN: written})
    return data


def _digest(tensors: Mapping[str, torch.Tensor], own: Mapping[str, str]) -> str:
    digest = hashlib.sha256(json.dumps(dict(own), sort_keys=True).encode())
    for name in sorted(tensors):
        digest.update(f"{name}{list(tensors[name].shape)}".encode())
        digest.update(tensors[name].contiguous().numpy().tobytes())
    return digest.hexdigest()


def _decode(data: bytes, path: Path, weights_sha256: str) -> dict[Kind, Moments]:
    """Parse the output of `encode`.

    Raises:
        BundleError: It is damaged, or belongs to another model.
    """
    repair = f"Remove {path}, then run `fpt evaluate --adapt` in the study, or `fpt train` again."
    try:
        tensors, written = load_tensors(data), _metadata(data)
        own = {"model": written["model"], "images": written["images"]}
        intact = written["sha256"] == _digest(tensors, own)
        counts = json.loads(own["images"])
        found = {kind: Moments(tensors[f"{kind}.mean"], tensors[f"{kind}.spread"], counts[kind]) for kind in counts}
    except Exception as error:  # safetensors, JSON and missing keys fail in many ways.
        raise BundleError(f"{path} holds no statistics of source images.", str(error), repair) from error
    if not intact:
        raise BundleError(f"{path} is damaged: its content differs from its digest.", "", repair)
    if own["model"] != weights_sha256:
        raise BundleError(f"{path} belongs to another model.", "The model was trained again, or exchanged.", repair)
    return found


def _metadata(data: bytes) -> dict[str, str]:
    """Return the metadata of a file of safetensors, which starts with the length of its JSON header."""
    header: dict[str, Any] = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    written: dict[str, str] = json.loads(header["__metadata__"][WRITTEN])
    return written


def _belongs(data: bytes, weights_sha256: str) -> bool:
    try:
        return _metadata(data)["model"] == weights_sha256
    except (ValueError, KeyError, TypeError):
        # Damaged: `_decode` says so.
        return True


def later_folder(bundle_dir: Path) -> Path:
    """Return the folder of the statistics that are computed after training."""
    return bundle_dir.with_name(f"{bundle_dir.name}-source")


def read_source(bundle_dir: Path, weights_sha256: str) -> dict[Kind, Moments]:
    """Return all statistics of source images that a bundle has; empty for one of an earlier version.

    Raises:
        BundleError: A file is damaged, or belongs to another model. Statistics that were computed after training for
            earlier weights are passed over: training again leaves them behind.
    """
    found: dict[Kind, Moments] = {}
    later = later_folder(bundle_dir) / SOURCE
    for path in (later, bundle_dir / SOURCE):
        try:
            data = read_regular(path)
        except (FileNotFoundError, NotADirectoryError):
            continue
        if path == later and not _belongs(data, weights_sha256):
            continue
        found |= _decode(data, path, weights_sha256)
    return found


def add_source(bundle_dir: Path, weights_sha256: str, added: Mapping[Kind, Moments]) -> Path:
    """Write statistics next to a bundle, with those that were added before; return the file.

    Raises:
        StorageError: The folder cannot be written.
    """
    path = later_folder(bundle_dir) / SOURCE
    known = {} if not path.exists() else _known(path, weights_sha256)
    atomic_write(path, encode({**known, **added}, weights_sha256))
    return path


def _known(path: Path, weights_sha256: str) -> dict[Kind, Moments]:
    try:
        return _decode(read_regular(path), path, weights_sha256)
    except BundleError:
        # Of earlier weights, or damaged: replaced.
        return {}


@torch.inference_mode()
def model_moments(model: Model, batches: Iterable[Batch]) -> dict[Kind, Moments]:
    """Compute the statistics of a model that reads cached features, from prepared batches of source images.

    Returns:
        vectors; and activations of side networks. Empty for a model without a head.
    """
    if not model.has_head:
        return {}
    side = side_prompts_of(model)
    vectors, activations = [], []
    for batch in batches:
        if side is None:
            vectors.append(model.head_inputs(batch))
            continue
        passed = side.run(side.begin(batch), None)
        activations.append(passed[0].cpu())
        vectors.append(passed[1].cpu())
    found = {"vectors": moments_of(vectors)}
    return found | ({"activations": moments_of(activations)} if activations else {})


def side_prompts_of(model: Any) -> SidePrompts | None:
    """Return the side networks of a model with their prompts; None if it has no side network."""
    members = getattr(model, "members", ())
    return SidePrompts(model) if any(getattr(member, "prompt_width", 0) for member in members) else None
