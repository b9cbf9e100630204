"""The wheel, installed where the user's own project has packages named pipeline, stages and schemas."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest
from study import make_images, save_weights

ROOT = Path(__file__).parents[2]
WINGS = ("pipeline", "stages", "schemas")
BUILD = "import sys, hatchling.build as b; print(getattr(b, sys.argv[1])(sys.argv[2]))"
RUN = """\
import json, sys
from fpt.cli import main
try:
    main(sys.argv[2:])
except SystemExit as stopped:
    places = {name: getattr(module, "__file__", None) for name, module in list(sys.modules.items())}
    json.dump([stopped.code, places], open(sys.argv[1], "w"))
"""
SETTINGS = ["method=fpt+", "lpm.name=test_vit", "features.image_size=64", "features.shard_size=8"] + [
    f"train.{setting}" for setting in ("epochs=1", "side_image_size=32", "side_reduction=4")
]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def build(kind: str, folder: Path) -> Path:
    command = [sys.executable, "-c", BUILD, kind, str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder / done.stdout.split()[-1]


@dataclass(frozen=True)
class Project:
    """A user's folder with packages of the same names, and the wheel in a folder on the path."""

    folder: Path
    site: Path

    def python(self, *words: str | Path) -> str:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("FPT_", "PYTHON", "DVC"))}
        path = os.pathsep.join([".", str(self.site)])
        environment = kept | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "FPT_CACHE_DIR": str(self.folder / "cache")}
        command = [sys.executable, *map(str, words)]
        done = subprocess.run(
            command, cwd=self.folder, env=environment, capture_output=True, text=True, check=False, timeout=120
        )
        assert done.returncode == 0, f"{words}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def fpt(self, *words: str | Path) -> dict[str, str | None]:
        """Run a command; return the files of the modules that it imported."""
        self.python("-c", RUN, "modules.json", *words)
        code, places = json.loads((self.folder / "modules.json").read_text())
        assert code == 0
        return dict(places)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("build_wheel", tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, wheel: Path) -> Project:
    folder, site = tmp_path_factory.mktemp("project"), tmp_path_factory.mktemp("site")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(site)]
    subprocess.run([*pip, str(wheel)], check=True)
    for wing in WINGS:
        (folder / wing).mkdir()
        (folder / wing / "__init__.py").write_text("raise RuntimeError('the user has another package of this name')\n")
    make_images(folder / "images", per_class=6)
    save_weights(folder / "lpm.safetensors")
    return Project(folder, site)


def test_the_wheel_has_one_package_with_every_file(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name.split("/")[0] for name in names} == {"fpt", f"{'-'.join(wheel.stem.split('-')[:2])}.dist-info"}
    tracked = subprocess.run(
        ["git", "ls-files", "fpt", *WINGS], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.split()
    if not tracked:
        pytest.skip("without Git there is no list of the files")
    expected = {name if name.startswith("fpt/") else f"fpt/{name}" for name in tracked}
    assert expected <= names


def test_an_editable_installation_relocates_nothing(tmp_path: Path) -> None:
    names = zipfile.ZipFile(build("build_editable", tmp_path)).namelist()
    assert [name for name in names if not name.partition("/")[0].endswith(".dist-info")] == ["_fpt_vit.pth"]


def test_a_study_from_init_to_predict_next_to_packages_of_the_same_names(project: Project) -> None:
    assert project.python("-m", "fpt", "--version").count(".") == 2
    project.python("-c", "import fpt; fpt.open_study, fpt.load, fpt.FptError")
    settings = [word for setting in [*SETTINGS, "lpm.weights=../lpm.safetensors"] for word in ("--set", setting)]
    project.python(project.site / "bin" / "fpt", "init", "study", "--images", "images", *settings)
    study = ("--params", "study/params.yaml")
    project.fpt("prepare", *study)
    # Tasks and data sets are pickled by the names of their modules.
    project.fpt("extract", *study, "--cluster", "local", "--set", "cluster.workers=1")
    project.fpt("train", *study, "--set", "compute.loader_workers=1")
    project.fpt("evaluate", *study)
    modules = project.fpt("predict", "images/plain", *study, "--output", "table.csv")
    assert len((project.folder / "table.csv").read_text().splitlines()) == 7
    assert not [name for name in modules if name.partition(".")[0] in WINGS]
    package = {name: place for name, place in modules.items() if name.partition(".")[0] == "fpt" and place}
    assert {"fpt.cli", "fpt.pipeline.cli", "fpt.stages.predict.classifier", "fpt.schemas.settings"} <= set(package)
    assert all(Path(place or "").is_relative_to(project.site) for place in package.values())


def test_the_python_api_of_the_wheel(project: Project) -> None:
    code = (
        "import sys, fpt\n"
        "study = fpt.init('api', 'images', version_control=False, method='linear', features={'image_size': 64},\n"
        "                 lpm={'name': 'test_vit', 'weights': '../lpm.safetensors'})\n"
        "fpt.prepare(study), fpt.extract(study), fpt.train(study)\n"
        "print(fpt.evaluate(study).images, len(fpt.load('api/outputs/model').predict('images/grid')))\n"
        "print([name for name in sys.modules if name.partition('.')[0] in ('pipeline', 'stages', 'schemas')])\n"
    )
    images, modules = project.python("-c", code).splitlines()
    assert images.endswith(" 6") and modules == "[]"
