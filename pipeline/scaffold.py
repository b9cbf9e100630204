"""Create a study directory with its two files, ignore files, and initialised Git and DVC repositories."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path

from pipeline.template import DEMO_HEAD, demo_dvc_yaml, dvc_yaml, params_yaml, wrapped
from schemas.data_settings import REST, TAGS, DataSettings
from schemas.errors import ProjectError, StorageError
from schemas.settings import OUTPUTS, Settings
from stages.files import atomic_write

PARAMS_HEAD = """\
All settings of this study; a setting that is removed falls back to the value shown here.
`dvc repro` runs the stages that a change affects; `fpt cost` prints the cost of a setting before anything runs."""

IGNORED_BY_GIT = ("# results of fpt", f"/{OUTPUTS}/", "/.fpt/", "/dvc_plots/")
DEMO_IGNORED_BY_GIT = (*IGNORED_BY_GIT, "/data/", "/weights/")
IGNORED_BY_DVC = ("# cache and checkpoints of fpt: large, and not tracked by DVC", "/.fpt/")


@dataclass(frozen=True)
class Added:
    """Changes made by `initialise`."""

    created: tuple[str, ...]
    """What was created: "a Git repository", "a DVC project", both or nothing."""
    unstaged: tuple[str, ...]
    """Files, relative to the study, that the user's own Git repository does not track yet."""


@contextmanager
def undone_on_failure(folder: Path) -> Iterator[None]:
    """If the block fails, remove the files that it added to a study, and the folder if it was created."""
    missing_folders = [path for path in (folder, *folder.absolute().parents) if not path.exists()]
    names = ("params.yaml", "dvc.yaml", ".git", ".dvc", ".gitignore", ".dvcignore")
    new = [folder / name for name in names if not (folder / name).exists()]
    contents = {path: path.read_bytes() for path in (folder / ".gitignore", folder / ".dvcignore") if path.is_file()}
    try:
        yield
    except BaseException:
        for path in new if folder.is_dir() else ():
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
        with suppress(OSError):
            for path, content in contents.items():
                path.write_bytes(content)
            for path in missing_folders:
                path.rmdir()
        raise


def check_inputs(data: DataSettings, study: Path) -> list[str]:
    """Refuse images and labels that `fpt prepare` would refuse, as far as this can be seen without opening an image.

    Args:
        data: Settings.
        study: Folder that relative paths start at.

    Returns:
        What was chosen by header or layout, for people.

    Raises:
        DataError: Images or labels are missing, or do not fit each other.
    """
    from stages.prepare.dataset_listing import check_listing, read_listing
    from stages.prepare.label_table import check_files

    listing = read_listing(data, study)
    if data.on_error == "fail":
        check_listing(listing)
        if data.labels_file is not None:
            check_files(listing.every, listing.images, data.labels_file)
    return listing.notes


def labels_setting(labels: Path | None) -> str | None:
    """Return the value of `data.labels` for an option or argument: an absolute path, tags, or None."""
    if labels is None:
        return None
    return TAGS if str(labels) == TAGS else str(labels.expanduser().resolve())


