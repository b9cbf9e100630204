"""From a spec to the model around whose weights it was written. All are called as model(image, cached, pooled)."""

from __future__ import annotations

from torch import nn

from schemas.results import AttentiveSpec, KnnSpec, LinearSpec, ModelSpec
from stages.train.attentive import AttentiveProbe
from stages.train.network import PromptedSideNetwork
from stages.train.probes import KnnProbe, LinearProbe


def build_model(spec: ModelSpec) -> nn.Module:
    """A model of this spec, its weights not yet those of anything trained."""
    if isinstance(spec, LinearSpec):
        return LinearProbe(spec)
    if isinstance(spec, KnnSpec):
        return KnnProbe(spec)
    if isinstance(spec, AttentiveSpec):
        return AttentiveProbe(spec)
    return PromptedSideNetwork(spec)
