"""`fpt` in this process, as a user would type it in a study."""

from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline import cli

Fpt = Callable[..., tuple[str, str]]
"""Words, `cwd` and the expected exit `code` -> stdout and stderr."""


def command_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Fpt:
    """A function that runs one command; tables are as wide as they need."""
    monkeypatch.delenv("FPT_CACHE_DIR", raising=False)
    monkeypatch.setenv("COLUMNS", "220")

    def command(*words: object, cwd: Path, code: int = 0) -> tuple[str, str]:
        monkeypatch.chdir(cwd)
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            cli.main([str(word) for word in words])
        captured = capsys.readouterr()
        assert stopped.value.code == code, captured.err
        return captured.out, captured.err

    return command
