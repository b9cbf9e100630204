"""Error classes. Every error that a user can cause or encounter is an `FptError`.

A message has three parts: the state, its likely cause, and the next command or edit. The CLI prints only this text and
exits with 2; `--debug` adds the traceback. Each leaf is also the builtin that a library user would expect, so that
`except ValueError` keeps working.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from schemas.text import counted, visible

SHOWN = 30
"""Settings problems listed in a message; further ones are counted."""


class FptError(Exception):
    """Root of all errors of this package.

    Args:
        state: What went wrong, in one sentence.
        cause: Likely cause; empty if the state is self-explanatory.
        repair: Next command or edit; empty if nothing can be done.
    """

    def __init__(self, state: str, cause: str = "", repair: str = "") -> None:
        self.state, self.cause, self.repair = state, cause, repair
        super().__init__("\n".join(part for part in (state, cause, repair) if part))

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle every field, for errors that cross process boundaries."""
        return _rebuild, (type(self), self.args, dict(self.__dict__))


def _rebuild(kind: type[FptError], args: tuple[Any, ...], fields: dict[str, Any]) -> FptError:
    error = kind.__new__(kind)
    error.args = args
    error.__dict__.update(fields)
    return error


class SettingsError(FptError, ValueError):
    """`params.yaml` or a `--set` override is invalid. `problems` holds every (dotted path, message)."""

    def __init__(self, state: str, problems: Sequence[tuple[str, str]] = (), repair: str = "") -> None:
        self.problems = tuple(problems)
        lines = [f"  {visible(path)}: {visible(message)}" for path, message in self.problems[:SHOWN]]
        if len(self.problems) > SHOWN:
            lines.append(f"  ... and {len(self.problems) - SHOWN:,} more")
        super().__init__(state, "\n".join(lines), repair)


class ProjectError(FptError, ValueError):
    """A study directory is missing, incomplete, or would be overwritten."""


class DataError(FptError, ValueError):
    """The images or labels do not form a usable data set (empty class, missing file, typo)."""


class ImageError(FptError, ValueError):
    """One image cannot be used. `path` is its path, `reason` a short explanation."""

    def __init__(self, path: str, reason: str) -> None:
        self.path, self.reason = path, reason
        super().__init__(f"{visible(path)}: {visible(reason)}")


class UnreadableImagesError(DataError):
    """Several images cannot be used. `failures` holds every (path, reason)."""

    def __init__(self, failures: Sequence[tuple[str, str]], repair: str = "", shown: int = 20) -> None:
        self.failures = tuple(failures)
        lines = [f"  {visible(path)}: {visible(reason)}" for path, reason in self.failures[:shown]]
        if len(self.failures) > shown:
            lines.append(f"  ... and {len(self.failures) - shown:,} more")
        super().__init__(f"{counted(len(self.failures), 'image')} cannot be used.", "\n".join(lines), repair)


class ManifestError(FptError, ValueError):
    """The manifest is missing, damaged, or was made from other images."""


class UnsupportedModelError(FptError, ValueError):
    """The LPM has no global attention to take keys and values from, or timm has no such model."""


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
    """The remote side of a push or pull cannot be reached, or the bytes that arrived differ from those sent."""


class CacheMismatchError(FptError, ValueError):
    """Features were computed with other settings. `differing` maps a field to (expected, found)."""

    def __init__(self, state: str, differing: Mapping[str, tuple[Any, Any]], cause: str = "", repair: str = "") -> None:
        self.differing = dict(differing)
        lines = [f"  {name}: expected {a!r}, found {b!r}" for name, (a, b) in self.differing.items()]
        super().__init__(state, "\n".join([*lines, *([cause] if cause else [])]), repair)


class CacheIncompleteError(FptError, LookupError):
    """The store lacks rows or shards that a receipt names. `missing` holds row ids or file names."""

    def __init__(self, state: str, missing: Sequence[str] = (), cause: str = "", repair: str = "") -> None:
        self.missing = tuple(missing)
        super().__init__(state, cause, repair)


class CacheCorruptError(FptError, ValueError):
    """Bytes in the store differ from what was written. `shard` names the shard or file."""

    def __init__(self, state: str, shard: str = "", cause: str = "", repair: str = "") -> None:
        self.shard = shard
        super().__init__(state, cause, repair)


class TrainingError(FptError, RuntimeError):
    """Training cannot start or has failed (a class without training images, a non-finite loss)."""


class BundleError(FptError, ValueError):
    """A model bundle is missing, damaged, or does not match the given features."""


class EvaluationError(FptError, ValueError):
    """There is nothing to evaluate, or the predictions are damaged (an empty split, non-finite probabilities)."""


class DeviceMemoryError(FptError, RuntimeError):
    """The device ran out of memory, even with the smallest batch."""


class PlatformError(FptError, RuntimeError):
    """This machine, or this build of a library, lacks something that is required."""


class ClusterError(FptError, RuntimeError):
    """The cluster cannot be reached, has no suitable worker, or lost a shard too often."""


class InterruptedRunError(KeyboardInterrupt):
    """Ctrl-C or SIGTERM arrived; finished work is saved. The input is not at fault, so it is not an `FptError`."""
