"""The model hub: a file from its cache on this machine, or fetched; and whether it answers at all."""

from __future__ import annotations

import threading
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path

from schemas.errors import StorageError, WeightsError
from stages.files import storage_errors


def fetch(repo: str, names: Sequence[str], what: str, otherwise: str) -> Path:
    """The first of some files of a repository; fetched into the hub's own cache where it is not there yet.

    Args:
        repo: `organisation/name`, or `organisation/name@revision`.
        names: Files in the order of preference.
        what: What they are, for messages: "The weights of vit_base".
        otherwise: What the user can do without the hub, as a command that begins in lower case.

    Raises:
        WeightsError: None of them is there, or the hub cannot be reached (noticed within 5 seconds).
        StorageError: The cache cannot be written.
    """
    import huggingface_hub
    from huggingface_hub import constants, errors

    if (path := cached(repo, names, what)) is not None:
        return path
    repo, _, revision = repo.partition("@")
    state, command = f"{what} are not on this machine", f"{otherwise[0].upper()}{otherwise[1:]}"
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
            raise refused(what, repo, error, otherwise) from error
        except errors.EntryNotFoundError:
            continue
        except StorageError:
            raise
        except (OSError, ValueError) as error:  # the hub's own errors: no such repository or name, gated, 5xx
            raise refused(what, repo, error, otherwise) from error
    raise WeightsError(f"The hub's {repo} holds none of {', '.join(names)}.", "", f"{command}.")


def cached(repo: str, names: Sequence[str], what: str) -> Path | None:
    """The first of some files of a repository that the hub's cache on this machine holds; nothing is fetched.

    Raises:
        WeightsError: It is no repository's name.
    """
    import huggingface_hub
    from huggingface_hub import errors

    repo, _, revision = repo.partition("@")
    try:
        found = [huggingface_hub.try_to_load_from_cache(repo, name, revision=revision or None) for name in names]
    except errors.HFValidationError as error:
        raise WeightsError(f"{what} are not on the hub, for this is not a repository: {repo}.", str(error)) from error
    return next((Path(path) for path in found if isinstance(path, str)), None)


def refused(what: str, source: str, error: Exception, otherwise: str) -> WeightsError:
    """The error for a source that answered, but did not give the file."""
    text = str(error).strip().splitlines()
    return WeightsError(
        f"{what} could not be fetched from {source}.",
        f"{type(error).__name__}: {text[0] if text else 'no details'}",
        f"Try again, or {otherwise}.",
    )


def hub_reachable(timeout: float = 5) -> bool:
    """Whether the model hub (or the mirror that HF_ENDPOINT names) answers within `timeout` seconds."""
    from huggingface_hub import constants

    return not constants.HF_HUB_OFFLINE and answers(constants.ENDPOINT, timeout)


def answers(address: str, timeout: float) -> bool:
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
