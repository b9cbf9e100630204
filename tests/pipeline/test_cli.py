import subprocess
import sys
from pathlib import Path

import pytest

from pipeline import cli
from pipeline.commands import cache as cache_module
from schemas.errors import FptError, InterruptedRunError


def fpt(*words: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stopped:
        cli.main(words)
    captured = capsys.readouterr()
    code = stopped.value.code
    assert isinstance(code, int)
    return code, captured.out, captured.err


@pytest.mark.parametrize(
    "verb", ["init", "prepare", "extract", "train", "bench", "evaluate", "predict", "cost", "cache", "demo", "doctor"]
)
def test_every_verb_explains_itself(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = fpt(verb, "--help", capsys=capsys)
    assert code == 0
    assert "Usage: fpt" in out


@pytest.mark.parametrize("verb", ["prepare", "extract", "train", "evaluate", "cost"])
def test_every_verb_takes_params_and_overrides(
    verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text("")
    code, out, err = fpt(verb, "--params", "mine.yaml", "--set", "train.lrr=1", "--set", "dta.seed=2", capsys=capsys)
    assert code == 2
    assert out == ""
    assert "mine.yaml is not valid: 2 problems" in err
    assert "did you mean 'train.lr'" in err


@pytest.mark.parametrize("verb", ["prepare", "extract", "train", "evaluate"])
def test_outside_of_a_study_the_next_command_is_named(
    verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = fpt(verb, capsys=capsys)
    assert (code, out) == (2, "")
    assert err.startswith("There is no params.yaml")
    assert "fpt init" in err
    assert "Traceback" not in err


@pytest.mark.parametrize("words", [["--debug", "prepare"], ["prepare", "--debug"]])
def test_debug_shows_the_traceback(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, err = fpt(*words, capsys=capsys)
    assert code == 2
    assert "Traceback" in err
    assert "ProjectError" in err


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (FptError("The state.", "The cause.", "The repair."), 2, "The state.\nThe cause.\nThe repair.\n"),
        (ZeroDivisionError("by zero\nsecond line"), 1, "ZeroDivisionError: by zero\nThis is an error inside fpt."),
        (RuntimeError(), 1, "RuntimeError: (no message)"),
        (KeyboardInterrupt(), 130, "Interrupted.\n"),
        (InterruptedRunError("3 of 4 rows."), 130, "Interrupted. 3 of 4 rows. Run `fpt cache path` again.\n"),
    ],
)
def test_errors_become_words_and_codes(
    error: BaseException,
    code: int,
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(_: str) -> None:
        raise error

    monkeypatch.setattr(cache_module, "show", fail)
    found, out, err = fpt("cache", "path", capsys=capsys)
    assert (found, out) == (code, "")
    assert err.startswith(words)
    assert "Traceback" not in err


def test_a_wrong_option_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = fpt("prepare", "--colour", capsys=capsys)
    assert code == 2
    assert "--colour" in err


def test_the_cache_path_is_a_line_on_stdout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FPT_CACHE_DIR", str(tmp_path / "a cache"))
    assert fpt("cache", "path", capsys=capsys) == (0, f"{tmp_path / 'a cache'}\n", "")


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = fpt("--version", capsys=capsys)
    assert code == 0
    assert out.strip().count(".") == 2


def test_help_loads_no_stage() -> None:
    code = (
        "import sys\n"
        "from pipeline.cli import main\n"
        "try:\n    main(['--help'])\n"
        "except SystemExit:\n    pass\n"
        "heavy = {'torch', 'timm', 'zarr', 'dvc', 'dvclive', 'pyarrow', 'sklearn'} & set(sys.modules)\n"
        "sys.exit(str(heavy) if heavy else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
