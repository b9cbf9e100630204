"""Estimate the uncertainty of the AUC by a percentile bootstrap over patients."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from stages.tasks import positives, scored_columns

RESAMPLES = 1000
"""Bootstrap samples; each end of a 95% interval is then determined by 25 of them."""

_WEIGHTS_AT_ONCE = 4_000_000
"""Number of weights in memory at a time (rows times resamples), 32 MB."""

Floats = npt.NDArray[np.float64]


def auc_interval(
    labels: npt.NDArray[np.int64], probabilities: Floats, groups: Sequence[str], *, seed: int = 0
) -> tuple[float, float] | None:
    """Return a 95% confidence interval of the (macro one-vs-rest) AUC.

    Images of one patient are correlated, so patients are drawn with replacement, each with all its images. Samples
    without any image of some class have no AUC and are dropped.

    Args:
        labels: (n,) class indices, or (n, C) zeros and ones.
        probabilities: (n, C) in [0, 1].
        groups: (n,) patient of each row.
        seed: Seed of the draws.

    Returns:
        The 2.5th and 97.5th percentile, or None with fewer than two groups, with an absent class, or if fewer than
        half of the samples have an AUC.
    """
    classes = probabilities.shape[1]
    positive = positives(labels, classes)
    if len(set(groups)) < 2 or not positive.any(axis=0).all() or positive.all(axis=0).any():
        return None
    columns = scored_columns(labels, classes)
    values: list[Floats] = []
    for weights in group_draws(groups, seed=seed):
        aucs = [weighted_auc(positive[:, index], probabilities[:, index], weights) for index in columns]
        values.append(np.mean(aucs, axis=0))
    return percentile_interval(np.concatenate(values))


def percentile_interval(sample: Floats) -> tuple[float, float] | None:
    """Return the 2.5th and 97.5th percentile of the values (r,) of bootstrap samples; None if most are not defined."""
    finite = sample[np.isfinite(sample)]
    if not len(finite) or len(finite) < len(sample) / 2:
        return None
    low, high = np.percentile(finite, [2.5, 97.5])
    return float(low), float(high)


def group_draws(groups: Sequence[str], *, seed: int = 0) -> Iterator[Floats]:
    """Yield bootstrap samples of groups in batches.

    Args:
        groups: (n,) patient of each row.
        seed: Seed of the draws.

    Yields:
        (n, r) number of times each row is in each of r samples: `RESAMPLES` samples in total, none with fewer than
        two groups.
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
    """Compute the AUC for many weightings of the same rows at once.

    The AUC is the share of (positive, negative) pairs in which the positive row scores higher, with ties counting half.
    The result equals scikit-learn's `roc_auc_score(positive, scores, sample_weight=...)`, which takes milliseconds per
    weighting, or half a minute per interval.

    Args:
        positive: (n,) whether each row is positive.
        scores: (n,).
        weights: (n, r) number of times each row occurs.

    Returns:
        (r,) AUC, NaN if the positive or the negative rows have no weight.
    """
    order = np.argsort(scores, kind="stable")
    ranked, hit = scores[order], np.flatnonzero(positive[order])
    below = np.zeros((len(scores) + 1, weights.shape[1]))
    np.cumsum(weights[order], axis=0, out=below[1:])
    first, last = np.searchsorted(ranked, ranked[hit], "left"), np.searchsorted(ranked, ranked[hit], "right")
    positive_weights = weights[order[hit]]
    wins = (positive_weights * (below[first] + below[last])).sum(axis=0) / 2
    total, positives = below[-1], positive_weights.sum(axis=0)
    # Positive rows were compared with all rows, including each other, where they win exactly half.
    wins -= positives**2 / 2
    pairs = positives * (total - positives)
    aucs: Floats = np.full(len(pairs), np.nan)
    np.divide(wins, pairs, out=aucs, where=pairs > 0)
    return aucs


def weighted_recall(guessed: npt.NDArray[np.bool_], positive: npt.NDArray[np.bool_], weights: Floats) -> Floats:
    """Return the (r,) recall under each weighting (n, r); NaN where no positive row has weight."""
    positive_weights = weights[positive]
    total, recalls = positive_weights.sum(axis=0), np.full(weights.shape[1], np.nan)
    np.divide(guessed[positive].astype(np.float64) @ positive_weights, total, out=recalls, where=total > 0)
    return recalls
