import os
import subprocess
from pathlib import Path

import pytest
import yaml
from study_tools import Run, draw_images

from pipeline.scaffold import write_study
from schemas.errors import ProjectError
from schemas.parse import parse_settings
from schemas.settings import Settings


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return draw_images(tmp_path / "images", per_class=3)


def params(study: Path) -> Settings:
    return parse_settings(yaml.safe_load((study / "params.yaml").read_text()))


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    write_study(tmp_path, Settings())
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ProjectError, match=r"already contains params\.yaml, dvc\.yaml"):
        write_study(tmp_path, Settings(method="fpt"))
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("name", ["dvc.lock", "outputs"])
def test_results_of_an_older_study_are_kept(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    with pytest.raises(ProjectError, match=name):
        write_study(tmp_path, Settings())
    assert not (tmp_path / "params.yaml").exists()


def test_ignore_files_are_added_to(tmp_path: Path) -> None:
    (tmp_path / ".gitignore").write_text("mine\n/outputs/")
    write_study(tmp_path, Settings())
    lines = (tmp_path / ".gitignore").read_text().splitlines()
    assert lines == ["mine", "/outputs/", "# results of fpt", "/.fpt/", "/dvc_plots/"]


def test_init_makes_a_repository_with_staged_files(tmp_path: Path, images: Path, run: Run) -> None:
    done = run(["fpt", "init", "my study", "--images", "images"], cwd=tmp_path)
    study = tmp_path / "my study"
    assert "cd 'my study'" in done.stderr
    assert "dvc repro" in done.stderr
    assert done.stdout == ""
    assert params(study).data.images == str(images.resolve())
    staged = run(["git", "diff", "--cached", "--name-only"], cwd=study).stdout.split()
    assert {"params.yaml", "dvc.yaml", ".gitignore", ".dvcignore", ".dvc/config"} <= set(staged)
    assert run(["git", "status", "--short"], cwd=study).stdout.replace("A  ", "").split() == staged
    assert "analytics = false" in (study / ".dvc" / "config").read_text()
    assert run(["dvc", "stage", "list", "--name-only"], cwd=study).stdout.split() == [
        "prepare",
        "extract",
        "train",
        "evaluate",
    ]


@pytest.mark.parametrize("commits", [False, True])
def test_init_in_a_subfolder_of_a_git_repository(tmp_path: Path, images: Path, run: Run, commits: bool) -> None:
    run(["git", "init", "--quiet"], cwd=tmp_path)
    (tmp_path / "mine.txt").write_text("mine")
    run(["git", "add", "mine.txt"], cwd=tmp_path)
    if commits:
        run(["git", "commit", "--quiet", "-m", "Mine"], cwd=tmp_path)
        (tmp_path / "mine.txt").write_text("changed")
        run(["git", "add", "mine.txt"], cwd=tmp_path)
    before = run(["git", "ls-files", "--stage"], cwd=tmp_path).stdout
    done = run(["fpt", "init", "studies/one", "--images", images], cwd=tmp_path)
    study = tmp_path / "studies" / "one"
    assert not (study / ".git").exists()
    assert (study / ".dvc").is_dir()
    assert run(["git", "ls-files", "--stage"], cwd=tmp_path).stdout == before, "the index is the user's"
    run(["dvc", "status"], cwd=study)
    # The printed command adds all files that DVC needs.
    command = next(line for line in done.stderr.splitlines() if line.startswith("  git add "))
    run(["sh", "-c", command], cwd=study)
    staged = run(["git", "diff", "--cached", "--name-only", "--relative"], cwd=study).stdout.split()
    assert set(staged) == {"params.yaml", "dvc.yaml", ".gitignore", ".dvcignore", ".dvc/config", ".dvc/.gitignore"}
    assert run(["git", "status", "--short", "."], cwd=study).stdout.count("??") == 0
    run(["git", "commit", "--quiet", "-m", "A study"], cwd=study)


def test_a_failed_init_leaves_nothing_behind(
    tmp_path: Path, images: Path, environment: dict[str, str], run: Run
) -> None:
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    (bin_folder / "git").write_text('#!/bin/sh\ncase "$1" in rev-parse) exit 1;; esac\necho broken >&2; exit 3\n')
    (bin_folder / "git").chmod(0o755)
    broken = {**environment, "PATH": f"{bin_folder}{os.pathsep}{environment['PATH']}"}
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / ".gitignore").write_text("mine")
    before = {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")}
    for study in ("new/deep/study", "there"):
        done = subprocess.run(
            ["fpt", "init", study, "--images", images],
            cwd=tmp_path, env=broken, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 2, done.stderr
        assert "broken" in done.stderr and "No files were left behind" in done.stderr
        assert {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")} == before
    run(["fpt", "init", "there", "--images", images], cwd=tmp_path)


def test_a_file_is_no_place_for_a_study(tmp_path: Path, images: Path, run: Run) -> None:
    (tmp_path / "file").write_text("mine")
    done = run(["fpt", "init", "file", "--images", "images"], cwd=tmp_path, code=2)
    assert "file is a file" in done.stderr
    run(["fpt", "init", "file/study", "--images", "images"], cwd=tmp_path, code=2)
    assert (tmp_path / "file").read_text() == "mine"


def test_init_inside_a_dvc_project_adds_none(tmp_path: Path, images: Path, run: Run) -> None:
    run(["git", "init", "--quiet"], cwd=tmp_path)
    run(["dvc", "init", "--quiet"], cwd=tmp_path)
    run(["fpt", "init", "one", "--images", images], cwd=tmp_path)
    assert not (tmp_path / "one" / ".dvc").exists()
    run(["dvc", "status"], cwd=tmp_path / "one")


def test_init_with_a_csv_watches_it(tmp_path: Path, images: Path, run: Run) -> None:
    rows = [
        f"{path.relative_to(images)},{path.parent.name},p{number}" for number, path in enumerate(images.rglob("*.png"))
    ]
    (tmp_path / "labels.csv").write_text("file,grade,patient\n" + "\n".join(rows) + "\n")
    words = ["--labels", "labels.csv", "--path-column", "file", "--label-column", "grade", "--group-column", "patient"]
    run(["fpt", "init", "study", "--images", "images", *words, "--set", "train.lr=1e-3"], cwd=tmp_path)
    settings = params(tmp_path / "study")
    assert settings.data.labels == str((tmp_path / "labels.csv").resolve())
    assert (settings.data.group_column, settings.train.lr) == ("patient", 1e-3)
    assert "      - ${data.labels}\n" in (tmp_path / "study" / "dvc.yaml").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--images", "nowhere"], "no image folder|Correct --images."),
        (["--images", "empty"], "no class folders|name a CSV with --labels."),
        (["--images", "images", "--labels", "nothing.csv"], "no table|Correct --labels."),
        (["--images", "images", "--labels", "labels.csv"], "did you mean 'lable'|--label-column"),
        (["--images", "images", "--group-column", "patient"], "--group-column and --split-column need a labels table"),
        (["--images", "images", "--set", "train.lrr=1"], "--set train.lrr: unknown key, did you mean 'train.lr'"),
        (["--images", "images", "--set", "data.seed=x"], "--set data.seed: "),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(
    tmp_path: Path, images: Path, run: Run, words: list[str], message: str
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "labels.csv").write_text("path,lable\nbright/000.png,bright\n")
    done = run(["fpt", "init", "study", *words], cwd=tmp_path, code=2)
    for part in message.split("|"):
        assert part in done.stderr
    assert "params.yaml" not in done.stderr, "there is none yet"
    assert "nothing was written" in done.stderr
    assert not (tmp_path / "study").exists()


def test_init_twice_is_refused(tmp_path: Path, images: Path, run: Run) -> None:
    run(["fpt", "init", "study", "--images", "images"], cwd=tmp_path)
    done = run(["fpt", "init", "study", "--images", "images"], cwd=tmp_path, code=2)
    assert "already contains params.yaml, dvc.yaml" in done.stderr
