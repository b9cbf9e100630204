"""Results of `fpt doctor` for a machine and a study."""

from __future__ import annotations

from typing import Literal

from schemas.base import Contract

Status = Literal["ok", "warn", "fail", "skipped"]


class Finding(Contract):
    """Result of one check."""

    name: str
    """Name of the check."""
    status: Status
    """ok; warn: works, but slower or less safely than it could; fail: a command would fail; skipped: nothing to check,
    or a check that it depends on failed."""
    detail: str
    """What was found."""
    repair: str = ""
    """Next command or edit; empty if nothing needs fixing."""


class Health(Contract):
    """All findings, in the order in which the pipeline depends on them."""

    findings: tuple[Finding, ...]
    """One finding per check."""

    @property
    def healthy(self) -> bool:
        """Whether no check failed."""
        return all(finding.status != "fail" for finding in self.findings)
