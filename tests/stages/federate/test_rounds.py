"""Rounds of averaging: equal to central training with one site, resumable to the bit, and sites that fail."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from federated_studies import assert_same_bits, run, sites_at, weights
from study import Study, evaluated_and_predicted, make_study, train_study

from schemas.errors import SettingsError, TrainingError
from schemas.features import ExtractionReceipt
from schemas.federated import FederatedPlan, Partition, RoundLog
from schemas.manifest import Manifest
from stages.federate.messages import Failure, Replies, Reply, Request
from stages.federate.partition import simulate
from stages.federate.site import in_process

ONE_ROUND = FederatedPlan(rounds=1, local_epochs=2)
ADAPTED = {"hidden": 3, "dtype": "float32"}


class Killed(BaseException):
    """A kill signal, from inside."""


def dealt(study: Study, sites: int = 2) -> dict[str, Manifest]:
    return simulate(study.manifest, Partition(sites=sites))


def federated(tmp_path: Path, method: str = "fpt+", **sections: dict[str, Any]) -> tuple[Study, ExtractionReceipt]:
    train = {"keep": "last", "lr": 2e-3, **sections.pop("train", {})}
    study = make_study(tmp_path, method=method, train=train, **sections)
    return study, study.extract()


@pytest.mark.parametrize(
    ("method", "sections"),
    [
        ("fpt+", {}),
        ("lora", {"features": ADAPTED, "methods": {"lora": {"rank": 2, "freeze_a": True}}}),
        ("decomposed-prompts", {"features": ADAPTED}),
        ("ept-lse", {"features": ADAPTED}),
        ("mlp-3", {}),
        ("finetune", {"features": ADAPTED, "methods": {"finetune": {"blocks": 1}}}),
    ],
)
def test_one_site_gives_the_bits_of_central_training(
    tmp_path: Path, method: str, sections: dict[str, dict[str, Any]]
) -> None:
    study, receipt = federated(tmp_path, method, **sections)
    train_study(study, receipt, "central")
    result = run(study, receipt, {"all": study.manifest}, ONE_ROUND)
    assert_same_bits(weights(tmp_path / "federated"), weights(tmp_path / "central"))
    assert result.rounds[0].sites == {"all": sum(1 for _ in study.manifest.of("train"))}
    assert result.up_bytes == result.down_bytes > 0


def test_identical_sites_give_what_one_gives(tmp_path: Path) -> None:
    study, receipt = federated(tmp_path)
    plan = FederatedPlan(rounds=2)
    run(study, receipt, {"all": study.manifest}, plan, "one")
    result = run(study, receipt, dict.fromkeys("abc", study.manifest), plan, "three")
    assert_same_bits(weights(tmp_path / "one"), weights(tmp_path / "three"))
    for log in result.rounds:
        assert sum(log.weights.values()) == pytest.approx(1.0, abs=1e-15)


def test_several_sites_give_one_model_that_is_evaluated_and_predicts(tmp_path: Path) -> None:
    study, receipt = federated(tmp_path)
    manifests, plan = dealt(study, 3), FederatedPlan(rounds=2)
    result = run(study, receipt, manifests, plan, "model")
    counts = {name: sum(1 for _ in manifest.of("train")) for name, manifest in manifests.items()}
    assert [log.sites for log in result.rounds] == [counts, counts]
    assert not any(log.failed for log in result.rounds)
    assert all(log.val_loss is not None and 0 < log.val_loss < 10 for log in result.rounds)
    evaluated, predicted = evaluated_and_predicted(study, receipt)
    assert abs(evaluated - predicted).max() < 1e-3
    before = weights(tmp_path / "model")
    run(study, receipt, manifests, plan, "again")
    assert_same_bits(before, weights(tmp_path / "again"))
    run(study, receipt, manifests, ONE_ROUND, "other")
    assert any(not torch.equal(value, before[name]) for name, value in weights(tmp_path / "other").items())


def test_the_proximal_term_pulls_to_the_average_and_without_weight_changes_nothing(tmp_path: Path) -> None:
    study, receipt = federated(tmp_path)
    manifests, moved = dealt(study), {}
    run(study, receipt, manifests, ONE_ROUND, "average")
    run(study, receipt, manifests, ONE_ROUND.model_copy(update={"mu": 0.0}), "none")
    assert_same_bits(weights(tmp_path / "average"), weights(tmp_path / "none"))
    untrained = study.changed(train={"lr": 1e-12, "weight_decay": 0.0})
    run(study, receipt, manifests, FederatedPlan(rounds=1), "start", untrained)
    start = weights(tmp_path / "start")
    for mu in (0.0, 1.0, 1000.0):
        run(study, receipt, manifests, ONE_ROUND.model_copy(update={"mu": mu}), "pulled")
        state = weights(tmp_path / "pulled")
        moved[mu] = sum(float((state[name] - start[name]).square().sum()) for name in state) ** 0.5
    assert moved[1000.0] < moved[1.0] < moved[0.0]


def failing(exchange: Any, site: str, kinds: Sequence[str]) -> Any:
    """An exchange in which a site does not reply to requests of some kinds."""

    def exchanged(names: Sequence[str], request: Request) -> Replies:
        replies = dict(exchange(names, request))
        if request.kind in kinds and site in names:
            replies[site] = Failure("the disk is full")
        return replies

    return exchanged


def test_a_site_that_fails_is_left_out_of_the_mean_and_named(tmp_path: Path) -> None:
    study, receipt = federated(tmp_path)
    manifests, plan = dealt(study, 3), FederatedPlan(rounds=2)
    others = {name: manifest for name, manifest in manifests.items() if name != "site-2"}
    sites = in_process(sites_at(study, receipt, manifests, study.settings))
    result = run(study, receipt, manifests, plan, "without", exchange=failing(sites, "site-2", ["train"]))
    assert [log.failed for log in result.rounds] == [{"site-2": "the disk is full"}] * 2
    assert [set(log.sites) for log in result.rounds] == [set(others)] * 2
    run(study, receipt, others, plan, "others")
    assert_same_bits(weights(tmp_path / "without"), weights(tmp_path / "others"))
    notices: list[str] = []
    absent = failing(sites, "site-2", ["describe"])
    result = run(study, receipt, manifests, plan, "absent", exchange=absent, on_notice=notices.append)
    assert result.left_out == {"site-2": "the disk is full"} and "site-2" in notices[0]
    assert_same_bits(weights(tmp_path / "absent"), weights(tmp_path / "others"))


def test_weights_that_are_not_finite_are_left_out_and_without_a_site_there_is_no_round(tmp_path: Path) -> None:
    study, receipt = federated(tmp_path)
    manifests = dealt(study)
    sites = in_process(sites_at(study, receipt, manifests, study.settings))

    def spoiling(names: Sequence[str], request: Request) -> Replies:
        replies = sites(names, request)
        if request.kind == "train" and isinstance(reply := replies["site-1"], Reply):
            next(iter(reply.tensors.values())).fill_(float("nan"))
        return replies

    plan = FederatedPlan(rounds=1)
    result = run(study, receipt, manifests, plan, exchange=spoiling)
    assert set(result.rounds[0].failed) == {"site-1"} and "not finite" in result.rounds[0].failed["site-1"]
    assert all(value.isfinite().all() for value in weights(tmp_path / "federated").values())
    unstable = study.changed(train={"lr": 100.0, "clip_norm": 1e9, "weight_decay": 1000.0})
    with pytest.raises(TrainingError, match="No site finished round 1") as caught:
        run(study, receipt, manifests, FederatedPlan(rounds=1, local_epochs=20), settings=unstable)
    assert "site-1" in str(caught.value) and "site-2" in str(caught.value)


@pytest.mark.parametrize("when", ["between rounds", "within a round"])
def test_a_killed_training_ends_where_an_undisturbed_one_ends(tmp_path: Path, when: str) -> None:
    study, receipt = federated(tmp_path, train={"keep": "best"})
    manifests, plan = dealt(study), FederatedPlan(rounds=3, local_epochs=2)
    calm = run(study, receipt, manifests, plan, "calm")
    sites = in_process(sites_at(study, receipt, manifests, study.settings))
    trained: list[str] = []

    def dying(names: Sequence[str], request: Request) -> Replies:
        if request.kind == "train" and trained.count("train") == 1:
            sites(names[:1], request)
            raise Killed
        trained.append(request.kind)
        return sites(names, request)

    def die(log: RoundLog) -> None:
        if log.number == 1:
            raise Killed

    options: dict[str, Any] = {"on_round": die} if when == "between rounds" else {"exchange": dying}
    with pytest.raises(Killed):
        run(study, receipt, manifests, plan, "killed", **options)
    resumed = run(study, receipt, manifests, plan, "killed")
    assert resumed.resumed_from == 1
    assert [log.model_copy(update={"seconds": 0}) for log in resumed.rounds] == [
        log.model_copy(update={"seconds": 0}) for log in calm.rounds
    ]
    assert_same_bits(weights(tmp_path / "calm"), weights(tmp_path / "killed"))
    assert not list((tmp_path / "server").iterdir())


def test_the_round_of_the_lowest_validation_loss_is_kept(tmp_path: Path) -> None:
    study, receipt = federated(tmp_path, train={"keep": "best", "lr": 5e-3})
    result = run(study, receipt, dealt(study), FederatedPlan(rounds=4))
    losses = [log.val_loss or 0.0 for log in result.rounds]
    assert result.best == 1 + losses.index(min(losses))


def test_balanced_class_weights_are_those_of_all_sites_and_a_class_may_be_at_one_site(tmp_path: Path) -> None:
    study, receipt = federated(tmp_path, train={"class_weights": "balanced"})
    by_class: dict[str, Any] = {}
    for row in study.manifest.rows:
        by_class.setdefault(row.label, []).append(row)
    manifests = {name: study.manifest.model_copy(update={"rows": tuple(rows)}) for name, rows in by_class.items()}
    result = run(study, receipt, manifests, FederatedPlan(rounds=1))
    assert not result.rounds[0].failed and len(result.rounds[0].sites) == 3
    train_study(study, receipt, "central")
    run(study, receipt, {"all": study.manifest}, ONE_ROUND, "one")
    assert_same_bits(weights(tmp_path / "one"), weights(tmp_path / "central"))


def test_a_site_without_validation_images_trains_all_the_same(tmp_path: Path) -> None:
    study, receipt = federated(tmp_path)
    rows = tuple(row for row in study.manifest.rows if row.split == "train")
    result = run(study, receipt, {"all": study.manifest.model_copy(update={"rows": rows})}, ONE_ROUND)
    assert result.rounds[0].val_loss is None and result.sites[0].val == 0
    train_study(study, receipt, "central")
    assert_same_bits(weights(tmp_path / "federated"), weights(tmp_path / "central"))


def test_what_depends_on_rows_of_one_site_is_refused(tmp_path: Path) -> None:
    study, receipt = federated(tmp_path)
    manifests = dealt(study)
    for method, word in [("fpt-x", "train.probe_weight"), ("alf", "standardises"), ("statistics", "ridge")]:
        with pytest.raises(SettingsError, match=word):
            settings = make_study(tmp_path / method, method=method).settings
            run(study, receipt, manifests, FederatedPlan(rounds=1), settings=settings)
    phases = federated(tmp_path / "phases", "pt-peft", features=ADAPTED, methods={"pt_peft": {"prompts": 2, "rank": 2}})
    with pytest.raises(SettingsError, match="--local-epochs"):
        run(*phases, dealt(phases[0]), FederatedPlan(rounds=1, local_epochs=2))
    assert run(*phases, dealt(phases[0]), FederatedPlan(rounds=2)).best == 2


def test_sites_that_would_train_another_model_are_named(tmp_path: Path) -> None:
    study, receipt = federated(tmp_path)
    manifests = dealt(study)
    swapped = manifests["site-2"].model_copy(update={"classes": ("plain", "grid", "stripe")})
    with pytest.raises(SettingsError, match="site-2: its classes"):
        run(study, receipt, {**manifests, "site-2": swapped}, FederatedPlan(rounds=1))
