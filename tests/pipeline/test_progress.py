import io

import pytest
from rich.console import Console

from pipeline import progress
from pipeline.console import duration, score, size
from pipeline.progress import ImageBar


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_a_log_gets_a_line_now_and_then(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with ImageBar("Features") as bar:
        for step in range(10):
            clock[0] = 10.0 * step
            bar(100 + step, 200)
    lines = capsys.readouterr().err.splitlines()
    # Cached images do not count: 10 s per image, regardless of the number in the cache.
    assert lines[0] == "Features: 102 of 200, 10.0 s/image, 16 min 20 s left"
    assert len(lines) == 4


def test_a_terminal_gets_a_bar_with_rate(
    clock: list[float], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(progress, "stderr_console", lambda: Console(file=screen, force_terminal=True, width=120))
    with ImageBar("Features") as bar:
        bar(0, 4)
        clock[0] = 1.0
        bar(2, 4)
    assert "2/4" in screen.getvalue()
    assert "2.0 images/s" in screen.getvalue()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (size(512), "512 bytes"),
        (size(3876464), "3.7 MiB"),
        (size(5 * 1024**4), "5.0 TiB"),
        (duration(59.4), "59 s"),
        (duration(200), "3 min 20 s"),
        (duration(7500), "2 h 05 min"),
        (score(None), "-"),
        (score(0.91251), "0.913"),
    ],
)
def test_numbers_for_people(shown: str, expected: str) -> None:
    assert shown == expected
