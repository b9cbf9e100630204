"""The error tree. Every error that a user can cause or meet is an `FptError`.

A message says three things: the state (`what is`), its likely cause and the next command or edit. The CLI prints
that text alone and exits with 2; the traceback is shown with `--debug` only. Each leaf is also the builtin that a
library user would expect, so that `except ValueError` keeps working.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from schemas.text import counted, visible

SHOWN = 30
"""Problems of settings that a message lists; the rest are counted."""


class FptError(Exception):
    """Root of all errors of this package.

    Args:
        state: What is the case, in one sentence.
        cause: What it probably means; may be empty where the state says it all.
        repair: The next command or edit; may be empty where nothing can be done.
    """

    def __init__(self, state: str, cause: str = "", repair: str = "") -> None:
        self.state, self.cause, self.repair = state, cause, repair
        super().__init__("\n".join(part for part in (state, cause, repair) if part))

    def __reduce__(self) -> tuple[Any, ...]:
        """Survive pickling between processes with every field."""
        return _rebuild, (type(self), self.args, dict(self.__dict__))


def _rebuild(kind: type[FptError], args: tuple[Any, ...], fields: dict[str, Any]) -> FptError:
    error = kind.__new__(kind)
    error.args = args
    error.__dict__.update(fields)
    return error


class SettingsError(FptError, ValueError):
    """`params.yaml` or a `--set` override is not valid. `problems` holds every (dotted path, message)."""

    def __init__(self, state: str, problems: Sequence[tuple[str, str]] = (), repair: str = "") -> None:
        self.problems = tuple(problems)
        lines = [f"  {visible(path)}: {visible(message)}" for path, message in self.problems[:SHOWN]]
        if len(self.problems) > SHOWN:
            lines.append(f"  ... and {len(self.problems) - SHOWN:,} more")
        super().__init__(state, "\n".join(lines), repair)


class ProjectError(FptError, ValueError):
    """A study directory is missing, incomplete, or would be overwritten."""


class DataError(FptError, ValueError):
    """The images or labels that the settings name cannot make a data set (empty class, missing file, typo)."""


class ImageError(FptError, ValueError):
    """One image cannot be used. `path` names it, `reason` says why in a few words."""

    def __init__(self, path: str, reason: str) -> None:
        self.path, self.reason = path, reason
        super().__init__(f"{visible(path)}: {visible(reason)}")


class UnreadableImagesError(DataError):
    """Several images cannot be used; all are listed. `failures` holds (path, reason)."""

    def __init__(self, failures: Sequence[tuple[str, str]], repair: str = "", shown: int = 20) -> None:
        self.failures = tuple(failures)
        lines = [f"  {visible(path)}: {visible(reason)}" for path, reason in self.failures[:shown]]
        if len(self.failures) > shown:
            lines.append(f"  ... and {len(self.failures) - shown:,} more")
        super().__init__(f"{counted(len(self.failures), 'image')} cannot be used.", "\n".join(lines), repair)


class ManifestError(FptError, ValueError):
    """The manifest is missing, damaged, or was made from other images."""


class UnsupportedModelError(FptError, ValueError):
    """The LPM has no global attention that keys and values could be taken from, or is not known to timm."""


class WeightsError(FptError, ValueError):
    """The weights file of the LPM is missing, unreadable, unsafe, or belongs to another model."""


class StorageError(FptError, OSError):
    """The disk is full, or a folder cannot be written."""

    def __init__(self, state: str, cause: str = "", repair: str = "") -> None:
        # OSError with two or three positional arguments would read them as errno and strerror.
        FptError.__init__(self, state, cause, repair)

    def __str__(self) -> str:
        return "\n".join(part for part in (self.state, self.cause, self.repair) if part)


class TransferError(StorageError):
    """The other side of a push or pull cannot be reached, or bytes that arrived are not those that were sent."""


class CacheMismatchError(FptError, ValueError):
    """Features were computed under other settings. `differing` maps a field to (expected, found)."""

    def __init__(self, state: str, differing: Mapping[str, tuple[Any, Any]], cause: str = "", repair: str = "") -> None:
        self.differing = dict(differing)
        lines = [f"  {name}: expected {a!r}, found {b!r}" for name, (a, b) in self.differing.items()]
        super().__init__(state, "\n".join([*lines, *([cause] if cause else [])]), repair)


class CacheIncompleteError(FptError, LookupError):
    """The store lacks rows or shards that a receipt names. `missing` holds image ids or shard names."""

    def __init__(self, state: str, missing: Sequence[str] = (), cause: str = "", repair: str = "") -> None:
        self.missing = tuple(missing)
        super().__init__(state, cause, repair)


class CacheCorruptError(FptError, ValueError):
    """Bytes in the store differ from what was written. `shard` names the place."""

    def __init__(self, state: str, shard: str = "", cause: str = "", repair: str = "") -> None:
        self.shard = shard
        super().__init__(state, cause, repair)


class TrainingError(FptError, RuntimeError):
    """Training cannot start or went wrong (a class without training images, a loss that is not finite)."""


class BundleError(FptError, ValueError):
    """A model bundle is missing, damaged, or does not fit the features it is asked to read."""


class EvaluationError(FptError, ValueError):
    """Nothing to judge, or what should be judged is damaged (an empty split, probabilities that are not finite)."""


class DeviceMemoryError(FptError, RuntimeError):
    """The memory of the device is too small for what was asked."""


class PlatformError(FptError, RuntimeError):
    """This machine, or this build of a library, lacks something that is needed."""


class ClusterError(FptError, RuntimeError):
    """The cluster cannot be reached, has no worker that fits, or lost a shard too often."""


class InterruptedRunError(KeyboardInterrupt):
    """Ctrl-C or SIGTERM came, and what was finished is saved. No error of the input, so no `FptError`."""
