"""The uncertainty of the AUC: a percentile bootstrap that draws whole patients."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from stages.tasks import positives, scored_columns

RESAMPLES = 1000
"""Bootstrap samples; the ends of a 95% interval then rest on 25 samples each."""

_WEIGHTS_AT_ONCE = 4_000_000
"""Weights held in memory at a time (rows times resamples), 32 MB."""

Floats = npt.NDArray[np.float64]


def auc_interval(
    labels: npt.NDArray[np.int64], probabilities: Floats, groups: Sequence[str], *, seed: int = 0
) -> tuple[float, float] | None:
    """95% confidence interval of the (macro one-vs-rest) AUC.

    Images of one patient resemble each other, so patients are drawn with replacement, each with all its images.
    Samples in which a class does not occur have no AUC and are left out.

    Args:
        labels: (n,) class indices, or (n, C) zeros and ones.
        probabilities: (n, C) in [0, 1].
        groups: (n,) patient of each row.
        seed: Of the draws.

    Returns:
        The 2.5th and 97.5th percentile; None where there are fewer than two groups, a class is absent, or fewer than
        half of the samples have an AUC.
    """
    classes = probabilities.shape[1]
    there = positives(labels, classes)
    if len(set(groups)) < 2 or not there.any(axis=0).all() or there.all(axis=0).any():
        return None
    judged = scored_columns(labels, classes)
    values: list[Floats] = []
    for weights in group_draws(groups, seed=seed):
        aucs = [weighted_auc(there[:, index], probabilities[:, index], weights) for index in judged]
        values.append(np.mean(aucs, axis=0))
    sample = np.concatenate(values)
    sample = sample[np.isfinite(sample)]
    if len(sample) < RESAMPLES / 2:
        return None
    low, high = np.percentile(sample, [2.5, 97.5])
    return float(low), float(high)


def group_draws(groups: Sequence[str], *, seed: int = 0) -> Iterator[Floats]:
    """Bootstrap samples of whole groups, some at a time.

    Args:
        groups: (n,) patient of each row.
        seed: Of the draws.

    Yields:
        (n, r), how often each row is in each of r samples; `RESAMPLES` in all, none where there are fewer than two
        groups.
    """
    names, unit = np.unique(np.asarray(groups, dtype=object).astype(str), return_inverse=True)
    if len(names) < 2:
        return
    generator = np.random.default_rng(seed)
    step = max(1, _WEIGHTS_AT_ONCE // len(groups))
    for start in range(0, RESAMPLES, step):
        count = min(step, RESAMPLES - start)
        drawn = np.empty((len(names), count))
        for number in range(count):
            drawn[:, number] = np.bincount(generator.integers(0, len(names), len(names)), minlength=len(names))
        yield drawn[unit]


def weighted_auc(positive: npt.NDArray[np.bool_], scores: Floats, weights: Floats) -> Floats:
    """AUC under many weightings of the same rows at once.

    The share of (positive, negative) pairs in which the positive row scores higher, ties counting half. It equals
    scikit-learn's `roc_auc_score(positive, scores, sample_weight=...)`, which takes some milliseconds a call: half a
    minute for one interval.

    Args:
        positive: (n,) which rows are positive.
        scores: (n,).
        weights: (n, r), how often each row occurs.

    Returns:
        (r,), NaN where one side has no weight.
    """
    order = np.argsort(scores, kind="stable")
    ranked, hit = scores[order], np.flatnonzero(positive[order])
    below = np.zeros((len(scores) + 1, weights.shape[1]))
    np.cumsum(weights[order], axis=0, out=below[1:])
    first, behind = np.searchsorted(ranked, ranked[hit], "left"), np.searchsorted(ranked, ranked[hit], "right")
    own = weights[order[hit]]
    wins = (own * (below[first] + below[behind])).sum(axis=0) / 2
    total, positives = below[-1], own.sum(axis=0)
    # Positive rows were compared with all rows; among themselves they win exactly half.
    wins -= positives**2 / 2
    pairs = positives * (total - positives)
    aucs: Floats = np.full(len(pairs), np.nan)
    np.divide(wins, pairs, out=aucs, where=pairs > 0)
    return aucs
