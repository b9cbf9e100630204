"""Views from the command line: counted by the plan, named by verify, asked for by train."""

import json
from pathlib import Path

import pytest
from study_tools import Run

pytestmark = pytest.mark.timeout(600)

VIEWS = ("--set", "features.views=[identity,hflip,rot180]", "--set", "features.crops=1")


def test_views_from_plan_to_model(study: Path, run: Run) -> None:
    with_views = ["fpt", "extract", *VIEWS]
    plan = json.loads(run([*with_views, "--plan", "--json"], cwd=study).stdout)
    assert (plan["images"], plan["cached"]) == (40, 40)
    new = plan["to_compute"]
    assert plan["rows"] == 40 + new
    assert new % 3 == 0
    assert f"40 ({plan['rows']} rows with their views)" in run([*with_views, "--plan"], cwd=study).stdout
    refused = run(["fpt", "train", *VIEWS], cwd=study, code=2).stderr
    assert "hflip, rot180, 1 crops of 0.8 to 1 of the area" in refused
    assert "fpt extract" in refused
    done = run(with_views, cwd=study).stderr
    assert f"40 images ({40 + new} rows with their views): 40 were in the cache, computed {new}" in done
    assert json.loads(run(["fpt", "extract", *VIEWS, "--json"], cwd=study).stdout)["rows"] == 40 + new
    assert f"{40 + new} rows in" in run(["fpt", "cache", "verify"], cwd=study).stdout
    (store,) = (study / ".fpt" / "cache").iterdir()
    views = [path for path in sorted((store / "receipts").iterdir()) if "rot180" in path.read_text()]
    images = json.loads(views[0].read_text())["images"]
    views[0].write_text("{")
    (found,) = json.loads(run(["fpt", "cache", "verify", "--json"], cwd=study, code=2).stdout)["stores"]
    assert set(found["images"]) == set(images)
    assert len(found["paths"]) == len(set(images))
    run(["fpt", "cache", "verify", "--repair"], cwd=study, code=2)
    assert f"computed {len(images)} in" in run(with_views, cwd=study).stderr
    run(["fpt", "train", *VIEWS], cwd=study)
    run(["fpt", "evaluate", *VIEWS], cwd=study)
    assert "views: [identity, hflip, rot180]" in (study / "outputs/model/settings.yaml").read_text()
