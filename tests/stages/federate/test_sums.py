"""The closed form in one round: sums of several sites give the pooled fit, on every partition."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from federated_studies import run, sites_at, weights
from sklearn.linear_model import Ridge
from study import Study, evaluated_and_predicted, make_study, train_study

from schemas.errors import TrainingError
from schemas.features import ExtractionReceipt
from schemas.federated import FederatedPlan, Partition
from stages.federate.messages import Failure, Replies, Request
from stages.federate.partition import simulate
from stages.federate.site import in_process
from stages.methods.least_squares import PENALTIES
from stages.methods.ridge import RowSums, fit_source, row_sums
from stages.train.bundle_spec import read_spec

ONCE = FederatedPlan(rounds=1)


@pytest.fixture
def ridge(tmp_path: Path) -> tuple[Study, ExtractionReceipt]:
    study = make_study(tmp_path, per_class=14, method="ridge", data={"val_share": 0.2, "test_share": 0.1})
    return study, study.extract()


@pytest.mark.parametrize("partition", [(2, None), (3, 0.1), (5, 1.0)])
def test_sums_of_sites_give_the_pooled_fit(
    ridge: tuple[Study, ExtractionReceipt], partition: tuple[int, float | None]
) -> None:
    study, receipt = ridge
    sites, alpha = partition
    manifests = simulate(study.manifest, Partition(sites=sites, alpha=alpha))
    train_study(study, receipt, "pooled")
    result = run(study, receipt, manifests, ONCE)
    pooled, found = weights(study.root / "pooled"), weights(study.root / "federated")
    assert pooled.keys() == found.keys() == {f"probe.{name}" for name in ("weight", "bias", "mean", "scale")}
    for name, value in pooled.items():
        torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-6)
        assert float(value.abs().max()) > 1e-3
    specs = [read_spec(study.root / name).network for name in ("pooled", "federated")]
    assert specs[0] == specs[1]
    assert result.plan.rounds == 1 and result.down_bytes == 0


def test_sums_agree_in_float64_to_rounding(ridge: tuple[Study, ExtractionReceipt]) -> None:
    study, receipt = ridge
    manifests = {"all": study.manifest, **simulate(study.manifest, Partition(sites=3, alpha=0.5))}
    request = Request("sums", values={"train": study.settings.train.model_dump_json()})
    replies = in_process(sites_at(study, receipt, manifests, study.settings))(tuple(manifests), request)
    states = {name: reply.tensors for name, reply in replies.items() if not isinstance(reply, Failure)}
    pooled = states.pop("all")
    summed = {name: sum(state[name].numpy() for state in states.values()) for name in pooled}
    for number in range(3):
        fits = [fit_source(row_sums(one, number)) for one in ({k: v.numpy() for k, v in pooled.items()}, summed)]
        assert fits[0].penalty == fits[1].penalty
        for mine, other in zip(fits[0], fits[1], strict=True):
            np.testing.assert_allclose(mine, other, rtol=1e-6, atol=1e-9)


def test_the_model_of_sums_is_evaluated_and_predicts(ridge: tuple[Study, ExtractionReceipt]) -> None:
    study, receipt = ridge
    result = run(study, receipt, simulate(study.manifest, Partition(sites=2)), ONCE, "model")
    evaluated, predicted = evaluated_and_predicted(study, receipt)
    np.testing.assert_allclose(predicted, evaluated, atol=5e-3)
    log = result.rounds[0]
    assert log.val_loss is not None and log.val_accuracy is not None and 0 < log.val_loss < np.log(3)


def test_a_site_without_sums_is_named_and_a_class_that_only_it_had_is_an_error(
    ridge: tuple[Study, ExtractionReceipt],
) -> None:
    study, receipt = ridge
    manifests = simulate(study.manifest, Partition(sites=3))
    sites = in_process(sites_at(study, receipt, manifests, study.settings))

    def exchange(names: Sequence[str], request: Request) -> Replies:
        replies = dict(sites(names, request))
        return {**replies, "site-1": Failure("no power")} if request.kind == "sums" else replies

    result = run(study, receipt, manifests, ONCE, exchange=exchange)
    assert result.rounds[0].failed == {"site-1": "no power"} and set(result.rounds[0].sites) == {"site-2", "site-3"}
    grids = tuple(row for row in study.manifest.rows if row.label == "grid")
    others = tuple(row for row in study.manifest.rows if row.label != "grid")
    halves = {name: study.manifest.model_copy(update={"rows": rows}) for name, rows in (("a", grids), ("b", others))}
    manifests = {"site-1": halves["a"], "site-2": halves["b"]}
    sites = in_process(sites_at(study, receipt, manifests, study.settings))
    with pytest.raises(TrainingError, match="training images of grid"):
        run(study, receipt, manifests, ONCE, exchange=exchange)


def sums_over(x: np.ndarray, t: np.ndarray, u: np.ndarray) -> RowSums:
    weighted = u[:, None] * x
    return RowSums(float(u.sum()), (u[:, None] * t).sum(0), weighted.sum(0), x.T @ weighted, weighted.T @ t)


def test_losses_and_regressions_of_sums_are_those_of_rows() -> None:
    rng = np.random.default_rng(0)
    x, u = rng.normal(3.0, 2.0, (60, 7)), rng.uniform(0.5, 2.0, 60)
    t = np.eye(3)[rng.integers(0, 3, 60)]
    mean, scale = np.average(x, axis=0, weights=u), x.std(axis=0)
    z = (x - mean) / scale / np.sqrt(7)
    one = sums_over(x, t, u).standardised(mean, scale)
    for mine, other in zip(vars(one).values(), vars(sums_over(z, t, u)).values(), strict=True):
        np.testing.assert_allclose(mine, other, atol=1e-10)
    found_weights, found_biases = one.path()
    losses = sums_over(z[:20], t[:20], u[:20]).losses(found_weights, found_biases)
    for penalty, weight, bias, loss in zip(PENALTIES, found_weights, found_biases, losses, strict=True):
        regression = Ridge(penalty).fit(z, t, sample_weight=u)
        np.testing.assert_allclose(weight, regression.coef_.T, atol=1e-9)
        np.testing.assert_allclose(bias, regression.intercept_, atol=1e-9)
        error = t[:20] - regression.predict(z[:20])
        assert loss == pytest.approx(float((u[:20] @ error**2).sum()))
