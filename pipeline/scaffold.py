"""A new study directory: its two files, what Git and DVC must not look at, and both initialised."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from pipeline.template import dvc_yaml, params_yaml
from schemas.errors import ProjectError, StorageError
from schemas.settings import OUTPUTS, Settings

PARAMS_HEAD = """\
Settings of this study: what is not listed here does not exist, what is left out has the value shown here.
`dvc repro` runs what a change touches; `fpt cost` tells what a setting costs before anything runs."""

IGNORED_BY_GIT = ("# what fpt computes", f"/{OUTPUTS}/", "/.fpt/", "/dvc_plots/")
IGNORED_BY_DVC = ("# the cache and checkpoints of fpt: large, and not DVC's business", "/.fpt/")


def write_study(folder: Path, settings: Settings) -> list[Path]:
    """Write the files of a study.

    Args:
        folder: Made where it does not exist.
        settings: Values of `params.yaml`.

    Returns:
        The files that were written.

    Raises:
        ProjectError: The folder is a study already; nothing is overwritten.
        StorageError: The folder cannot be written.
    """
    files = {
        folder / "params.yaml": params_yaml(settings, PARAMS_HEAD),
        folder / "dvc.yaml": dvc_yaml(labels=settings.data.labels is not None, weights=settings.lpm.weights != "hub"),
    }
    there = [path.name for path in (*files, folder / "dvc.lock", folder / OUTPUTS) if path.exists()]
    if there:
        raise ProjectError(
            f"{folder} already holds {', '.join(there)}.",
            "It is a study already; fpt init overwrites nothing.",
            "Choose another folder, or edit its params.yaml.",
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path, text in files.items():
            path.write_text(text, encoding="utf-8")
        ignores = {folder / ".gitignore": IGNORED_BY_GIT, folder / ".dvcignore": IGNORED_BY_DVC}
        for path, lines in ignores.items():
            _add_lines(path, lines)
    except OSError as error:
        raise StorageError(
            f"{folder} cannot be written: {error.strerror}.", repair="Choose a folder where you may write."
        ) from None
    return [*files, *ignores]


def _add_lines(path: Path, lines: Sequence[str]) -> None:
    """Append the lines that an ignore file lacks; what its owner wrote stays."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    missing = [line for line in lines if line not in text.splitlines()]
    if all(line.startswith("#") for line in missing):
        return
    gap = "\n" if text and not text.endswith("\n") else ""
    path.write_text(f"{text}{gap}" + "\n".join(missing) + "\n", encoding="utf-8")


def initialise(folder: Path, written: Sequence[Path]) -> str:
    """Put the study under Git and DVC where it is not yet, and stage its files.

    Returns:
        What was done, for people.

    Raises:
        ProjectError: Git or DVC refused; the message holds their words.
    """
    done: list[str] = []
    git = shutil.which("git") is not None
    in_git = git and _run(["git", "rev-parse", "--is-inside-work-tree"], folder, check=False)
    if git and not in_git:
        _run(["git", "init", "--quiet"], folder)
        done.append("a Git repository")
    if not any((place / ".dvc").is_dir() for place in (folder, *folder.resolve().parents)):
        # DVC looks for `.git` in its own folder, unless told that the repository starts further up.
        kind = ["--no-scm"] if not git else [] if (folder / ".git").exists() else ["--subdir"]
        _dvc(["init", "--quiet", *kind], folder)
        _dvc(["config", "core.analytics", "false"], folder)
        done.append("a DVC project")
    if git:
        names = [str(path.relative_to(folder)) for path in written]
        dvc = [".dvc/config"] if (folder / ".dvc" / "config").exists() else []
        _run(["git", "add", "--", *names, *dvc], folder)
    return " and ".join(done)


def _dvc(words: Sequence[str], folder: Path) -> None:
    _run([sys.executable, "-m", "dvc", *words], folder)


def _run(command: Sequence[str], folder: Path, check: bool = True) -> bool:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if check and done.returncode:
        words = (done.stderr or done.stdout).strip()
        raise ProjectError(
            f"`{' '.join(map(str, command))}` failed in {folder}.",
            words,
            f"Put that right and run the command in {folder}: the files of the study are written.",
        )
    return done.returncode == 0
