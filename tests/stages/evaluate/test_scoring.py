import json

import numpy as np
import pytest

from schemas.manifest import ManifestRow
from schemas.tasks import METRICS, Task
from stages.evaluate.predictions import Predictions
from stages.evaluate.scoring import rows_sha256, score


def rows(labels: str = "abcabc") -> tuple[ManifestRow, ...]:
    return tuple(
        ManifestRow(id=f"{number:064x}", path=f"{number}.png", label=label, group=f"g{number}", split="test")
        for number, label in enumerate(labels)
    )


def test_the_digest_is_that_of_contents_and_labels() -> None:
    first = rows()
    moved = tuple(row.model_copy(update={"path": f"x/{row.path}", "group": "g", "split": "external"}) for row in first)
    assert rows_sha256(first) == rows_sha256(first[::-1]) == rows_sha256(moved)
    assert len({rows_sha256(other) for other in (first, first[1:], rows("abcabb"), (*first, first[0]))}) == 4


@pytest.mark.parametrize(
    ("task", "kappa"), [("multiclass", "cohen_kappa"), ("ordinal", "quadratic_kappa"), ("multilabel", None)]
)
def test_each_task_has_its_kappa(task: Task, kappa: str | None) -> None:
    p = np.random.default_rng(0).dirichlet(np.ones(3), 6).astype(np.float32)
    metrics = score(Predictions(("a", "b", "c"), rows(), p, None, task))
    written = json.loads(metrics.model_dump_json())
    assert {name for name in written if "kappa" in name} == ({kappa} if kappa else set())
    assert {name for name in METRICS[task] if "kappa" in name} == ({kappa} if kappa else set())
    assert "warnings" not in written
    assert written["rows_sha256"] == rows_sha256(rows())
