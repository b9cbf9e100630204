"""Run checks so that one that raises or hangs becomes a finding."""

from __future__ import annotations

import threading
from collections.abc import Callable

from schemas.doctor import Finding
from schemas.errors import FptError

LIMIT = 60.0
"""Time limit of a check in seconds."""


def run_check(name: str, check: Callable[..., Finding], /, *arguments: object, limit: float = LIMIT) -> Finding:
    """Run a check and return its finding, or a failure if it raises or takes too long.

    Args:
        name: Name of the finding if the check itself returns none.
        check: The check.
        arguments: Its arguments.
        limit: Time limit in seconds.
    """
    findings: list[Finding] = []

    def work() -> None:
        try:
            findings.append(check(*arguments))
        except Exception as error:  # a broken installation raises anything (OSError of a library, AttributeError, ...)
            findings.append(failed(name, error))

    # A daemon thread, because a call that hangs on a network drive cannot be interrupted.
    thread = threading.Thread(target=work, daemon=True, name=f"doctor: {name}")
    thread.start()
    thread.join(limit)
    return findings[0] if findings else Finding(name=name, status="fail", detail=f"no answer within {limit:g} seconds")


def failed(name: str, error: Exception) -> Finding:
    """Return the finding for an error; errors of this package include a repair."""
    if isinstance(error, FptError):
        detail = "\n".join(part for part in (error.state, error.cause) if part)
        return Finding(name=name, status="fail", detail=detail, repair=error.repair)
    lines = str(error).strip().splitlines()
    return Finding(name=name, status="fail", detail=f"{type(error).__name__}: {lines[0] if lines else '(no message)'}")
