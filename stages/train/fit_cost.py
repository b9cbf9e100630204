"""Cost of a fit in closed form, from shapes: coefficients, the matrix that is read, what the bundle holds."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import nn

from schemas.cost import FitCost
from schemas.features import FeatureSpec
from schemas.manifest import Manifest
from schemas.methods import METHODS
from schemas.resolved import ResolvedSettings
from schemas.specs import Inputs
from schemas.views import ViewSettings, train_views
from stages.methods.base import FitShape, Network, closed_form_method, learnable_parameters


class FitCounts(NamedTuple):
    """Rows that closed forms read."""

    train: int
    """Training images, every view a row."""
    val: int
    """Validation images."""


def count_rows(manifest: Manifest, views: ViewSettings) -> FitCounts:
    """Count the rows that closed forms read of a study."""
    train = sum(len(rows) for rows in train_views(manifest, views))
    return FitCounts(train, sum(1 for _ in manifest.of("val")))


def closed_form_cost(
    settings: ResolvedSettings, features: FeatureSpec, classes: int, counts: FitCounts | None
) -> FitCost:
    """Compute the cost of a method that is fitted in closed form.

    Args:
        settings: Resolved settings.
        features: What it reads.
        classes: Outputs.
        counts: Rows of the study; None: not known.
    """
    method = closed_form_method(settings.method)
    shape = fit_shape(settings, features, classes, 0 if counts is None else counts.train)
    with torch.device("meta"):
        model = method.build(method.spec(shape))
    return _cost(model, learnable_parameters(model), shape.width, counts)


def probe_cost(
    network: Network, settings: ResolvedSettings, features: FeatureSpec, counts: FitCounts | None
) -> FitCost | None:
    """Compute the cost of the linear probes of a network; None if it has none."""
    probe, row = network.probe, METHODS[settings.method]
    if probe is None or row.probe_inputs is None:
        return None
    width = _width(row.probe_inputs(settings), features)
    return _cost(probe, probe.weight.numel() + probe.bias.numel(), width, counts)


def size_mib(tensors: Iterable[torch.Tensor]) -> float:
    """Return the size of tensors, MiB."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors) / 2**20


def _cost(module: nn.Module, coefficients: int, width: int, counts: FitCounts | None) -> FitCost:
    rows = None if counts is None else counts.train + counts.val
    return FitCost(
        coefficients=coefficients,
        width=width,
        rows=rows,
        read_mib=None if rows is None else 4 * rows * width / 2**20,
        kept_mib=None if rows is None else size_mib(module.state_dict().values()),
    )


def fit_shape(settings: ResolvedSettings, features: FeatureSpec, classes: int, rows: int) -> FitShape:
    """Return the shape of the fit of a closed form to a number of rows."""
    row = METHODS[settings.method]
    return FitShape(
        method=settings.method,
        task=settings.data.task,
        classes=classes,
        width=_width(row.inputs, features),
        rows=rows,
        sources=row.preset.probe_sources(features, "pooled" in row.inputs),
    )


def _width(inputs: Inputs, features: FeatureSpec) -> int:
    """Return the numbers of a row of `describe_rows` with these inputs."""
    pooled = 2 * features.lpm.width if "pooled" in inputs else 0
    return pooled + (features.segments[-1].stop if "statistics" in inputs else 0)
