"""Random settings and command lines are accepted or refused with a short message, without internal errors.

`FPT_FUZZ_SEED` selects other cases, `FPT_FUZZ_CASES` their number.
"""

from __future__ import annotations

import contextlib
import io
import os
import random
import re
from pathlib import Path

import pytest

from pipeline import cli
from pipeline.params import load_settings
from pipeline.template import params_yaml
from schemas.errors import FptError
from schemas.settings import Settings

SEED = int(os.environ.get("FPT_FUZZ_SEED", "0"))
CASES = int(os.environ.get("FPT_FUZZ_CASES", "60"))

RAW = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""What must not reach a terminal: everything but line breaks and tabs."""
LONGEST = 20_000
"""Characters of all that one command prints."""

SCALARS = [
    "null", "~", "yes", "off", "0", "-1", "1e400", "-.inf", ".nan", "9" * 5000, "-" + "9" * 5000, "0x" + "f" * 9000,
    "0b2", "0o9", "1:2:3", "1_000", "2024-01-01", "2024-13-45", "2024-01-01T25:61:61Z", "=", "<<", "!!int x",
    "!!int ''", "!!float x", "!!bool x", "!!timestamp x", "!!binary '%'", "!!null x", "!!set {a, b}", "!!omap [1]",
    "!!pairs [a]", "!!python/name:os.system",
    "!<tag:x> y", "&a [*a]", "&a {b: *a}", "*missing", "&a 1", "[1, 'x', null]", "{}", "[]",
    '"\\0"', '"\\ud800"', '"\\e[31m"', '"\\u202e"', "'\u202etxt'", "\x1b[31m", "\x00", "\x85", "\ufeff", "\U0001f600",
    "\u00e9" * 500, "x" * 60_000, "[" * 2000, "[" * 2000 + "]" * 2000, "{a: " * 500 + "}" * 500, "- " * 3000,
    "? " * 3000, "|\n  a", ">\n", '"', "'", "%TAG ! x", "---\n---", "...", "@", "`", "a: b: c", "\t", "# x",
    "hub", "auto", "../x", "/" + "d/" * 3000, "a" * 300,
]  # fmt: skip

BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12)
)

WORDS = [
    "--params", "--set", "--output", "--model", "--json", "--help", "--images", "--labels", "--method", "--seeds",
    "--", "-", "", " ", "=", "a=b", "train.lr=", "train.lr=1e-3", "train.=1", ".lr=1", "train.lr.x=1",
    "." * 5000 + "=1", "a." * 5000 + "b=1", "train." * 3000 + "lr=1", "data.images=" + "d" * 5000, "no.yaml",
    "\x1b]0;title\x07", "\u202egnp.exe", "\udcff", "\u00fc", "\U0001f600", "x" * 5000, "d/" * 3000, "\n", "\r",
    "-1", "9" * 5000, "nan", "--seeds=" + "9" * 5000, "*", "~",
]  # fmt: skip


def random_text(rng: random.Random) -> str:
    """Return YAML-like text of indicators and values."""
    marks = ["\n", "  ", ": ", "- ", ", ", "[", "]", "{", "}", "&a ", "*a", "? ", "train", "data", "lr", "images", "#"]
    return "".join(rng.choice(marks if rng.random() < 0.7 else SCALARS) for _ in range(rng.randrange(1, 40)))


def mutated(text: str, rng: random.Random) -> str:
    """Return settings with some values replaced, lines repeated or dropped, or text cut out."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    for _ in range(rng.randrange(1, 4)):
        place = rng.randrange(len(lines))
        key = lines[place].partition(":")[0]
        choice = rng.randrange(5)
        if choice <= 1:
            lines[place] = f"{key}: {rng.choice(SCALARS)}"
        elif choice == 2:
            lines.insert(place, rng.choice([*lines, *SCALARS, f"{key}{rng.choice(SCALARS)}: 1"]))
        elif choice == 3:
            del lines[place : place + rng.randrange(1, 5)]
        else:
            start = rng.randrange(len(lines[place]) + 1)
            lines[place] = lines[place][:start] + rng.choice(SCALARS) + lines[place][start + rng.randrange(4) :]
        lines = lines or [""]
    return "\n".join(lines)


