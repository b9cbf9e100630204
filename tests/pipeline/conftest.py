"""Tiny studies: a ViT of random weights and small images of two classes."""

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from command_line import Fpt, command_line
from study_tools import Run, draw_images

os.environ.setdefault("OMP_NUM_THREADS", "1")

BIN = Path(sys.executable).parent


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights of timm's smallest ViT."""
    import timm
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "test_vit.safetensors"
    save_file(timm.create_model("test_vit", pretrained=False).state_dict(), path)
    return path


@pytest.fixture(scope="session")
def settings(weights: Path) -> list[str]:
    """`--set` values of a study that runs in seconds."""
    return [
        "method=fpt+",
        "lpm.name=test_vit",
        f"lpm.weights={weights}",
        "features.image_size=64",
        "features.shard_size=4",
        "train.epochs=2",
        "train.side_reduction=2",
        "train.side_image_size=32",
    ]


@pytest.fixture(scope="session")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What a user has who activated the virtual environment, without anything of this machine's user."""
    home = tmp_path_factory.mktemp("home")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("FPT_", "DVC", "GIT_"))}
    return kept | {
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "HOME": str(home),
        "DVC_SITE_CACHE_DIR": str(home / "site"),
        "DVC_NO_ANALYTICS": "1",
        "OMP_NUM_THREADS": "1",
        "GIT_AUTHOR_NAME": "Ada",
        "GIT_AUTHOR_EMAIL": "ada@example.org",
        "GIT_COMMITTER_NAME": "Ada",
        "GIT_COMMITTER_EMAIL": "ada@example.org",
        "COLUMNS": "200",
    }


@pytest.fixture(scope="session")
def run(environment: dict[str, str]) -> Run:
    """Run a command as a user would; the exit code must be the expected one."""

    def command(words: Sequence[str | Path], cwd: Path, code: int = 0) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [str(word) for word in words], cwd=cwd, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == code, f"{words} exited with {done.returncode}:\n{done.stdout}\n{done.stderr}"
        return done

    return command


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, run: Run, settings: list[str]) -> Path:
    """A folder with `images` and a scaffolded `study` of them that `dvc repro` has finished; tests work on copies."""
    folder = tmp_path_factory.mktemp("finished")
    draw_images(folder / "images")
    words = [word for assignment in settings for word in ("--set", assignment)]
    run(["fpt", "init", "study", "--images", "images", *words], cwd=folder)
    run(["git", "commit", "--quiet", "-m", "A new study"], cwd=folder / "study")
    run(["dvc", "repro"], cwd=folder / "study")
    run(["git", "add", "dvc.lock"], cwd=folder / "study")
    run(["git", "commit", "--quiet", "-m", "First results"], cwd=folder / "study")
    return folder


@pytest.fixture
def study(tmp_path: Path, finished: Path) -> Path:
    """A copy of the finished study, still on the images of the first one."""
    return Path(shutil.copytree(finished / "study", tmp_path / "study", symlinks=True))


@pytest.fixture
def fpt(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Fpt:
    """`fpt` in this process; stdout and stderr come back."""
    return command_line(capsys, monkeypatch)
