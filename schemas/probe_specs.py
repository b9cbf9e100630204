"""Specs of closed-form models: what a bundle holds of a probe next to its weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from schemas.manifest import Split
from schemas.specs import MethodSpec, has_sources
from schemas.statistics import ProbeSource

if TYPE_CHECKING:
    from schemas.features import FeatureSpec


class PooledSpec(MethodSpec):
    """A model of the pooled outputs."""

    features: int
    """Inputs: both pooled outputs, 2 D."""

    def matches(self, features: FeatureSpec) -> bool:
        """Whether the shape of the model is that of features of this spec."""
        return self.features == 2 * features.lpm.width


class LinearSpec(PooledSpec):
    """Logistic regression on the pooled outputs."""

    method: Literal["linear"] = "linear"
    """The kind of model."""
    c: float
    """Inverse of the L2 penalty, of the lowest out-of-fold log-loss."""


class KnnSpec(PooledSpec):
    """Nearest-neighbour classifier on the pooled outputs."""

    method: Literal["knn"] = "knn"
    """The kind of model."""
    rows: int
    """Training rows that vote."""
    neighbours: int
    """k, of the lowest out-of-fold log-loss."""


class StatisticsSpec(MethodSpec):
    """Linear probes of the token statistics."""

    sources: tuple[ProbeSource, ...]
    """What each linear probe reads."""
    shares: tuple[float, ...]
    """Ensemble weight of each source."""

    @property
    def ranked(self) -> tuple[tuple[str, float], ...]:
        """Sources by name with their ensemble weights, the largest first."""
        named = zip((source.title for source in self.sources), self.shares, strict=True)
        return tuple(sorted(named, key=lambda pair: -pair[1]))

    @property
    def fitted_splits(self) -> tuple[Split, ...]:
        """Splits whose images the weights were fitted to."""
        return ("train", "val")

    def matches(self, features: FeatureSpec) -> bool:
        """Whether the shape of the model is that of features of this spec."""
        return has_sources(self.sources, features)


class RidgeSpec(MethodSpec):
    """Averaged ridge regressions, fitted to sums."""

    method: Literal["ridge"] = "ridge"
    """The kind of model."""
    sources: tuple[ProbeSource, ...]
    """What each regression reads."""
    shares: tuple[float, ...]
    """Ensemble weight of each source."""
    penalties: tuple[float, ...]
    """Penalty of each source, of the lowest held-out squared loss."""

    def matches(self, features: FeatureSpec) -> bool:
        """Whether the shape of the model is that of features of this spec."""
        return has_sources(self.sources, features)
