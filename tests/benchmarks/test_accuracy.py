"""The accuracy bench: runs are resumed, a recipe equals itself, label noise loses, and the rule of adoption."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import yaml
from sklearn.metrics import roc_auc_score
from study import CLASSES, make_images, save_weights

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SPLITS = 3
Bench = Callable[..., dict[str, Any]]


@pytest.fixture
def accuracy(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    # The scripts import each other by name, from their own folder.
    monkeypatch.syspath_prepend(BENCHMARKS)
    import accuracy

    return accuracy


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two data sets, `first` and `second`, with two images per patient and a copy of a file."""
    folder = tmp_path_factory.mktemp("bench")
    save_weights(folder / "lpm.safetensors")
    for seed, name in enumerate(("first", "second")):
        images = folder / name / "images"
        make_images(images, 12, seed)
        shutil.copyfile(images / "grid" / f"{seed}-000.png", images / "grid" / f"{seed}-001.png")
        paths = sorted(path.relative_to(images).as_posix() for path in images.rglob("*.png"))
        with (folder / name / "labels.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(("path", "label", "patient"))
            writer.writerows((path, path.split("/")[0], f"patient-{at // 2}") for at, path in enumerate(paths))
    return folder


@pytest.fixture
def bench(accuracy: ModuleType, folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Bench:
    """Run the bench in the folder `work`, and return what it writes."""
    # The bench sets this variable; the fixture restores it.
    monkeypatch.setenv("FPT_CACHE_DIR", str(tmp_path / "not-used"))

    def run(recipes: dict[str, Any], *options: str, data: Sequence[str] = ("first", "second")) -> dict[str, Any]:
        (tmp_path / "recipes.yaml").write_text(yaml.safe_dump(recipes, sort_keys=False))
        places = [str(folder / name) for name in data]
        lpm = ["--lpm", "test_vit", "--weights", str(folder / "lpm.safetensors"), "--image-size", "64"]
        files = ["--recipes", str(tmp_path / "recipes.yaml"), "--json", str(tmp_path / "out.json")]
        accuracy.main([*places, *lpm, *files, "--work", str(tmp_path / "work"), "--splits", str(SPLITS), *options])
        result: dict[str, Any] = json.loads((tmp_path / "out.json").read_text())
        return result

    return run


@pytest.mark.slow
def test_runs_are_kept_a_recipe_equals_itself_and_label_noise_loses(
    bench: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipes = {
        "again": {"method": "linear", "version": "second"},
        "noisy": {"method": "linear", "label_noise": 0.7},
    }
    names = ("linear", "statistics", *recipes)
    built_in = ("--recipe", "linear", "--recipe", "statistics")
    result = bench(recipes, *built_in)
    assert (result["reference"], result["trained"], result["read"]) == ("linear", 4 * SPLITS * 2, 0)
    assert {data: tuple(of) for data, of in result["data"].items()} == {"first": names, "second": names}
    assert not (tmp_path / "not-used").exists()
    assert len(list((tmp_path / "work" / "cache").glob("*/features.zarr"))) == 1, "all recipes share them"
    differences = result["differences"]
    low, high = differences["again"]["interval"]
    assert low <= 0 <= high and not differences["again"]["adopt"]
    assert differences["noisy"]["mean"] < -0.1
    assert differences["noisy"]["interval"][1] < 0 and not differences["noisy"]["adopt"]

    runs = sorted((tmp_path / "work").glob("*/runs/*.json"))
    written = {path: path.stat().st_mtime_ns for path in runs}
    capsys.readouterr()
    second = bench(recipes, *built_in, "--reference", "noisy")
    assert (second["trained"], second["read"]) == (0, len(runs))
    assert written == {path: path.stat().st_mtime_ns for path in (tmp_path / "work").glob("*/runs/*.json")}
    assert second["data"] == result["data"]
    assert second["differences"]["linear"]["adopt"]
    printed = capsys.readouterr().out
    assert "0 runs were trained, 24 were read." in printed
    assert printed.rstrip().endswith(second["rule"])

    # A run that is missing and one that was cut off in writing.
    runs[0].unlink()
    runs[1].write_bytes(runs[1].read_bytes()[:-40])
    third = bench(recipes, *built_in)
    assert (third["trained"], third["read"]) == (2, len(runs) - 2)
    assert third["differences"] == differences


def test_the_figures_follow_from_the_files_of_the_runs(bench: Bench, tmp_path: Path) -> None:
    tiny = ["train.epochs=1", "train.side_reduction=4", "train.side_image_size=32"]
    recipes = {"networks": {"method": "fpt+", "set": tiny, "features": ["ratio=0.5"], "seeds": 2}}
    result = bench(recipes, "--repeats", "2", data=["first"])
    runs = [json.loads(path.read_text()) for path in (tmp_path / "work/first/runs").iterdir()]
    assert result["trained"] == len(runs) == 2 * 2 * SPLITS
    assert result["differences"] == {}
    tested: dict[tuple[int, int], list[dict[str, Any]]] = {}
    for run in runs:
        tested.setdefault((run["repeat"], run["fold"]), []).append(run)
    aucs = []
    for one, other in tested.values():
        assert (one["rows"], one["labels"], one["ids"]) == (other["rows"], other["labels"], other["ids"])
        assert one["probabilities"] != other["probabilities"], "another seed"
        p = np.mean([one["probabilities"], other["probabilities"]], axis=0)
        labels = np.array([CLASSES.index(label) for label in one["labels"]])
        aucs.append(np.mean([roc_auc_score(labels == at, p[:, at]) for at in range(3)]))
    figures = result["data"]["first"]["networks"]
    assert figures["auc"] == pytest.approx(np.mean(aucs), abs=1e-6)
    assert figures["seconds"] == pytest.approx(np.median([run["seconds"] for run in runs]))
    assert len(figures["auc_of_seeds"]) == 2 and figures["bytes_per_image"] > 1000
    for repeat in range(2):
        paths = [path for run in runs if (run["repeat"], run["seed"]) == (repeat, 0) for path in run["rows"]]
        patients = [{*run["patients"]} for run in runs if (run["repeat"], run["seed"]) == (repeat, 0)]
        assert len(paths) == len(set(paths)) == 36, "each image is tested once"
        assert sum(map(len, patients)) == len(set().union(*patients)) == 18, "a patient is in one fold"
    folds = [{frozenset(run["rows"]) for run in runs if run["repeat"] == repeat} for repeat in range(2)]
    assert folds[0] != folds[1], "repeats draw other folds"
    more = {"networks": recipes["networks"] | {"seeds": 3}, "ratio": {"method": "linear", "features": ["ratio=0.7"]}}
    result = bench(more, "--repeats", "2", data=["first"])
    assert (result["trained"], result["read"]) == (2 * SPLITS + 2 * SPLITS, 2 * 2 * SPLITS)
    assert len(list((tmp_path / "work" / "cache").glob("*/features.zarr"))) == 2


def test_bad_recipes_and_data_are_refused_before_anything_runs(
    bench: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for recipes, options, message in (
        ({"one": {"method": "linear", "epochs": 3}}, (), "one.epochs"),
        ({"one": {"method": "linear", "set": ["train.nothing=1"]}}, (), "train.nothing"),
        ({"one": {"method": "linear"}}, ("--reference", "two"), "The reference two is no recipe"),
        ({"one": {"method": "linear"}}, ("--splits", "1"), "at least two folds"),
        ({}, (), "There are no recipes"),
    ):
        with pytest.raises(SystemExit):
            bench(recipes, *options)
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        bench({"one": {"method": "linear"}}, data=["first", "first"])
    assert "the same name" in capsys.readouterr().err
    assert not list((tmp_path / "work").glob("*/runs"))


def outcome(accuracy: ModuleType, strength: float, seed: int = 0, images: int = 400) -> Any:
    """Make predictions of two classes that separate by `strength`; the same errors for every strength."""
    rng = np.random.default_rng(seed)
    labels = np.arange(images) % 2
    scores = 1 / (1 + np.exp(-(strength * labels + rng.normal(size=images))))
    rows = tuple(f"{seed}-{number}" for number in range(images))
    p = np.stack([1 - scores, scores], axis=1)
    fold = accuracy.Tested(("no", "yes"), rows, labels, rows, p)
    return accuracy.Outcome((fold,), {"auc": accuracy.plain_auc([fold]), **accuracy.library_metrics([fold])})


def test_a_gain_is_adopted_only_if_no_data_set_loses(accuracy: ModuleType) -> None:
    def compared(*strengths: float) -> dict[str, Any]:
        outcomes = {
            f"set {seed}": {"base": outcome(accuracy, 1.0, seed), "new": outcome(accuracy, strength, seed)}
            for seed, strength in enumerate(strengths)
        }
        result: dict[str, Any] = accuracy.compare(outcomes, "base")["new"]
        return result

    gain, mixed, loss, same = compared(1.3, 1.3), compared(1.6, 0.9), compared(0.7, 0.7), compared(1.0, 1.0)
    assert gain["adopt"] and gain["interval"][0] < gain["mean"] < gain["interval"][1]
    assert mixed["interval"][0] > 0 and min(mixed["by_set"].values()) < -accuracy.TOLERANCE and not mixed["adopt"]
    assert loss["interval"][1] < 0 and not loss["adopt"]
    assert same["interval"] == (0.0, 0.0) and not same["adopt"]


def test_other_metrics_have_intervals_by_the_definitions_of_the_libraries(accuracy: ModuleType) -> None:
    folds, rng = [], np.random.default_rng(0)
    for number in range(4):
        p = rng.dirichlet((1.0, 1.0, 1.0), size=60)
        rows = tuple(f"{number % 2}-{at}" for at in range(60))
        labels = np.array([rng.choice(3, p=one) for one in p])
        folds.append(accuracy.Tested(("a", "b", "c"), rows, labels, rows, p, number // 2))
    once = accuracy.other_metrics(folds, [np.ones((60, 1))] * 4)
    assert {name: value[0] for name, value in once.items()} == pytest.approx(accuracy.library_metrics(folds))
    # A weight of two is an image that is there twice.
    weights = [rng.integers(1, 3, size=60) for _ in folds]
    twice = [
        accuracy.Tested(
            fold.classes, fold.rows, np.repeat(fold.labels, one), (), np.repeat(fold.probabilities, one, 0), fold.repeat
        )
        for fold, one in zip(folds, weights, strict=True)
    ]
    weighted = accuracy.other_metrics(folds, [one[:, None].astype(float) for one in weights])
    assert {name: value[0] for name, value in weighted.items()} == pytest.approx(accuracy.library_metrics(twice))


def test_a_recipe_can_gain_in_auc_and_lose_in_log_loss(accuracy: ModuleType) -> None:
    base, better = outcome(accuracy, 1.0), outcome(accuracy, 2.0)
    fold = better.folds[0]
    # The same ranking, by far too sure.
    logits = 8 * np.log(fold.probabilities)
    sure = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    fold = accuracy.Tested(fold.classes, fold.rows, fold.labels, fold.patients, sure)
    figures = {"auc": accuracy.plain_auc([fold]), **accuracy.library_metrics([fold])}
    found = accuracy.compare({"set": {"base": base, "new": accuracy.Outcome((fold,), figures)}}, "base")["new"]
    assert found["adopt"] and found["others"]["accuracy"]["interval"][0] > 0
    low, high = found["others"]["log_loss"]["interval"]
    assert 0 < low < found["others"]["log_loss"]["mean"] < high
    assert found["others"]["log_loss"]["interval_by_set"] == {"set": (low, high)}


def test_data_sets_are_resampled_independently(accuracy: ModuleType) -> None:
    def width(sets: int) -> float:
        pair = {"base": outcome(accuracy, 1.0), "new": outcome(accuracy, 1.0, seed=1)}
        fold = pair["new"].folds[0]
        # Other errors on the same images.
        same_rows = accuracy.Tested(
            fold.classes, pair["base"].folds[0].rows, fold.labels, pair["base"].folds[0].patients, fold.probabilities
        )
        pair["new"] = accuracy.Outcome((same_rows,), pair["new"].figures)
        low, high = accuracy.compare({f"set {at}": pair for at in range(sets)}, "base")["new"]["interval"]
        return float(high - low)

    # Equal data sets: with common draws their mean would vary as much as a single one.
    assert width(4) == pytest.approx(width(1) / 2, rel=0.15)


def test_the_interval_covers_the_difference_of_a_reference_bootstrap(accuracy: ModuleType) -> None:
    base, new = outcome(accuracy, 1.0, images=60), outcome(accuracy, 1.4, images=60)
    samples = {name: one["auc"] for name, one in accuracy.bootstrap({"base": base, "new": new}, 0).items()}
    assert len(samples["base"]) == 2000
    rng = np.random.default_rng(1)
    fold, other = base.folds[0], new.folds[0]
    drawn = []
    # scikit-learn takes milliseconds per draw.
    for _ in range(500):
        at = rng.integers(0, 60, 60)
        drawn.append(
            roc_auc_score(fold.labels[at], other.probabilities[at, 1])
            - roc_auc_score(fold.labels[at], fold.probabilities[at, 1])
        )
    ends = np.percentile(samples["new"] - samples["base"], [2.5, 97.5])
    assert ends == pytest.approx(np.percentile(drawn, [2.5, 97.5]), abs=0.02)
