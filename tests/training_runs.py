"""Tiny runs of the training loop on random cached tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from quantised import spec as feature_spec

from schemas.parse import parse_settings
from schemas.specs import SideNetworkSpec
from stages.methods.base import Network, build_model
from stages.methods.batch import Batch
from stages.methods.cached_tokens import CachedTokens
from stages.train.checkpoints import Fit
from stages.train.loop import Recipe, Run, make_optimizer, training_step

SHAPE = {"classes": 3, "layers": 3, "lpm_width": 32, "heads": 2, "width": 8, "image_size": 32, "prompts": 4}
WEIGHTS = torch.tensor([0.2, 1.0, 5.0])
ALL = {"fpt": 1, "fpt+": 1, "fpt-x": 2, "side": 1}


def batch(size: int = 8, seed: int = 0) -> Batch:
    g = torch.Generator().manual_seed(seed)
    cached = CachedTokens(*(torch.randn(size, 3, 2, 7, 16, generator=g) for _ in range(2)))
    images = torch.randint(0, 256, (size, 3, 32, 32), generator=g, dtype=torch.uint8)
    return Batch(torch.randint(0, 3, (size,), generator=g), side=images, tokens=cached)


def a_run(method: str, weights: torch.Tensor | None = None, device: str = "cpu", **train: Any) -> Run:
    """A run whose every parameter is far from its initial value, at the start of an epoch."""
    spec = {**SHAPE, "method": method, "dropout": 0.5, "members": ALL[method], "probe_weight": 0.0}
    torch.manual_seed(0)
    network = build_model(SideNetworkSpec.model_validate(spec))
    assert isinstance(network, Network)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(std=0.3)
    settings = parse_settings({"train": {"batch_size": 8, "clip_norm": 0.5, **train}}).train
    recipe = Recipe(settings, feature_spec("float32"), weights, torch.device(device), 0)
    network.to(device).train().reseed(0, 1)
    return Run(Fit(network, make_optimizer(network, settings)), recipe, Path(), lambda _: None)


def steps(run: Run, sizes: tuple[int, ...] = (8, 8, 5)) -> list[float]:
    return [float(training_step([run], batch(size, seed))[0]) for seed, size in enumerate(sizes)]
