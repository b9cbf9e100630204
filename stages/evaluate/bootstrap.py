"""The uncertainty of the AUC: a percentile bootstrap that draws whole patients."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

RESAMPLES = 2000
"""Bootstrap samples; the ends of a 95% interval then rest on 50 samples each."""

_ROWS_AT_ONCE = 4_000_000
"""Weights held in memory at a time (resamples times rows), 32 MB."""

Floats = npt.NDArray[np.float64]


def auc_interval(
    labels: npt.NDArray[np.int64], probabilities: Floats, groups: Sequence[str], *, seed: int = 0
) -> tuple[float, float] | None:
    """95% confidence interval of the (macro one-vs-rest) AUC.

    Images of one patient resemble each other, so patients are drawn with replacement, each with all its images.
    Samples in which a class does not occur have no AUC and are left out.

    Args:
        labels: (n,) class indices.
        probabilities: (n, C) in [0, 1].
        groups: (n,) patient of each row.
        seed: Of the draws.

    Returns:
        The 2.5th and 97.5th percentile; None where there are fewer than two groups, a class is absent, or fewer than
        half of the samples have an AUC.
    """
    classes = probabilities.shape[1]
    names, unit = np.unique(np.asarray(groups, dtype=object).astype(str), return_inverse=True)
    if len(names) < 2 or len(np.unique(labels)) < classes:
        return None
    generator = np.random.default_rng(seed)
    judged = [1] if classes == 2 else list(range(classes))
    step = max(1, _ROWS_AT_ONCE // len(labels))
    values: list[Floats] = []
    for start in range(0, RESAMPLES, step):
        count = min(step, RESAMPLES - start)
        drawn = generator.multinomial(len(names), np.full(len(names), 1 / len(names)), size=count)
        weights = drawn[:, unit].astype(np.float64)
        aucs = [weighted_auc(labels == index, probabilities[:, index], weights) for index in judged]
        values.append(np.mean(aucs, axis=0))
    sample = np.concatenate(values)
    sample = sample[np.isfinite(sample)]
    if len(sample) < RESAMPLES / 2:
        return None
    low, high = np.percentile(sample, [2.5, 97.5])
    return float(low), float(high)


def weighted_auc(positive: npt.NDArray[np.bool_], scores: Floats, weights: Floats) -> Floats:
    """AUC under many weightings of the same rows at once.

    The probability that a positive row scores above a negative one, ties counting half. It equals scikit-learn's
    `roc_auc_score(positive, scores, sample_weight=...)`, which takes 2 ms a call: half a minute for one interval.

    Args:
        positive: (n,) which rows are positive.
        scores: (n,).
        weights: (r, n), how often each row occurs.

    Returns:
        (r,), NaN where one side has no weight.
    """
    order = np.argsort(scores, kind="stable")
    starts = np.flatnonzero(np.r_[True, np.diff(scores[order]) > 0])
    ordered, hit = weights[:, order], positive[order]
    above = np.add.reduceat(ordered * hit, starts, axis=1)
    below = np.add.reduceat(ordered * ~hit, starts, axis=1)
    wins = (above * (below.cumsum(axis=1) - below / 2)).sum(axis=1)
    pairs = above.sum(axis=1) * below.sum(axis=1)
    aucs: Floats = np.full(len(pairs), np.nan)
    np.divide(wins, pairs, out=aucs, where=pairs > 0)
    return aucs
