"""From a spec to the model around whose weights it was written. All are called as model(image, cached, pooled)."""

from __future__ import annotations

from schemas.results import AttentiveSpec, KnnSpec, LinearSpec, ModelSpec, SideNetworkSpec, StatisticsSpec
from stages.methods.attentive import AttentiveProbe
from stages.methods.fpt import Ensemble, PromptedSideNetwork, build_network
from stages.methods.probes import KnnProbe, LinearModel
from stages.methods.statistics import StatisticsModel

Network = PromptedSideNetwork | Ensemble | AttentiveProbe
"""What the training loop trains: each has `members`, and `member_logits` that they learn from."""

Model = Network | StatisticsModel | LinearModel | KnnProbe
"""Whatever can be judged and predicts."""


def build_model(spec: ModelSpec) -> Model:
    """A model of this spec, its weights not yet those of anything trained."""
    if isinstance(spec, StatisticsSpec):
        return StatisticsModel(spec)
    if isinstance(spec, LinearSpec):
        return LinearModel(spec)
    if isinstance(spec, KnnSpec):
        return KnnProbe(spec)
    return build_learner(spec)


def build_learner(spec: SideNetworkSpec | AttentiveSpec) -> Network:
    """What the training loop trains, with random weights."""
    return AttentiveProbe(spec) if isinstance(spec, AttentiveSpec) else build_network(spec)
