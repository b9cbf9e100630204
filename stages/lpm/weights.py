"""Locate the LPM's weights: in a local file or folder, in the hub's cache on this machine, or on the hub."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

from schemas.errors import StorageError, WeightsError
from schemas.settings import LpmSettings
from stages.files import irregular, storage_errors
from stages.lpm.catalogue import ModelEntry, find_model
from stages.lpm.hub import answers, cached, fetch, refused
from stages.lpm.hub import hub_reachable as hub_reachable

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".npz")
LOCAL = "set lpm.weights to a local file (.safetensors, .pth, .npz)"

_NAMES = (
    # Safetensors first: they are data only.
    "model.safetensors",
    "open_clip_model.safetensors",
    "pytorch_model.bin",
    "open_clip_pytorch_model.bin",
)


def locate_weights(lpm: LpmSettings, root: Path) -> Path:
    """Return the path of the weights file; one that is neither named nor cached is fetched into the hub's cache.

    Args:
        lpm: Name and source.
        root: Folder that a relative path starts at.

    Raises:
        UnsupportedModelError: timm has no such name.
        WeightsError: The file does not exist, the model has no published weights, or the hub cannot be reached
            (noticed within 5 seconds).
    """
    if lpm.weights != "hub":
        return _local(lpm, root)
    model = find_model(lpm.name, root)
    if model.folder is not None:
        return _in_folder(model.folder)
    subject = f"The weights of {lpm.name}"
    if model.cfg.hf_hub_id:
        return fetch(model.cfg.hf_hub_id, _hub_names(model), subject, LOCAL)
    if model.cfg.url:
        return _from_url(subject, model.cfg.url)
    raise WeightsError(
        f"timm has no pretrained weights for {lpm.name}.",
        "timm lists only the architecture under this name.",
        f"Set lpm.name to a model with weights, or {LOCAL}.",
    )


def need_hub(lpm: LpmSettings, root: Path) -> bool:
    """Return whether the weights are not on this machine, so that `locate_weights` would fetch them from the hub.

    Raises:
        UnsupportedModelError: timm has no such name.
    """
    if lpm.weights != "hub":
        return False
    model = find_model(lpm.name, root)
    if model.folder is not None or not model.cfg.hf_hub_id:
        return False
    return cached(model.cfg.hf_hub_id, _hub_names(model), lpm.name) is None


def _hub_names(model: ModelEntry) -> Sequence[str]:
    named = model.cfg.hf_hub_filename
    # timm's own repositories only use these two names.
    return [named] if named else _NAMES if model.is_repository else (_NAMES[0], _NAMES[2])


def _local(lpm: LpmSettings, root: Path) -> Path:
    path = root / Path(lpm.weights).expanduser()
    if not path.is_file():
        # A pipe or device is never opened: a read could wait forever.
        state = f"is {irregular(path)}" if path.exists() else "does not exist"
        raise WeightsError(
            f"The weights file {path} {state}.",
            f"lpm.weights is {lpm.weights!r}; relative paths start at {root}.",
            "Correct lpm.weights, or set it to hub.",
        )
    if path.suffix.lower() not in SUFFIXES:
        raise WeightsError(
            f"{path} is not a weights file that can be read.",
            f"Its suffix is {path.suffix!r}; supported are {', '.join(SUFFIXES)}.",
            f"Convert it, or {LOCAL}.",
        )
    return path


def _in_folder(folder: Path) -> Path:
    for name in _NAMES:
        if (folder / name).is_file():
            return folder / name
    others = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and path.is_file())
    if len(others) == 1:
        return others[0]
    content = f"several files of weights: {', '.join(path.name for path in others)}" if others else "no file of weights"
    raise WeightsError(
        f"{folder} holds {content}.",
        f"Expected is one of {', '.join(_NAMES)}, or one file with a suffix of {', '.join(SUFFIXES)}.",
        f"Name it {_NAMES[0]}, or {LOCAL}.",
    )


def _from_url(subject: str, url: str | tuple[str, str]) -> Path:
    from timm.models._hub import check_cached_file, download_cached_file, get_cache_dir

    address = url if isinstance(url, str) else url[0]
    if not check_cached_file(url):
        host = "{0.scheme}://{0.netloc}".format(urlsplit(address))
        if not answers(host, 5):
            raise WeightsError(
                f"{subject} are not on this machine, and {host} cannot be reached.",
                "No network, or a firewall.",
                f"S{LOCAL[1:]}.",
            )
    try:
        with storage_errors(Path(get_cache_dir())):
            return Path(download_cached_file(url))
    except StorageError:
        raise
    except (OSError, RuntimeError) as error:
        raise refused(subject, address, error, LOCAL) from error