def write_study(folder: Path, settings: Settings, *, demo: bool = False, notes: Sequence[str] = ()) -> list[Path]:
    """Write the files of a study.

    Args:
        folder: Folder of the study, created if missing.
        settings: Values of `params.yaml`.
        demo: Whether to write the demo study, whose pipeline also makes its data and a baseline.
        notes: Paragraphs for the top of `params.yaml`.

    Returns:
        All files that were written.

    Raises:
        ProjectError: The folder is already a study; nothing is overwritten.
        StorageError: The folder cannot be written.
    """
    if folder.exists() and not folder.is_dir():
        raise ProjectError(f"{folder} is a file.", "A study is a folder.", "Choose another name.")
    lists = [split for split, name in (settings.data.split_files or {}).items() if name != REST]
    pipeline = dvc_yaml(
        labels=settings.data.labels_file is not None, weights=settings.lpm.weights != "hub", lists=lists
    )
    files = {
        folder / "params.yaml": params_yaml(settings, "\n".join([DEMO_HEAD if demo else PARAMS_HEAD, *wrapped(notes)])),
        folder / "dvc.yaml": demo_dvc_yaml() if demo else pipeline,
    }
    existing = [path.name for path in (*files, folder / "dvc.lock", folder / OUTPUTS) if path.exists()]
    if existing:
        raise ProjectError(
            f"{folder} already contains {', '.join(existing)}.",
            "It is already a study, and fpt init overwrites nothing.",
            "Choose another folder, or edit its params.yaml.",
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path, text in files.items():
            path.write_text(text, encoding="utf-8")
        by_git = DEMO_IGNORED_BY_GIT if demo else IGNORED_BY_GIT
        ignores = {folder / ".gitignore": by_git, folder / ".dvcignore": IGNORED_BY_DVC}
        for path, lines in ignores.items():
            _add_lines(path, lines)
    except OSError as error:
        raise StorageError(
            f"{folder} cannot be written: {error.strerror}.", repair="Choose a folder where you have write permission."
        ) from None
    return [*files, *ignores]


def _add_lines(path: Path, lines: Sequence[str]) -> None:
    """Append missing lines to an ignore file, and keep its content."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    missing = [line for line in lines if line not in text.splitlines()]
    if all(line.startswith("#") for line in missing):
        return
    gap = "\n" if text and not text.endswith("\n") else ""
    path.write_text(f"{text}{gap}" + "\n".join(missing) + "\n", encoding="utf-8")


def initialise(folder: Path, written: Sequence[Path]) -> Added:
    """Initialise Git and DVC for a study unless it is inside existing repositories.

    Files are staged only in a new repository: the index of an existing repository does not change.

    Raises:
        ProjectError: Git or DVC failed; the message contains their output.
    """
    created: list[str] = []
    git = shutil.which("git") is not None
    in_git = git and _run(["git", "rev-parse", "--is-inside-work-tree"], folder, check=False) is not None
    if git and not in_git:
        _run(["git", "init", "--quiet"], folder)
        created.append("a Git repository")
    if not any((path / ".dvc").is_dir() for path in (folder, *folder.resolve().parents)):
        # DVC looks for `.git` in its own folder, and needs --subdir if the repository starts further up.
        kind = ["--no-scm"] if not git else [] if (folder / ".git").exists() else ["--subdir"]
        with _index_kept(folder) if in_git else nullcontext():
            _dvc(["init", "--quiet", *kind], folder)
        _dvc(["config", "core.analytics", "false"], folder)
        created.append("a DVC project")
    if not git:
        return Added(tuple(created), ())
    dvc = [folder / ".dvc" / name for name in ("config", ".gitignore")] if "a DVC project" in created else []
    names = tuple(str(path.relative_to(folder)) for path in (*written, *dvc) if path.exists())
    if not in_git:
        _run(["git", "add", "--", *names], folder)
        return Added(tuple(created), ())
    return Added(tuple(created), names)


@contextmanager
def _index_kept(folder: Path) -> Iterator[None]:
    """Restore the index of Git after the block, because `dvc init` stages its files and has no option against it."""
    path = folder / (_run(["git", "rev-parse", "--git-path", "index"], folder) or "").removesuffix("\n")
    content = path.read_bytes() if path.is_file() else None
    try:
        yield
    finally:
        if content is None:
            path.unlink(missing_ok=True)
        else:
            atomic_write(path, content)


def _dvc(words: Sequence[str], folder: Path) -> None:
    _run([sys.executable, "-m", "dvc", *words], folder)


def _run(command: Sequence[str], folder: Path, check: bool = True) -> str | None:
    """Return the standard output of a command, or None if it fails and `check` is false."""
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if not done.returncode:
        return done.stdout
    if not check:
        return None
    raise ProjectError(
        f"`{' '.join(map(str, command))}` failed in {folder}.",
        (done.stderr or done.stdout).strip(),
        "No files were left behind. Fix the problem and repeat `fpt init`.",
    )
