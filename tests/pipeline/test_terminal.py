"""Terminal output without control sequences, files that would block, and paths that the system rejects."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline import cli, console
from pipeline.commands import cache as cache_module
from schemas.errors import FptError, UnreadableImagesError
from schemas.text import counted, json_visible, shortened, visible

NASTY = "a\x1b[31mb\x07\x08\r\x9b2J\u202egnp\u2066\udcff\x00"
SHOWN = r"a\x1b[31mb\x07\x08\r\x9b2J\u202egnp\u2066\udcff\x00"
RAW = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def captured(print_it: object, *arguments: object, **keywords: object) -> str:
    stream = io.StringIO()
    with contextlib.redirect_stdout(stream), contextlib.redirect_stderr(stream):
        assert callable(print_it)
        print_it(*arguments, **keywords)
    return stream.getvalue()


def fpt(*words: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    with pytest.raises(SystemExit) as stopped:
        cli.main(words)
    out, err = capsys.readouterr()
    assert isinstance(stopped.value.code, int)
    return stopped.value.code, out + err


def test_visible_text() -> None:
    assert visible(NASTY) == SHOWN
    assert visible("tab\tline\nend") == r"tab\tline\nend"
    assert visible("tab\tline\nend", "\n") == "tab\\tline\nend"
    assert visible("Größe 日本 😀 e\u0301") == "Größe 日本 😀 e\u0301"
    assert visible(Path("a")) == "a"


def test_counted_nouns() -> None:
    assert [counted(n, "image") for n in (0, 1, 2, 1000)] == ["0 images", "1 image", "2 images", "1,000 images"]
    assert counted(2, "class") == "2 classes"
    assert counted(2, "retry") == "2 retries"
    assert counted(2, "key") == "2 keys"


def test_long_lines_lose_their_middle() -> None:
    assert shortened("x" * 400) == "x" * 400
    line = shortened("start" + "x" * 9000 + "end")
    assert line.startswith("start") and line.endswith("end (9,008 characters)") and len(line) < 500


@pytest.mark.parametrize(
    "text",
    [
        captured(console.say, NASTY),
        captured(console.show, NASTY),
        captured(console.print_error, NASTY),
        captured(console.show_pairs, NASTY, [(NASTY, NASTY)]),
        captured(console.show_table, NASTY, [NASTY], [[NASTY]]),
        captured(console.stderr_console().print, NASTY),
    ],
)
def test_every_way_out_is_escaped(text: str) -> None:
    assert not RAW.search(text), repr(text)
    assert r"\x1b[31m" in text and r"\u202e" in text


def test_a_table_with_escaped_names_keeps_its_columns() -> None:
    text = captured(console.show_table, "", ["name", "n"], [["plain", "1"], ["e\x1bsc", "2"]])
    assert len({len(line) for line in text.splitlines() if line}) == 1, text


def test_our_own_line_breaks_stay() -> None:
    assert captured(console.say, "one\ntwo") == "one\ntwo\n"


def test_json_stays_json() -> None:
    value = {"path": NASTY, "plain": "Größe 😀", "lines": "a\nb"}
    text = captured(console.show_json, value)
    assert json.loads(text) == value
    assert not RAW.search(text)
    assert json.loads(json_visible(json.dumps(value, ensure_ascii=False))) == value


def test_a_name_with_a_line_break_is_one_line_of_a_list() -> None:
    error = UnreadableImagesError([("a\nb.png: fine", "cut\noff")])
    assert str(error).splitlines()[1:] == [r"  a\nb.png: fine: cut\noff"]


@pytest.mark.parametrize(
    "words",
    [
        [NASTY],
        ["prepare", NASTY],
        ["prepare", f"--{NASTY}"],
        ["prepare", "--params", NASTY[:-1]],
        ["prepare", "--debug", "--params", NASTY[:-1]],
    ],
)
def test_words_of_the_command_line_are_escaped(
    words: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, text = fpt(*words, capsys=capsys)
    assert code == 2
    assert r"\x1b[31m" in text and not RAW.search(text), repr(text)


def test_faults_of_the_program_are_escaped(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(_: str) -> None:
        raise RuntimeError(NASTY)

    monkeypatch.setattr(cache_module, "show", fail)
    code, text = fpt("cache", "path", capsys=capsys)
    assert code == 1
    assert r"\x1b[31m" in text and not RAW.search(text)


def test_a_terminal_of_few_characters_is_no_fault() -> None:
    code = "from pipeline.cli import main; main(['prepare', '--params', 'Größe\\udcff.yaml'])"
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONIOENCODING": "ascii"}, capture_output=True, check=False
    )
    assert done.returncode == 2, done.stderr
    assert rb"There is no Gr\xf6\xdfe\udcff.yaml" in done.stderr


def test_a_progress_bar_is_escaped(monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline.progress import ImageBar

    monkeypatch.setenv("FORCE_COLOR", "1")
    stream = io.StringIO()
    with contextlib.redirect_stderr(stream), ImageBar(NASTY) as bar:
        bar(1, 2)
    assert r"\x1b[31mb" in stream.getvalue() and "\x1b[31mb" not in stream.getvalue()


LONG = "n" * 300
DEEP = "d/" * 3000


@pytest.mark.parametrize(
    "words",
    [
        ["prepare", "--params", LONG],
        ["prepare", "--params", DEEP],
        ["prepare", "--set", f"data.images={LONG}"],
        ["prepare", "--set", f"data.images={DEEP}"],
        ["prepare", "--set", f"data.labels={LONG}"],
        ["extract", "--set", f"lpm.weights={LONG}.safetensors"],
        ["prepare", "--set", f"lpm.name=local-dir:{LONG}"],
        ["predict", LONG],
        ["predict", "x.png", "--model", LONG],
        ["compare", LONG, DEEP],
        ["init", LONG, "--images", "images"],
        ["init", "study", "--images", LONG],
        ["init", "study", "--images", "images", "--labels", LONG],
        ["demo", "data", "--params", DEEP],
        ["demo", "summary", "--params", LONG],
        ["cost", "--params", LONG],
        ["doctor", "--params", LONG],
        ["evaluate", "--model", LONG],
        ["train", "--output", LONG],
    ],
)
def test_a_path_that_the_system_refuses_is_a_plain_error(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        (tmp_path / "images" / name).mkdir(parents=True)
        (tmp_path / "images" / name / "x.png").write_bytes(b"")
    (tmp_path / "params.yaml").write_text("method: fpt+\nlpm: {name: test_vit}\nfeatures: {image_size: 64}\n")
    before = sorted(tmp_path.rglob("*"))
    code, text = fpt(*words, capsys=capsys)
    assert code == 2, text
    assert "error inside fpt" not in text
    assert len(text) < 3000
    assert sorted(tmp_path.rglob("*")) == before


def test_an_os_error_about_a_path_is_explained(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(_: str) -> None:
        raise error

    monkeypatch.setattr(cache_module, "show", fail)
    error = OSError(40, "Too many levels of symbolic links", "loop/x")
    code, text = fpt("cache", "path", capsys=capsys)
    assert code == 2
    assert text.startswith("loop/x: Too many levels of symbolic links.\n")
    error = OSError("no file at all")
    code, text = fpt("cache", "path", capsys=capsys)
    assert code == 1
    assert "error inside fpt" in text


@pytest.mark.timeout(60)
@pytest.mark.parametrize("setting", ["params", "weights", "local-dir"])
def test_what_is_no_regular_file_is_never_opened(
    setting: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    os.mkfifo("lpm.safetensors")
    os.mkfifo("config.json")
    (tmp_path / "link.yaml").symlink_to("pipe")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket")
        special = [("socket", "a socket"), ("/dev/zero", "a device")]
        cases = {
            "params": [("pipe", "a named pipe"), ("link.yaml", "a named pipe"), *special],
            "weights": [("lpm.safetensors", "a named pipe"), *special],
            "local-dir": [(".", "a named pipe")],
        }
        (tmp_path / "params.yaml").write_text("method: fpt+\nlpm: {name: test_vit}\nfeatures: {image_size: 64}\n")
        (tmp_path / "outputs" / "manifest").mkdir(parents=True)
        for place, kind in cases[setting]:
            option = {
                "params": ["--params", place],
                "weights": ["--set", f"lpm.weights={place}"],
                "local-dir": ["--set", f"lpm.name=local-dir:{place}"],
            }[setting]
            verb = "doctor" if setting == "weights" else "prepare"
            code, text = fpt(verb, *option, capsys=capsys)
            assert code == (1 if verb == "doctor" else 2), text
            assert f"is {kind}" in re.sub(r"[│\s]+", " ", text), text


def test_a_huge_settings_file_is_not_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with (tmp_path / "params.yaml").open("wb") as file:
        file.truncate(2**40)
    code, text = fpt("prepare", "--params", str(tmp_path / "params.yaml"), capsys=capsys)
    assert code == 2
    assert "larger than 1 MiB" in text


def test_errors_keep_their_lines(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(_: str) -> None:
        raise FptError("state", "cause", "x" * 10_000)

    monkeypatch.setattr(cache_module, "show", fail)
    _, text = fpt("cache", "path", capsys=capsys)
    assert text.splitlines()[:2] == ["state", "cause"]
    assert len(text) < 1000
