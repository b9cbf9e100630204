"""One row of the registry of methods, and what "auto" means in its settings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from schemas.base import Section
from schemas.specs import Inputs, MethodSpec
from schemas.statistics import ProbeRule, ProbeSource

if TYPE_CHECKING:
    from schemas.features import FeatureSpec
    from schemas.resolved import ResolvedSettings


Problems = list[tuple[str, str]]
"""(dotted path of a setting, what is wrong)."""


@dataclass(frozen=True)
class Preset:
    """What "auto" means in the settings of a method."""

    first_layer: float = 0.5
    """First tapped block as a share of the depth."""
    side_image_size: int = 128
    """Input of the side network, in pixels."""
    members: int = 1
    """Side networks; with `adaptive_members` at most."""
    adaptive_members: bool = False
    """Whether held-out loss decides between one side network and all."""
    attentive: int = 0
    """Attentive probes."""
    probe_weight: float = 0.0
    """Ensemble weight of the linear probes."""
    keep: Literal["best", "late", "last"] = "best"
    """Epoch whose weights are kept."""
    probes: ProbeRule = "all"
    """What linear probes read."""
    least_squares: bool = False
    """Whether a ridge regression is fitted to each source as well."""
    preference: float = 0.25
    """Weight per held-out image of a difference in log-loss between two linear probes; 1 would be the ratio of their
    likelihoods, which trusts the best one too much (docs/lab-notes.md)."""
    fits_shares: bool = False
    """Whether validation images fit the ensemble weights; their values here are then the prior."""

    def probe_sources(self, features: FeatureSpec, with_pooled: bool = True) -> tuple[ProbeSource, ...]:
        """Return the linear probes of an ensemble; arguments as in `FeatureSpec.probe_sources`."""
        sources = features.probe_sources(self.probes, with_pooled)
        return (*sources, *(one.by_least_squares for one in sources)) if self.least_squares else sources


@dataclass(frozen=True)
class MethodRow:
    """One row of the registry."""

    name: str
    """As in `method`."""
    title: str
    """For reports and tables."""
    help: str
    """One line."""
    paper: str
    """Source; empty for ours."""
    module: str
    """Module of `package` whose `METHOD` builds or fits it."""
    spec: type[MethodSpec]
    """What its bundles hold."""
    inputs: Inputs
    """What it reads, apart from what its settings add."""
    trained_by: Literal["gradient", "closed form"]
    """gradient: epochs over batches; closed form: one fit to all training rows."""
    summed: bool = False
    """Whether a closed form reads training rows only through sums, which several sites can add up."""
    preset: Preset = field(default=Preset())
    """Values of "auto"."""
    any_layers: bool = False
    """Whether it takes the tapped layers that were extracted, whatever the settings name."""
    adapts_lpm: bool = False
    """Whether it trains weights of the LPM."""
    images_setting: str = ""
    """Setting with which it reads images instead of the feature store; empty: none."""
    package: str = "stages.methods"
    """Package of the module; empty: `module` is a complete name, that of a plugin."""
    section: str = ""
    """Section of `methods` with its own settings; empty: that of its name, if there is one."""
    options: type[Section] | None = None
    """Its own settings; None: none, or read by itself."""
    rates: tuple[float, ...] = (2e-4, 5e-4, 1e-3, 2e-3)
    """Learning rates among which `fpt bench` chooses by the validation images."""
    resolve: Callable[[Any, int, int | None], tuple[Any, Problems]] | None = None
    """Replaces "auto" in its own settings, from them, the depth of the LPM and `features.hidden`."""
    added_inputs: Callable[[ResolvedSettings], Inputs] | None = None
    """What it reads apart from `inputs` under given settings; None: nothing."""
    probe_inputs: Callable[[ResolvedSettings], Inputs] | None = None
    """What only its linear probes read, which are fitted before the first epoch; None: nothing."""

    @property
    def settings_section(self) -> str:
        """Name of the section of `methods` with its own settings."""
        return self.section or self.name.replace("-", "_")

    @property
    def closed_form(self) -> bool:
        """Whether it has neither epochs, nor a learning rate, nor a seed."""
        return self.trained_by == "closed form"

    @property
    def has_side_network(self) -> bool:
        """Whether it trains side networks, which the settings of `train` describe."""
        return "side" in self.inputs

    def trains_on(self, settings: ResolvedSettings) -> Inputs:
        """Return what every training step reads under these settings."""
        return self.inputs | (self.added_inputs(settings) if self.added_inputs is not None else frozenset())

    def reads(self, settings: ResolvedSettings) -> Inputs:
        """Return what it reads under these settings."""
        probed = frozenset() if self.probe_inputs is None else self.probe_inputs(settings)
        return self.trains_on(settings) | probed
