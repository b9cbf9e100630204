"""Tiny studies: a ViT of random weights and small images of two classes."""

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

os.environ.setdefault("OMP_NUM_THREADS", "1")

BIN = Path(sys.executable).parent

Run = Callable[..., subprocess.CompletedProcess[str]]


def draw_images(folder: Path, per_class: int = 20, seed: int = 0, prefix: str = "") -> Path:
    """Small images in class folders; the classes differ in brightness."""
    rng = np.random.default_rng(seed)
    for index, name in enumerate(("bright", "dark")):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for number in range(per_class):
            pixels = rng.integers(0, 128, (72, 80, 3), dtype=np.uint8) + (0 if index else 100)
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{prefix}{number:03d}.png")
    return folder


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


@pytest.fixture
def settings(weights: Path) -> list[str]:
    """`--set` values of a study that runs in seconds."""
    return [
        "lpm.name=test_vit",
        f"lpm.weights={weights}",
        "features.image_size=64",
        "features.shard_size=4",
        "train.epochs=2",
        "train.side_reduction=2",
        "train.side_image_size=32",
    ]


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """What a user has who activated the virtual environment, without anything of this machine's user."""
    home = tmp_path / "home"
    home.mkdir()
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("FPT_", "DVC", "GIT_"))}
    return kept | {
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "HOME": str(home),
        "OMP_NUM_THREADS": "1",
        "DVC_NO_ANALYTICS": "1",
        "GIT_AUTHOR_NAME": "Ada",
        "GIT_AUTHOR_EMAIL": "ada@example.org",
        "GIT_COMMITTER_NAME": "Ada",
        "GIT_COMMITTER_EMAIL": "ada@example.org",
        "COLUMNS": "200",
    }


@pytest.fixture
def run(environment: dict[str, str]) -> Run:
    """Run a command as a user would; the exit code must be the expected one."""

    def command(words: Sequence[str | Path], cwd: Path, code: int = 0) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [str(word) for word in words], cwd=cwd, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == code, f"{words} exited with {done.returncode}:\n{done.stdout}\n{done.stderr}"
        return done

    return command


@pytest.fixture
def study(tmp_path: Path, run: Run, settings: list[str]) -> Path:
    """A scaffolded study of 40 images, committed."""
    images = draw_images(tmp_path / "images")
    words = [word for assignment in settings for word in ("--set", assignment)]
    run(["fpt", "init", "study", "--images", images, *words], cwd=tmp_path)
    run(["git", "commit", "--quiet", "-m", "A new study"], cwd=tmp_path / "study")
    return tmp_path / "study"
