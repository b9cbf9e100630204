"""Bytes that a site sends per exchange, for every method that can be federated, from shapes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from schemas.errors import PlatformError, SettingsError
from schemas.features import LpmInfo
from schemas.federated import Traffic
from schemas.methods import METHODS
from schemas.resolve import feature_spec, resolve
from schemas.resolved import ResolvedSettings
from schemas.settings import Settings
from stages.federate.weights import travelling
from stages.methods.base import gradient_method, learnable_parameters
from stages.methods.summed import summed_method
from stages.train.fit_cost import fit_shape

FLOAT32, FLOAT64 = 4, 8
"""Bytes of a number."""
VARIANTS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("finetune", {"blocks": "all"}),
    ("lora", {"freeze_a": True}),
    ("dora", {"freeze_a": True}),
    ("decomposed-prompts", {"freeze_u": True}),
)
"""Methods with other settings than the defaults."""


def traffic_table(settings: Settings, lpm: LpmInfo, classes: int) -> list[Traffic]:
    """Return a row per method, and per variant of `VARIANTS`, the largest first.

    Args:
        settings: Settings of the study; the method is replaced.
        lpm: Shape of its LPM.
        classes: Outputs.
    """
    found: list[Traffic] = []
    for name, options in (*((name, {}) for name in METHODS), *VARIANTS):
        try:
            resolved = resolve(_changed(settings, name, options), lpm)
            found.extend(traffic_of(resolved, lpm, classes, options))
        except (SettingsError, PlatformError):
            # It needs other features than those of the study, or a package that is not installed.
            continue
    return sorted(found, key=lambda one: (-one.bytes, one.title))


def _changed(settings: Settings, method: str, options: dict[str, Any]) -> Settings:
    """Return the settings of another method, with some of its own settings changed."""
    if not options:
        return settings.model_copy(update={"method": method})
    name = METHODS[method].settings_section
    section = getattr(settings.methods, name).model_copy(update=options)
    return settings.model_copy(
        update={"method": method, "methods": settings.methods.model_copy(update={name: section})}
    )


def traffic_of(settings: ResolvedSettings, lpm: LpmInfo, classes: int, options: Mapping[str, Any]) -> Iterator[Traffic]:
    """Yield the row of resolved settings, unless the method cannot be federated."""
    row, features = METHODS[settings.method], feature_spec(settings, lpm, "0" * 64)
    title = ", ".join([row.title, *(f"{name}: {str(value).lower()}" for name, value in options.items())])
    if row.summed:
        method = summed_method(settings.method)
        shape = fit_shape(settings, features, classes, rows=0)
        numbers = sum(torch.Size(size).numel() for size in method.sums_size(shape).values())
        learnable = learnable_parameters(method.build(method.spec(shape)))
        yield Traffic(method=row.name, title=title, learnable=learnable, bytes=FLOAT64 * numbers, exchanges="once")
        return
    if row.closed_form:
        return
    with torch.device("meta"):
        builder = gradient_method(settings.method)
        network = builder.build(builder.spec(settings, lpm, classes))
    if network.probe is not None or network.standardises:
        return
    state = network.state_dict()
    numbers = sum(state[name].numel() for name in travelling(network))
    yield Traffic(
        method=row.name,
        title=title,
        learnable=learnable_parameters(network),
        bytes=FLOAT32 * numbers,
        exchanges="each round",
    )
