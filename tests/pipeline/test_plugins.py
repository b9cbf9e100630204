"""Methods of a user's own: the example of the documentation as a file and as an installed package."""

from __future__ import annotations

import csv
import io
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from command_line import Fpt
from study_tools import prepared_study

from pipeline import plugins
from schemas.methods import METHODS

GUIDE = Path(__file__).parents[2] / "docs/extending.md"


@pytest.fixture(autouse=True)
def forget(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Remove what a test registers."""
    before = dict(METHODS)
    monkeypatch.delenv(plugins.VARIABLE, raising=False)
    monkeypatch.setattr(plugins, "_loaded", set())
    plugins._entry_points.cache_clear()
    # Set by the command, so that monkeypatch would not restore it.
    yield
    METHODS.clear()
    METHODS.update(before)
    plugins._entry_points.cache_clear()
    import os

    os.environ.pop(plugins.VARIABLE, None)


@pytest.fixture
def plugin(tmp_path: Path) -> Path:
    """The example of docs/extending.md."""
    (code,) = re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    path = tmp_path / "offsets.py"
    path.write_text(code)
    return path


def test_the_example_trains_evaluates_predicts_and_has_a_cost(
    tmp_path: Path, weights: Path, fpt: Fpt, plugin: Path
) -> None:
    study = prepared_study(tmp_path / "study", weights, fpt)
    words = ("--plugin", plugin)
    options = ("--method", "offsets", "--set", "methods.options.scale=0.5")
    fpt(*words, "train", *options, cwd=study)
    settings = yaml.safe_load((study / "outputs/model/settings.yaml").read_text())
    assert (settings["method"], settings["methods"]["options"]) == ("offsets", {"scale": 0.5})
    spec = json.loads((study / "outputs/model/model.json").read_text())
    assert spec["network"]["options"] == {"scale": 0.5}
    assert spec["learnable"] == 6 * 64 + 64 * 2 + 2
    out, _ = fpt(*words, "evaluate", "--json", cwd=study)
    assert json.loads(out)["auc"] is not None
    image = next((study / "images").rglob("*.png"))
    out, _ = fpt(*words, "predict", image, cwd=study)
    assert len(list(csv.DictReader(io.StringIO(out)))) == 1
    out, _ = fpt(*words, "cost", "--method", "offsets", "--classes", 2, "--json", cwd=study)
    assert json.loads(out)["learnable"] == spec["learnable"]


def test_without_the_plugin_a_model_names_it_as_a_possible_cause(
    tmp_path: Path, weights: Path, fpt: Fpt, plugin: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = prepared_study(tmp_path / "study", weights, fpt)
    fpt("--plugin", plugin, "train", "--method", "offsets", "--set", "train.epochs=1", cwd=study)
    del METHODS["offsets"]
    monkeypatch.delenv(plugins.VARIABLE)
    _, err = fpt("evaluate", cwd=study, code=2)
    assert "--plugin" in err
    _, err = fpt("train", "--method", "offsets", cwd=study, code=2)
    assert "'offsets'" in err


def test_an_installed_package_needs_no_option(
    tmp_path: Path, weights: Path, fpt: Fpt, plugin: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = tmp_path / "site"
    (site / "my_offsets-1.0.dist-info").mkdir(parents=True)
    (site / "my_offsets.py").write_text(plugin.read_text())
    (site / "my_offsets-1.0.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: my-offsets\nVersion: 1.0\n")
    (site / "my_offsets-1.0.dist-info/entry_points.txt").write_text("[fpt.methods]\noffsets = my_offsets\n")
    monkeypatch.syspath_prepend(str(site))
    study = prepared_study(tmp_path / "study", weights, fpt)
    fpt("train", "--method", "offsets", "--set", "train.epochs=1", cwd=study)
    assert METHODS["offsets"].module == "my_offsets"
    sys.modules.pop("my_offsets")


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (None, "There is no plugin"),
        ("import nowhere_to_be_found", "cannot be imported: ModuleNotFoundError"),
        ("x = 1", "has no method"),
        ("from fpt.extend import adaptation\nROWS = [adaptation('fpt+', 'x', 'x', '', 'x')]", "METHOD"),
    ],
)
def test_what_is_no_plugin_is_refused(tmp_path: Path, fpt: Fpt, code: str | None, expected: str) -> None:
    path = tmp_path / "broken.py"
    if code is not None:
        path.write_text(code)
    _, err = fpt("--plugin", path, "doctor", cwd=tmp_path, code=2)
    assert expected in err


def test_a_name_of_fpt_cannot_be_taken(tmp_path: Path, fpt: Fpt, plugin: Path) -> None:
    plugin.write_text(plugin.read_text().replace('adaptation("offsets"', 'adaptation("fpt+"'))
    _, err = fpt("--plugin", plugin, "doctor", cwd=tmp_path, code=2)
    assert "named fpt+" in err
