"""Several labels an image, and grades: from images to predictions with every method."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn import metrics as sk
from study import Study, make_study, predict
from task_studies import GRADES, LABELS, task_study
from torch.nn import functional as F

from schemas.data_settings import DataSettings
from schemas.errors import BundleError, SettingsError, TrainingError
from schemas.features import ExtractionReceipt
from schemas.methods import METHODS as ROWS
from schemas.methods import Method
from schemas.resolved import ResolvedSettings
from schemas.results import Metrics, TrainResult
from schemas.specs import SideNetworkSpec
from schemas.statistics import ProbeSource
from stages.evaluate.compare import compare
from stages.evaluate.ensemble import score_ensemble
from stages.evaluate.evaluator import evaluate
from stages.evaluate.predictions import read_predictions
from stages.methods import statistics
from stages.methods.fpt_x import Ensemble
from stages.methods.statistics import fit_statistics
from stages.scores import probabilities
from stages.store.reader import open_store
from stages.train import gradient, loop
from stages.train.bundle import load_bundle
from stages.train.data import FeatureDataset, Reading
from stages.train.infer import source_logits
from stages.train.job import Watch
from stages.train.trainer import train, train_together

METHODS: tuple[Method, ...] = ("fpt-x", "side", "statistics", "knn", "attentive")


def run(
    study: Study,
    receipt: ExtractionReceipt,
    output: str = "run",
    settings: ResolvedSettings | None = None,
    watch: Watch | None = None,
) -> TrainResult:
    checkpoints = study.root / "checkpoints"
    return train(settings or study.settings, study.files(receipt), study.root / output / "model", checkpoints, watch)


def evaluated(study: Study, receipt: ExtractionReceipt, output: str = "run") -> Metrics:
    folder = study.root / output
    return evaluate(study.files(receipt), folder / "model", folder / "evaluation")


def predicted_again(study: Study, output: str = "run") -> None:
    """`predict` says of the test images what `evaluate` said."""
    table = read_predictions(study.root / output / "evaluation/predictions.parquet")
    images = [study.root / "images" / row.path for row in table.rows]
    rows = predict(study.root / output / "model", images, study.settings.lpm, study.root, batch_size=5)
    for row, expected in zip(rows, table.probabilities, strict=True):
        assert row.probabilities is not None
        np.testing.assert_allclose(list(row.probabilities.values()), expected, atol=5e-3)
    sure = np.abs(table.probabilities - 0.5).min(axis=1) > 0.01
    written = [study.manifest.classes[i] for i in table.predicted] if table.task == "ordinal" else None
    for number, row in enumerate(rows):
        if written is not None:
            said = written[number]
        elif sure[number]:
            said = "|".join(name for name, there in zip(LABELS, table.predicted[number], strict=True) if there)
        else:
            continue
        assert row.predicted == said


@pytest.mark.parametrize("method", METHODS)
def test_several_labels_from_images_to_predictions(tmp_path: Path, method: Method) -> None:
    study = task_study(tmp_path, "multilabel", method, train={"epochs": 10, "lr": 3e-3})
    receipt = study.extract()
    result = run(study, receipt)
    assert load_bundle(tmp_path / "run/model").spec.task == "multilabel"
    metrics = evaluated(study, receipt)
    table = read_predictions(tmp_path / "run/evaluation/predictions.parquet")
    y, p = table.labels, table.probabilities.astype(np.float64)
    assert y.shape == p.shape == (metrics.images, 3)
    assert p.sum(axis=1).std() > 1e-3, "labels are no shares of one"
    assert metrics.auc == pytest.approx(sk.roc_auc_score(y, p, average="macro"), abs=1e-6)
    assert metrics.average_precision == pytest.approx(sk.average_precision_score(y, p, average="macro"), abs=1e-6)
    assert metrics.f1_micro == pytest.approx(sk.f1_score(y, p >= 0.5, average="micro"))
    assert metrics.accuracy == pytest.approx(((p >= 0.5) == y).all(axis=1).mean())
    assert metrics.hamming == pytest.approx(((p >= 0.5) != y).mean())
    assert metrics.auc is not None
    assert metrics.auc > (0.75 if method != "side" else 0.55)
    assert result.best.val_auc is not None
    predicted_again(study)
    report = (tmp_path / "run/evaluation/report.html").read_text()
    for said in ("mean over 3 labels", "Hamming loss", "Exact match", "false positives"):
        assert said in report
    assert json.loads((tmp_path / "run/evaluation/metrics.json").read_text())["task"] == "multilabel"
    lines = (tmp_path / "run/evaluation/plots/confusion.csv").read_text().splitlines()
    assert len(lines) == 1 + y.size
    assert {line.split(",")[0] for line in lines[1:]} <= {*LABELS, *(f"not {name}" for name in LABELS)}


@pytest.mark.parametrize("method", METHODS)
def test_grades_from_images_to_predictions(tmp_path: Path, method: Method) -> None:
    study = task_study(tmp_path, "ordinal", method, train={"epochs": 20, "lr": 1e-3})
    receipt = study.extract()
    run(study, receipt)
    assert load_bundle(tmp_path / "run/model").spec.task == "ordinal"
    metrics = evaluated(study, receipt)
    table = read_predictions(tmp_path / "run/evaluation/predictions.parquet")
    p = table.probabilities.astype(np.float64)
    np.testing.assert_allclose(p.sum(axis=1), 1.0, atol=1e-5)
    costs = p @ np.array([[(i - j) ** 2 for j in range(4)] for i in range(4)])
    np.testing.assert_array_equal(table.predicted, costs.argmin(axis=1))
    kappa = sk.cohen_kappa_score(table.labels, table.predicted, labels=range(4), weights="quadratic")
    assert metrics.quadratic_kappa == pytest.approx(kappa)
    assert kappa > (0.5 if method != "side" else 0.2)
    assert table.classes == GRADES
    predicted_again(study)
    report = (tmp_path / "run/evaluation/report.html").read_text()
    assert report.index("Quadratic kappa") < report.index(">AUC")


@pytest.mark.parametrize("task", ["multilabel", "ordinal"])
@pytest.mark.parametrize("method", METHODS)
def test_the_bundle_gives_the_validation_loss_of_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, task: str, method: Method
) -> None:
    held: list[torch.Tensor] = []

    def kept(*given: Any) -> Any:
        found = fit_statistics(*given)
        held.append(found[1])
        return found

    for module in (statistics, gradient):
        monkeypatch.setattr(module, "fit_statistics", kept)
    weights = {"class_weights": "balanced"}
    study = task_study(tmp_path, task, method, train={"epochs": 3, "label_smoothing": 0.1, **weights})
    receipt = study.extract()
    result = run(study, receipt)
    bundle = load_bundle(tmp_path / "run/model")
    rows = list(study.manifest.of("val"))
    store, ids = open_store(study.cache, receipt), [row.id for row in rows]
    logits = source_logits(bundle, store, ids)
    if held:
        # The bundle's linear probes have learnt from these images: training judges by regressions that have not.
        (said,) = held
        assert not torch.allclose(said, logits, atol=0.05)
        logits = said
        if isinstance(bundle.network, Ensemble):
            reading = Reading(ROWS[method].inputs, bundle.network.spec.image_size)
            data = FeatureDataset(store, ids, [0] * len(ids), reading)
            batch = data.__getitems__([(0, position) for position in range(len(ids))]).prepared(receipt.spec)
            with torch.inference_mode():
                members = bundle.network.member_logits(bundle.network.members, batch)
                logits = bundle.network.join(members, said)
    target = torch.tensor([[name in study.manifest.names(row) for name in bundle.spec.classes] for row in rows]).long()
    own = list(study.manifest.of("train"))
    counts = torch.tensor([sum(name in study.manifest.names(row) for row in own) for name in bundle.spec.classes])
    if task == "multilabel":
        balance = (len(own) - counts) / counts
        expected = F.binary_cross_entropy_with_logits(logits, target.float(), pos_weight=balance)
    else:
        expected = F.cross_entropy(logits, target.argmax(dim=1), weight=len(own) / (4 * counts))
    assert result.best.val_loss == pytest.approx(float(expected), abs=1e-5)


def test_labels_are_pooled_by_their_odds() -> None:
    spec = SideNetworkSpec(
        method="fpt-x", classes=2, layers=1, lpm_width=8, heads=2, width=4, image_size=16, prompts=1, dropout=0.0,
        members=2, probe_weight=0.25, sources=(ProbeSource(name="pooled outputs", spans=((0, 16),)),),
        task="multilabel",
    )  # fmt: skip
    network = Ensemble(spec)
    assert network.probe is not None
    said = torch.tensor([[1.0, -2.0]])
    members = torch.tensor([[[2.0, 0.0]], [[-1.0, 4.0]]])
    p = probabilities(network.join(members, said), "multilabel")
    own, probe = members.double().sigmoid(), said.double().sigmoid()
    yes = own[0].sqrt() * own[1].sqrt()
    no = (1 - own[0]).sqrt() * (1 - own[1]).sqrt()
    yes, no = yes**0.75 * probe**0.25, no**0.75 * (1 - probe) ** 0.25
    torch.testing.assert_close(p, yes / (yes + no))


@pytest.mark.parametrize("task", ["multilabel", "ordinal"])
def test_models_are_compared_and_averaged(tmp_path: Path, task: str) -> None:
    study = task_study(tmp_path, task, "knn")
    receipt = study.extract()
    run(study, receipt, "knn")
    run(study, receipt, "linear", settings=study.settings.model_copy(update={"method": "linear"}))
    single = [evaluated(study, receipt, name) for name in ("knn", "linear")]
    found = compare([tmp_path / "knn", tmp_path / "linear"])
    assert [model.metrics for model in found.models] == single
    differences = found.models[1].differences
    assert ("quadratic_kappa" in differences) == (task == "ordinal")
    assert ("hamming" in differences) == (task == "multilabel")
    for name, difference in differences.items():
        assert difference.value == pytest.approx(getattr(single[1], name) - getattr(single[0], name))
    together = score_ensemble([tmp_path / "knn/evaluation", tmp_path / "linear/evaluation"])
    tables = [read_predictions(tmp_path / name / "evaluation/predictions.parquet") for name in ("knn", "linear")]
    a, b = (table.probabilities.astype(np.float64).clip(1e-12, 1) for table in tables)
    if task == "multilabel":
        yes, no = np.sqrt(a * b), np.sqrt((1 - a).clip(1e-12) * (1 - b).clip(1e-12))
        p = yes / (yes + no)
    else:
        p = np.sqrt(a * b) / np.sqrt(a * b).sum(axis=1, keepdims=True)
    assert together.task == task
    one_hot = tables[0].labels if task == "multilabel" else np.eye(4)[tables[0].labels]
    expected = np.mean((p - one_hot) ** 2) if task == "multilabel" else ((p - one_hot) ** 2).sum(axis=1).mean()
    assert together.brier == pytest.approx(expected, abs=1e-6)


def test_a_model_of_another_task_is_refused(tmp_path: Path) -> None:
    study = task_study(tmp_path, "ordinal", "knn")
    receipt = study.extract()
    run(study, receipt)
    plain = study.manifest.model_copy(update={"task": "multiclass"})
    with pytest.raises(BundleError, match=r"trained for ordinal; the manifest is multiclass(.|\n)*fpt train"):
        evaluate(study.files(receipt, manifest=plain), tmp_path / "run/model", tmp_path / "x")
    image = [tmp_path / "images/000.png"]
    with pytest.raises(BundleError, match=r"trained for ordinal; data\.task is multiclass"):
        predict(tmp_path / "run/model", image, study.settings.lpm, tmp_path, data=DataSettings(task="multiclass"))
    assert predict(tmp_path / "run/model", image, study.settings.lpm, tmp_path, data=DataSettings())
    with pytest.raises(SettingsError, match=r"prepared for ordinal(.|\n)*fpt prepare"):
        run(study, receipt, settings=study.changed(data={"task": "multiclass"}))


def test_a_bundle_without_a_digest_is_refused(study: Study) -> None:
    run(study, study.extract())
    path = study.root / "run/model/model.json"
    content = json.loads(path.read_text())
    del content["sha256"]
    path.write_text(json.dumps(content))
    with pytest.raises(BundleError, match="another version of fpt"):
        load_bundle(study.root / "run/model")


def test_a_label_of_all_training_images_is_named(tmp_path: Path) -> None:
    study = task_study(tmp_path, "multilabel", "linear")
    receipt = study.extract()
    rows = tuple(row for row in study.manifest.rows if "bars" in row.label or row.split != "train")
    study.manifest = study.manifest.model_copy(update={"rows": rows})
    with pytest.raises(TrainingError, match="Every training image has the label bars"):
        run(study, receipt)


def test_defaults_train_as_plain_cross_entropy_does(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    receipt = study.extract()
    run(study, receipt)

    def plain(logits: torch.Tensor, labels: torch.Tensor, *_: Any) -> torch.Tensor:
        return F.cross_entropy(logits, labels)

    monkeypatch.setattr(loop, "training_loss", plain)
    run(study, receipt, "plain")
    first, second = ((study.root / name / "model/model.safetensors").read_bytes() for name in ("run", "plain"))
    assert first == second


def test_losses_and_sampling_change_the_model(study: Study) -> None:
    receipt = study.extract()
    few = [row for row in study.manifest.rows if row.label == "grid" and row.split == "train"][1:]
    rows = tuple(row for row in study.manifest.rows if row not in few)
    study.manifest = study.manifest.model_copy(update={"rows": rows})
    found = set()
    changes: list[dict[str, Any]] = [
        {},
        {"loss": "focal"},
        {"loss": "focal", "focal_gamma": 1.0},
        {"label_smoothing": 0.1},
        {"sampling": "balanced"},
        {"sampling": "decay"},
        {"kappa_weight": 3.0},
    ]
    for number, keys in enumerate(changes):
        run(study, receipt, str(number), settings=study.changed(train=keys))
        found.add((study.root / str(number) / "model/model.safetensors").read_bytes())
    assert len(found) == 6, "all but the kappa term, which only grades have"


def test_runs_of_one_pass_may_differ_in_their_losses(study: Study) -> None:
    receipt = study.extract()
    variants = [
        study.changed(train=keys)
        for keys in ({}, {"loss": "focal", "focal_gamma": 1.0}, {"label_smoothing": 0.2}, {"kappa_weight": 1.0})
    ]
    results = train_together(
        variants,
        study.files(receipt),
        [study.root / f"together/{number}" for number in range(4)],
        study.root / "checkpoints",
    )
    for number, (settings, result) in enumerate(zip(variants, results, strict=True)):
        alone = run(study, receipt, f"alone/{number}", settings=settings)
        assert result.best.train_loss == pytest.approx(alone.best.train_loss, abs=1e-5)
    with pytest.raises(SettingsError, match=r"train\.sampling"):
        train_together(
            [study.settings, study.changed(train={"sampling": "decay"})],
            study.files(receipt),
            [study.root / "x", study.root / "y"],
            study.root / "checkpoints",
        )


@pytest.mark.parametrize("after", [1, 2])
def test_a_killed_run_with_decaying_sampling_ends_where_a_calm_one_ends(tmp_path: Path, after: int) -> None:
    study = make_study(tmp_path, train={"epochs": 3, "sampling": "decay"})
    receipt = study.extract()
    run(study, receipt, "calm")

    class Killed(BaseException):
        pass

    def die(_: int, log: Any) -> None:
        if log.epoch == after:
            raise Killed

    with pytest.raises(Killed):
        run(study, receipt, "killed", watch=Watch(on_epoch=die))
    assert run(study, receipt, "killed").resumed_from == after
    first, second = ((study.root / name / "model/model.safetensors").read_bytes() for name in ("calm", "killed"))
    assert first == second
