"""A check that raises or hangs is itself a finding."""

from __future__ import annotations

import threading
from collections.abc import Callable

from schemas.doctor import Finding
from schemas.errors import FptError

LIMIT = 60.0
"""Seconds that a check may take."""


def run_check(name: str, check: Callable[..., Finding], /, *arguments: object, limit: float = LIMIT) -> Finding:
    """The finding of a check; one that says why there is none, where it raises or takes too long.

    Args:
        name: Of the finding, where the check gives none.
        check: One of the checks.
        arguments: For the check.
        limit: Seconds.
    """
    found: list[Finding] = []

    def work() -> None:
        try:
            found.append(check(*arguments))
        except Exception as error:  # a broken installation raises anything (OSError of a library, AttributeError, ...)
            found.append(failed(name, error))

    # A daemon: a network drive that does not answer cannot be interrupted, only left behind.
    thread = threading.Thread(target=work, daemon=True, name=f"doctor: {name}")
    thread.start()
    thread.join(limit)
    return found[0] if found else Finding(name=name, status="fail", detail=f"no answer within {limit:g} seconds")


def failed(name: str, error: Exception) -> Finding:
    """The finding of an error; those of this package bring their repair."""
    if isinstance(error, FptError):
        detail = "\n".join(part for part in (error.state, error.cause) if part)
        return Finding(name=name, status="fail", detail=detail, repair=error.repair)
    lines = str(error).strip().splitlines()
    return Finding(name=name, status="fail", detail=f"{type(error).__name__}: {lines[0] if lines else '(no message)'}")
