"""What `fpt doctor` says about a machine and a study."""

from __future__ import annotations

from typing import Literal

from schemas.base import Contract

Status = Literal["ok", "warn", "fail", "skipped"]


class Finding(Contract):
    """Result of one check."""

    name: str
    """What was looked at."""
    status: Status
    """ok; warn: works, but not as well or as safely as it could; fail: a command would fail; skipped: nothing to look
    at, or what it needs failed."""
    detail: str
    """What is the case."""
    repair: str = ""
    """The next command or edit; empty where there is nothing to mend."""


class Health(Contract):
    """All findings, in the order in which the pipeline would meet them."""

    findings: tuple[Finding, ...]
    """One per check."""

    @property
    def healthy(self) -> bool:
        """Whether nothing would fail."""
        return all(finding.status != "fail" for finding in self.findings)
