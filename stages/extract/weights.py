"""Where the LPM's weights are: a local file, the hub's cache on this machine, or the hub."""

from __future__ import annotations

import threading
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from schemas.errors import StorageError, WeightsError
from schemas.settings import LpmSettings
from stages.extract.models import pretrained_cfg
from stages.files import storage_errors

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".npz")
LOCAL = "set lpm.weights to a local file (.safetensors, .pth, .npz)"


def locate_weights(lpm: LpmSettings, root: Path) -> Path:
    """Path of the weights file; what is neither given nor cached is fetched into the hub's own cache.

    Args:
        lpm: Name and source.
        root: Folder that a relative path starts at.

    Raises:
        UnsupportedModelError: timm does not know the name.
        WeightsError: There is no such file, the model has no published weights, or the hub cannot be reached
            (noticed within 5 seconds).
    """
    if lpm.weights != "hub":
        return _local(lpm, root)
    cfg = pretrained_cfg(lpm.name)
    if cfg.hf_hub_id:
        return _from_hub(lpm.name, cfg)
    if cfg.url:
        return _from_url(lpm.name, cfg.url)
    raise WeightsError(
        f"timm has no pretrained weights for {lpm.name}.",
        "Only the architecture is known under this name.",
        f"Set lpm.name to a model with weights, or {LOCAL}.",
    )


def _local(lpm: LpmSettings, root: Path) -> Path:
    path = root / Path(lpm.weights).expanduser()
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise WeightsError(
            f"The weights file {path} {what}.",
            f"lpm.weights is {lpm.weights!r}; relative paths start at {root}.",
            "Correct lpm.weights, or set it to hub.",
        )
    if path.suffix.lower() not in SUFFIXES:
        raise WeightsError(
            f"{path} is not a weights file that can be read.",
            f"Its suffix is {path.suffix!r}; known are {', '.join(SUFFIXES)}.",
            f"Convert it, or {LOCAL}.",
        )
    return path


def _from_hub(name: str, cfg: Any) -> Path:
    import huggingface_hub
    from huggingface_hub import constants, errors

    repo, _, revision = cfg.hf_hub_id.partition("@")
    # Safetensors first: they are data only.
    names = [cfg.hf_hub_filename] if cfg.hf_hub_filename else ["model.safetensors", "pytorch_model.bin"]
    for filename in names:
        cached = huggingface_hub.try_to_load_from_cache(repo, filename, revision=revision or None)
        if isinstance(cached, str):
            return Path(cached)
    state = f"The weights of {name} are not on this machine"
    if constants.HF_HUB_OFFLINE:
        raise WeightsError(f"{state}, and HF_HUB_OFFLINE forbids to fetch them.", "", f"Unset it, or {LOCAL}.")
    if not hub_reachable():
        raise WeightsError(
            f"{state}, and the model hub cannot be reached.",
            f"{constants.ENDPOINT} did not answer within 5 seconds: no network, a firewall, or a mirror is needed.",
            f"S{LOCAL[1:]}, or set HF_ENDPOINT to a mirror of the hub.",
        )
    for filename in names:
        try:
            with storage_errors(Path(constants.HF_HUB_CACHE)):
                return Path(str(huggingface_hub.hf_hub_download(repo, filename, revision=revision or None)))
        except errors.LocalEntryNotFoundError as error:  # the connection broke; it is also an EntryNotFoundError
            raise _refused(name, repo, error) from error
        except errors.EntryNotFoundError:
            continue
        except StorageError:
            raise
        except OSError as error:  # the hub's own errors are OSErrors: no such repository, gated, 5xx
            raise _refused(name, repo, error) from error
    raise WeightsError(f"The hub's {repo} holds none of {', '.join(names)}.", "", f"S{LOCAL[1:]}.")


def _from_url(name: str, url: str | tuple[str, str]) -> Path:
    from timm.models._hub import check_cached_file, download_cached_file, get_cache_dir

    address = url if isinstance(url, str) else url[0]
    if not check_cached_file(url):
        host = "{0.scheme}://{0.netloc}".format(urlsplit(address))
        if not _answers(host, 5):
            raise WeightsError(
                f"The weights of {name} are not on this machine, and {host} cannot be reached.",
                "No network, or a firewall.",
                f"S{LOCAL[1:]}.",
            )
    try:
        with storage_errors(Path(get_cache_dir())):
            return Path(download_cached_file(url))
    except StorageError:
        raise
    except (OSError, RuntimeError) as error:
        raise _refused(name, address, error) from error


def _refused(name: str, source: str, error: Exception) -> WeightsError:
    text = str(error).strip().splitlines()
    return WeightsError(
        f"The weights of {name} could not be fetched from {source}.",
        f"{type(error).__name__}: {text[0] if text else 'no details'}",
        f"Try again, or {LOCAL}.",
    )


def hub_reachable(timeout: float = 5) -> bool:
    """Whether the model hub (or the mirror that HF_ENDPOINT names) answers within `timeout` seconds."""
    from huggingface_hub import constants

    return not constants.HF_HUB_OFFLINE and _answers(constants.ENDPOINT, timeout)


def _answers(address: str, timeout: float) -> bool:
    """Whether any HTTP answer comes back; proxies of the environment are used."""
    answered: list[bool] = []

    def ask() -> None:
        try:
            with urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=timeout):
                answered.append(True)
        except urllib.error.HTTPError as error:
            answered.append(error.code < 500)
        except urllib.error.URLError as error:
            # A certificate that Python's own store lacks is no proof: the hub's client brings its own.
            answered.append("CERTIFICATE_VERIFY_FAILED" in str(error.reason))
        except (OSError, ValueError):
            answered.append(False)

    # A thread, because looking a name up cannot be given a limit and may hang for a minute.
    thread = threading.Thread(target=ask, daemon=True, name="hub-reachable")
    thread.start()
    thread.join(timeout)
    return bool(answered and answered[0])
