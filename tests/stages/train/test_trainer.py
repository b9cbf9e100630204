"""Training: from cached features alone, resumable to the bit, refusing what does not fit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from study import Study, make_study, train_study

from schemas.errors import (
    BundleError,
    CacheIncompleteError,
    CacheMismatchError,
    SettingsError,
    TrainingError,
)
from schemas.features import ExtractionReceipt
from schemas.manifest import Manifest
from schemas.methods import METHODS
from schemas.results import EpochLog
from schemas.settings import Settings
from stages.store.reader import open_store
from stages.train.bundle import load_bundle
from stages.train.bundle_spec import encode_spec, read_spec
from stages.train.checks import class_weights
from stages.train.data import EpochSampler, FeatureDataset, Reading, batches
from stages.train.infer import source_logits
from stages.train.inputs import inputs_key
from stages.train.job import Watch, run_key


class Killed(BaseException):
    """A kill signal, from inside."""


@pytest.mark.parametrize(
    ("method", "dtype"), [("fpt", "float16"), ("fpt+", "int8"), ("fpt+", "float32"), ("fpt+", "int4"), ("side", "int8")]
)
def test_the_bundle_is_the_best_epoch(tmp_path: Path, method: str, dtype: str) -> None:
    study = make_study(tmp_path, method=method, train={"epochs": 3, "lr": 2e-3}, features={"dtype": dtype})
    receipt = study.extract()
    shutil.rmtree(study.root / "images")  # stage two opens no original image ...
    (study.root / "lpm.safetensors").unlink()  # ... and no LPM
    logs: list[EpochLog] = []
    result = train_study(study, receipt, watch=Watch(on_epoch=lambda _, log: logs.append(log)))
    assert tuple(logs) == result.epochs
    assert result.best == max(logs, key=lambda log: (log.val_auc, -log.val_loss))
    bundle = load_bundle(study.root / "model")
    assert bundle.spec.classes == ("grid", "plain", "stripe")
    assert (bundle.spec.best_epoch, bundle.spec.val_auc) == (result.best.epoch, result.best.val_auc)
    assert not list((study.root / "checkpoints").iterdir())
    rows = list(study.manifest.of("val"))
    logits = source_logits(bundle, open_store(study.cache, receipt), [row.id for row in rows])
    target = torch.tensor([study.manifest.classes.index(row.label) for row in rows])
    loss = float(torch.nn.functional.cross_entropy(logits, target))
    assert loss == pytest.approx(result.best.val_loss, abs=1e-6)


def test_one_seed_gives_one_model_and_another_seed_another(study: Study) -> None:
    receipt = study.extract()
    train_study(study, receipt, "a")
    train_study(study, receipt, "b")
    train_study(study, receipt, "c", settings=study.changed(train={"seed": 1}))
    a, b, c = ((study.root / name / "model.safetensors").read_bytes() for name in "abc")
    assert a == b
    assert a != c


@pytest.mark.parametrize("after", [1, 2, 3])
def test_a_killed_run_ends_where_an_undisturbed_one_ends(tmp_path: Path, after: int) -> None:
    study = make_study(tmp_path, train={"epochs": 4})
    receipt = study.extract()
    calm = train_study(study, receipt, "calm")

    def die(_: int, log: EpochLog) -> None:
        if log.epoch == after:
            raise Killed

    with pytest.raises(Killed):
        train_study(study, receipt, "killed", watch=Watch(on_epoch=die))
    replayed: list[EpochLog] = []
    resumed = train_study(study, receipt, "killed", watch=Watch(on_epoch=lambda _, log: replayed.append(log)))
    assert resumed.resumed_from == after
    assert [log.epoch for log in replayed] == [1, 2, 3, 4]
    without_times = [log.model_copy(update={"seconds": 0}) for log in calm.epochs]
    assert [log.model_copy(update={"seconds": 0}) for log in resumed.epochs] == without_times
    assert (tmp_path / "calm/model.safetensors").read_bytes() == (tmp_path / "killed/model.safetensors").read_bytes()


def test_another_setting_does_not_take_up_the_checkpoint(study: Study) -> None:
    receipt = study.extract()

    def die(_: int, __: EpochLog) -> None:
        raise Killed

    with pytest.raises(Killed):
        train_study(study, receipt, watch=Watch(on_epoch=die))
    assert train_study(study, receipt, settings=study.changed(train={"lr": 1e-4})).resumed_from == 0


def test_learning_separates_the_patterns(tmp_path: Path) -> None:
    study = make_study(tmp_path, per_class=20, train={"epochs": 12, "lr": 3e-3})
    result = train_study(study, study.extract())
    assert result.best.val_auc is not None
    assert result.best.val_auc > 0.9
    assert result.epochs[-1].train_loss < result.epochs[0].train_loss


def test_features_of_other_settings_are_refused_by_field(study: Study) -> None:
    receipt = study.extract()
    changed = study.changed(features={"importance": "class_token", "dtype": "float32"})
    with pytest.raises(CacheMismatchError, match="fpt extract") as caught:
        train_study(study, receipt, settings=changed)
    assert caught.value.differing == {
        "importance": ("class_token", "global"),
        "dtype": ("float32", "float16"),
    }


def test_the_side_network_alone_takes_the_small_images_of_any_features(tmp_path: Path) -> None:
    study = make_study(tmp_path, method="fpt")
    receipt = study.extract()
    side = make_study(tmp_path / "side", method="side").settings
    train_study(study, receipt, settings=side)
    larger = side.model_copy(update={"train": side.train.model_copy(update={"side_image_size": 48})})
    with pytest.raises(CacheMismatchError):
        train_study(study, receipt, settings=larger)


@pytest.mark.parametrize("field", ["resize", "lpm.mean", "lpm.std", "lpm.interpolation"])
def test_the_side_network_refuses_small_images_of_another_preprocessing(tmp_path: Path, field: str) -> None:
    study = make_study(tmp_path, method="fpt")
    receipt = study.extract()
    study.settings = make_study(tmp_path / "side", method="side").settings
    if field == "resize":
        study.settings = study.changed(features={"resize": "letterbox"})
    else:
        # Training would normalise with these, evaluation with those of the receipt.
        other = "nearest" if field == "lpm.interpolation" else (0.1, 0.2, 0.3)
        study.lpm = study.lpm.model_copy(update={field.removeprefix("lpm."): other})
    with pytest.raises(CacheMismatchError) as caught:
        train_study(study, receipt)
    assert set(caught.value.differing) == {field}


def test_images_without_features_are_refused(study: Study) -> None:
    receipt = study.extract()
    rows = study.manifest.rows
    stranger = rows[0].model_copy(update={"id": "f" * 64, "path": "new.png"})
    study.manifest = Manifest(classes=study.manifest.classes, rows=(*rows, stranger))
    with pytest.raises(CacheIncompleteError, match="1 of 25"):
        train_study(study, receipt)


def test_a_store_that_is_gone_is_refused(study: Study) -> None:
    receipt = study.extract()
    shutil.rmtree(study.cache)
    with pytest.raises(CacheIncompleteError, match="fpt extract"):
        train_study(study, receipt)


def test_a_store_that_is_not_whole_is_refused_before_the_first_epoch(tmp_path: Path) -> None:
    study = make_study(tmp_path, per_class=5, features={"shard_size": 1})
    receipt = study.extract()
    # Training reads no test image: only the check of the whole store can miss the shard of one.
    unread = next(study.manifest.of("test")).id
    path = next(path for path in study.cache.glob("*/receipts/*.json") if unread in path.read_text())
    path.unlink()
    with pytest.raises(CacheIncompleteError, match="fpt extract"):
        train_study(study, receipt)


def test_a_loss_that_is_not_finite_is_said(study: Study) -> None:
    receipt = study.extract()
    with pytest.raises(TrainingError, match=r"train\.lr"):
        train_study(study, receipt, settings=study.changed(train={"lr": 1e30}))


def test_class_weights() -> None:
    settings = Settings()
    device = torch.device("cpu")

    def weights(chosen: Any, labels: list[int]) -> Any:
        train = settings.train.model_copy(update={"class_weights": chosen})
        return class_weights(settings.model_copy(update={"train": train}), labels, ("a", "b"), device)

    assert weights("none", [0, 1]) is None
    assert weights("balanced", [0, 0, 0, 1]).tolist() == pytest.approx([4 / 6, 2.0])
    assert weights((1.0, 3.0), [0, 1]).tolist() == [1.0, 3.0]
    with pytest.raises(TrainingError, match="label b"):
        weights("none", [0, 0])
    with pytest.raises(SettingsError, match="class_weights"):
        weights((1.0, 2.0, 3.0), [0, 1])


def test_class_weights_change_the_model(study: Study) -> None:
    receipt = study.extract()
    train_study(study, receipt, "plain")
    train_study(study, receipt, "weighted", settings=study.changed(train={"class_weights": (5.0, 1.0, 1.0)}))
    plain, weighted = ((study.root / name / "model.safetensors").read_bytes() for name in ("plain", "weighted"))
    assert plain != weighted


def dataset(study: Study, receipt: ExtractionReceipt, augment: bool) -> FeatureDataset:
    rows = list(study.manifest.rows)
    settings = study.settings.train
    reading = Reading(METHODS["fpt+"].inputs, 32, settings.augment if augment else None, seed=3)
    source = open_store(study.cache, receipt)
    return FeatureDataset(source, [row.id for row in rows], list(range(len(rows))), reading)


@pytest.mark.slow
def test_workers_give_the_batches_of_the_process_itself(study: Study) -> None:
    data = dataset(study, study.extract(), augment=True)
    sampler = EpochSampler(len(data), 5, seed=1)
    sampler.epoch = 2
    alone = [(b.side.clone(), b.tokens.keys.clone(), b.labels) for b in batches(data, sampler)]
    helped = [(b.side.clone(), b.tokens.keys.clone(), b.labels) for b in batches(data, sampler, workers=2)]
    assert len(alone) == len(helped) == 5
    for left, right in zip(alone, helped, strict=True):
        for a, b in zip(left, right, strict=True):
            assert torch.equal(a, b)


def test_only_the_side_image_is_augmented(study: Study) -> None:
    receipt = study.extract()
    plain, augmented = dataset(study, receipt, False), dataset(study, receipt, True)
    index = [(1, 4), (1, 9)]
    a, b = plain.__getitems__(index), augmented.__getitems__(index)
    assert torch.equal(a.tokens.keys, b.tokens.keys)
    assert not torch.equal(a.side, b.side)
    first = b.side.clone()
    again = augmented.__getitems__(index[::-1]).side.clone()
    assert torch.equal(again.flip(0), first), "the draw follows the image, not its place in the batch"
    other_epoch = augmented.__getitems__([(2, 4), (2, 9)]).side
    assert not torch.equal(other_epoch, first)


def test_an_epoch_visits_every_image_once_in_its_own_order() -> None:
    sampler = EpochSampler(10, 4, seed=0)
    orders = []
    for sampler.epoch in (1, 2):
        flat = [index for batch in sampler for index in batch]
        assert {epoch for epoch, _ in flat} == {sampler.epoch}
        orders.append([position for _, position in flat])
        assert sorted(orders[-1]) == list(range(10))
    assert orders[0] != orders[1]
    assert len(sampler) == 3


def test_damaged_bundles_are_refused(study: Study) -> None:
    train_study(study, study.extract())
    folder = study.root / "model"
    with pytest.raises(BundleError, match="fpt train"):
        load_bundle(study.root / "nowhere")
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (folder / "model.safetensors").write_bytes(weights)
    with pytest.raises(BundleError, match="damaged or exchanged"):
        load_bundle(folder)
    (folder / "model.json").write_text("{}")
    with pytest.raises(BundleError, match="cannot be understood"):
        load_bundle(folder)


@pytest.mark.parametrize(
    "edit", [{"classes": ["stripe", "plain", "grid"]}, {"features": {"resize": "letterbox"}}, {"val_auc": 0.99}]
)
def test_an_edited_bundle_is_refused_with_cause_and_repair(study: Study, edit: dict[str, Any]) -> None:
    train_study(study, study.extract())
    path = study.root / "model/model.json"
    content = json.loads(path.read_text())
    for name, value in edit.items():
        content[name] = {**content[name], **value} if isinstance(value, dict) else value
    path.write_text(json.dumps(content))
    for read in (read_spec, load_bundle):
        with pytest.raises(BundleError, match=r"differs from its digest(.|\n)*edited or damaged(.|\n)*fpt train"):
            read(study.root / "model")


def test_a_spec_whose_parts_do_not_fit_each_other_is_refused(study: Study) -> None:
    train_study(study, study.extract())
    spec = read_spec(study.root / "model")
    for update in ({"classes": ("a", "b")}, {"features": spec.features.model_copy(update={"layers": (0,)})}):
        (study.root / "model/model.json").write_bytes(encode_spec(spec.model_copy(update=update)))
        with pytest.raises(BundleError, match="cannot be understood"):
            read_spec(study.root / "model")


def half_trained(study: Study, receipt: ExtractionReceipt, epochs: int = 1) -> Path:
    """A run that was killed after some epochs; gives its checkpoint."""

    def die(_: int, log: EpochLog) -> None:
        if log.epoch == epochs:
            raise Killed

    with pytest.raises(Killed):
        train_study(study, receipt, "killed", watch=Watch(on_epoch=die))
    (path,) = (study.root / "checkpoints").iterdir()
    return path


def test_a_damaged_checkpoint_is_named_and_training_starts_again(study: Study) -> None:
    receipt = study.extract()
    train_study(study, receipt, "calm")
    path = half_trained(study, receipt)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    notices: list[str] = []
    result = train_study(study, receipt, "again", watch=Watch(on_notice=notices.append))
    assert result.resumed_from == 0
    assert notices == [f"The checkpoint {path} is damaged: training starts from the first epoch."]
    calm, again = ((study.root / name / "model.safetensors").read_bytes() for name in ("calm", "again"))
    assert calm == again
    assert not path.exists()


def test_the_checkpoint_of_another_training_is_not_resumed(study: Study) -> None:
    receipt = study.extract()
    path = half_trained(study, receipt)
    other = study.changed(train={"lr": 1e-4})
    name = f"{run_key(other, study.manifest, inputs_key(other, study.files(receipt)))[:16]}.ckpt"
    path.rename(path.with_name(name))
    notices: list[str] = []
    assert train_study(study, receipt, settings=other, watch=Watch(on_notice=notices.append)).resumed_from == 0
    assert [notice.partition(name)[2] for notice in notices] == [
        " belongs to another training: training starts from the first epoch."
    ]


def test_a_checkpoint_that_another_process_removed_is_no_problem(study: Study) -> None:
    """Two equal trainings at once: the one that ends first removes the checkpoint of both."""
    receipt = study.extract()
    train_study(study, receipt, "calm")

    def remove(_: int, __: EpochLog) -> None:
        for path in (study.root / "checkpoints").iterdir():
            path.unlink()

    train_study(study, receipt, "other", watch=Watch(on_epoch=remove))
    calm, other = ((study.root / name / "model.safetensors").read_bytes() for name in ("calm", "other"))
    assert calm == other


def test_the_side_network_alone_does_not_read_features(study: Study) -> None:
    receipt = study.extract()
    store = open_store(study.cache, receipt)
    data = FeatureDataset(store, [study.manifest.rows[0].id], [0], Reading(METHODS["side"].inputs, 32))
    batch = data[(1, 0)]
    assert batch.tokens is None
    assert np.array_equal(batch.labels, [0])