def fpt(words: list[str]) -> tuple[int, str]:
    """Return the exit code and the complete output."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as stopped:
        cli.main(words)
    assert isinstance(stopped.value.code, int)
    return stopped.value.code, out.getvalue() + err.getvalue()


def check_output(text: str, code: int, case: str) -> None:
    assert code in (0, 2), f"{case}\n{text}"
    assert "Traceback" not in text and "error inside fpt" not in text, case
    assert not RAW.search(text), f"{case}\n{text!r}"
    assert len(text) < LONGEST, f"{len(text)} characters: {case}"
    assert code == 0 or text.strip(), f"nothing is printed: {case}"


@pytest.mark.parametrize("kind", ["random", "mutated"])
def test_any_settings_are_accepted_or_refused(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    whole = params_yaml(Settings())
    for number in range(CASES):
        rng = random.Random(f"{SEED} {kind} {number}")
        text = random_text(rng) if kind == "random" else mutated(whole, rng)
        Path("params.yaml").write_text(text, encoding="utf-8", errors="surrogatepass")
        case = f"case {number} of seed {SEED}: {text[:300]!r}"
        try:
            settings = load_settings(Path("params.yaml"))
        except FptError:
            # The same through the command line, which has to print it.
            check_output(fpt(["prepare"])[1], 2, case)
        except BaseException as error:
            raise AssertionError(case) from error
        else:
            assert isinstance(settings, Settings)


@pytest.mark.parametrize(
    "text", [BOMB, "[" * 20_000, "a: &a [*a]", "train: &t {lr: *t}", "- " * 20_000, "9" * 5000 + ": 1"]
)
def test_documents_that_exhaust_a_parser(text: str, tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    path.write_text(text)
    code, output = fpt(["prepare", "--params", str(path)])
    check_output(output, code, text[:80])
    assert code == 2


def test_any_override_is_accepted_or_refused(tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    path.write_text("")
    keys = [
        "train.lr",
        "data.images",
        "data.classes",
        "features.layers",
        "lpm.weights",
        "method",
        "train",
        "a.b",
        "",
        ".",
    ]
    for number in range(CASES):
        rng = random.Random(f"{SEED} set {number}")
        words = [f"{rng.choice(keys)}={rng.choice(SCALARS)}" for _ in range(rng.randrange(1, 4))]
        words += [rng.choice(WORDS)] * rng.randrange(2)
        case = f"case {number} of seed {SEED}: {[word[:99] for word in words]}"
        try:
            load_settings(path, words)
        except FptError:
            check_output(fpt(["prepare", "--params", str(path), *(f"--set={word}" for word in words)])[1], 2, case)
        except BaseException as error:
            raise AssertionError(case) from error


VERBS = ["init", "prepare", "extract", "train", "sweep", "lr-find", "evaluate", "compare", "predict", "cost", "doctor",
         "cache", "cache path", "demo", "demo data", "demo summary", "demo run", "nothing"]  # fmt: skip


def test_any_words_after_any_verb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for number in range(CASES):
        rng = random.Random(f"{SEED} words {number}")
        verb = rng.choice(VERBS)
        words = [*verb.split(), *(rng.choice(WORDS) for _ in range(rng.randrange(1, 5)))]
        # The file does not exist, so that no verb gets further than its settings.
        at = rng.randrange(len(verb.split()), len(words) + 1)
        words[at:at] = ["--params", "missing.yaml"] if verb not in ("init", "nothing", "cache", "demo") else []
        case = f"case {number} of seed {SEED}: {[word[:99] for word in words]}"
        code, output = fpt(words)
        check_output(output, code, case)
        assert not list(tmp_path.iterdir()), case
