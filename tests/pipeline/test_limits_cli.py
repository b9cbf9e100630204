"""Arguments that would never end are refused, and Ctrl-C works from the start."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from command_line import Fpt

from pipeline import cli
from schemas.errors import DataError
from stages.predict.inputs import _read_list


@pytest.mark.parametrize(("option", "value"), [("--random", 100_000_000), ("--splits", 100_000)])
def test_a_sweep_of_too_many_runs(fpt: Fpt, tmp_path: Path, option: str, value: int) -> None:
    _, err = fpt("sweep", "lr=1e-4..1e-3", option, value, cwd=tmp_path, code=2)
    assert option in err
    assert "less than or equal to" in err


def test_a_named_pipe_for_a_list_of_images(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "list.txt")
    with pytest.raises(DataError, match="Not a regular file"):
        _read_list(tmp_path / "list.txt")


def test_ctrl_c_while_the_words_are_read(fpt: Fpt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli._Verbs, "parse_args", interrupt)
    _, err = fpt("prepare", cwd=tmp_path, code=130)
    assert "Interrupted." in err
