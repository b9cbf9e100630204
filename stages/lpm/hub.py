"""The model hub: fetch a file, or take it from the cache on this machine; test whether the hub responds."""

from __future__ import annotations

import threading
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path

from schemas.errors import StorageError, WeightsError
from stages.files import storage_errors


def fetch(repo: str, names: Sequence[str], subject: str, otherwise: str) -> Path:
    """Return the first of some files of a repository, fetched into the hub's cache if it is not there yet.

    Args:
        repo: `organisation/name`, or `organisation/name@revision`.
        names: Files in the order of preference.
        subject: Their name in messages, such as "The weights of vit_base".
        otherwise: Advice without the hub, as a command that begins in lower case.

    Raises:
        WeightsError: The repository has none of them, or the hub cannot be reached (noticed within 5 seconds).
        StorageError: The cache cannot be written.
    """
    import huggingface_hub
    from huggingface_hub import constants, errors

    if (path := cached(repo, names, subject)) is not None:
        return path
    repo, _, revision = repo.partition("@")
    state, command = f"{subject} are not on this machine", f"{otherwise[0].upper()}{otherwise[1:]}"
    if constants.HF_HUB_OFFLINE:
        raise WeightsError(f"{state}, and HF_HUB_OFFLINE forbids to fetch them.", "", f"Unset it, or {otherwise}.")
    if not hub_reachable():
        raise WeightsError(
            f"{state}, and the model hub cannot be reached.",
            f"{constants.ENDPOINT} did not answer within 5 seconds: no network, a firewall, or a mirror is needed.",
            f"{command}, or set HF_ENDPOINT to a mirror of the hub.",
        )
    for name in names:
        try:
            with storage_errors(Path(constants.HF_HUB_CACHE)):
                return Path(str(huggingface_hub.hf_hub_download(repo, name, revision=revision or None)))
        except errors.LocalEntryNotFoundError as error:  # the connection broke; it is also an EntryNotFoundError
            raise refused(subject, repo, error, otherwise) from error
        except errors.EntryNotFoundError:
            continue
        except StorageError:
            raise
        except (OSError, ValueError) as error:  # the hub's own errors: no such repository or name, gated, 5xx
            raise refused(subject, repo, error, otherwise) from error
    raise WeightsError(f"The hub's {repo} holds none of {', '.join(names)}.", "", f"{command}.")


def cached(repo: str, names: Sequence[str], subject: str) -> Path | None:
    """Return the first of some files of a repository that is in the hub's cache on this machine; fetch nothing.

    Raises:
        WeightsError: `repo` is not the name of a repository.
    """
    import huggingface_hub
    from huggingface_hub import errors

    repo, _, revision = repo.partition("@")
    try:
        cached_files = [huggingface_hub.try_to_load_from_cache(repo, name, revision=revision or None) for name in names]
    except errors.HFValidationError as error:
        raise WeightsError(f"{subject} are not on the hub: {repo} is not a repository.", str(error)) from error
    return next((Path(path) for path in cached_files if isinstance(path, str)), None)


def refused(subject: str, source: str, error: Exception, otherwise: str) -> WeightsError:
    """Return the error for a source that responds but does not deliver the file."""
    text = str(error).strip().splitlines()
    return WeightsError(
        f"{subject} could not be fetched from {source}.",
        f"{type(error).__name__}: {text[0] if text else 'no details'}",
        f"Try again, or {otherwise}.",
    )


def hub_reachable(timeout: float = 5) -> bool:
    """Return whether the model hub (or the mirror in HF_ENDPOINT) responds within `timeout` seconds."""
    from huggingface_hub import constants

    return not constants.HF_HUB_OFFLINE and answers(constants.ENDPOINT, timeout)


def answers(address: str, timeout: float) -> bool:
    """Return whether any HTTP response arrives; proxies of the environment are used."""
    answered: list[bool] = []

    def request() -> None:
        try:
            with urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=timeout):
                answered.append(True)
        except urllib.error.HTTPError as error:
            answered.append(error.code < 500)
        except urllib.error.URLError as error:
            # A certificate that Python does not trust proves nothing: the hub's client brings its own.
            answered.append("CERTIFICATE_VERIFY_FAILED" in str(error.reason))
        except (OSError, ValueError):
            answered.append(False)

    # A thread, because name resolution takes no timeout and may hang for a minute.
    thread = threading.Thread(target=request, daemon=True, name="hub-reachable")
    thread.start()
    thread.join(timeout)
    return bool(answered and answered[0])
