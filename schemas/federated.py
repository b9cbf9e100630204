"""Contracts of federated training: the plan, what each round gave, and what travels."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field

from schemas.base import Contract
from schemas.errors import SettingsError
from schemas.methods import Method

LEAST_ALPHA, MOST_ALPHA = 1e-3, 1e6
"""Concentrations of a Dirichlet partition."""

SUMMARY = "summary.json"
"""File with a `FederatedResult`, next to the folder of the model."""


class FederatedPlan(Contract):
    """How often and how long sites train."""

    rounds: Annotated[int, Field(ge=1, le=100_000)]
    """Averages; 1 for a method that is fitted to sums."""
    local_epochs: Annotated[int, Field(ge=1, le=100_000)] = 1
    """Epochs that a site trains between two averages."""
    mu: Annotated[float, Field(ge=0.0, le=1e6)] = 0.0
    """Weight of half the squared distance to the averaged weights in the loss of a site (FedProx); 0: FedAvg."""

    @property
    def epochs(self) -> int:
        """Epochs of a site in all rounds."""
        return self.rounds * self.local_epochs

    def epochs_of(self, number: int) -> tuple[int, int]:
        """Return the first and the last epoch of a round, both from 1."""
        return (number - 1) * self.local_epochs + 1, number * self.local_epochs


class Partition(Contract):
    """How images are dealt to simulated sites."""

    sites: Annotated[int, Field(ge=1, le=1000)]
    """Number of sites."""
    alpha: Annotated[float, Field(ge=LEAST_ALPHA, le=MOST_ALPHA)] | None = None
    """Concentration of the Dirichlet distribution over sites of each class; null: classes are equally mixed (IID)."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Random seed of the draw."""

    @staticmethod
    def parse(sites: int, text: str, seed: int) -> Partition:
        """Parse `iid` or `dirichlet:ALPHA`.

        Raises:
            SettingsError: If it is neither.
        """
        matched = re.fullmatch(r"iid|dirichlet:(\d+(?:\.\d*)?|\.\d+)", text.strip().lower())
        alpha = None if matched is None or matched[1] is None else float(matched[1])
        if matched is None or (alpha is not None and not LEAST_ALPHA <= alpha <= MOST_ALPHA):
            raise SettingsError(
                "The sites cannot be simulated.",
                [("--partition", f"must be iid or dirichlet:ALPHA, such as dirichlet:0.5 (is {text!r})")],
            )
        return Partition(sites=sites, alpha=alpha, seed=seed)


class SiteSummary(Contract):
    """Counts of the images of a site."""

    name: str
    """Name of the site."""
    train: int
    """Training images."""
    val: int
    """Validation images."""
    counts: tuple[int, ...]
    """Training images of each class, in the order of the classes."""


class RoundLog(Contract):
    """One round."""

    number: int
    """From 1."""
    sites: dict[str, int]
    """Site whose weights or sums were used -> its training images."""
    failed: dict[str, str] = Field(default_factory=dict)
    """Site that was left out of this round, or of its validation -> why."""
    val_loss: float | None
    """Log-loss of the averaged model on the validation images of all sites; null where no site has any."""
    val_accuracy: float | None
    """Share of them whose prediction is the label."""
    seconds: float
    """Time of the round."""

    @property
    def weights(self) -> dict[str, float]:
        """Weight of each site in the mean; they sum to 1."""
        total = sum(self.sites.values())
        return {name: count / total for name, count in self.sites.items()}


class FederatedResult(Contract):
    """What federated training hands back."""

    method: Method
    """What was trained."""
    plan: FederatedPlan
    """Rounds and local epochs."""
    sites: tuple[SiteSummary, ...]
    """Sites with training images that answered at the start."""
    left_out: dict[str, str] = Field(default_factory=dict)
    """Site that takes no part in any round -> why."""
    rounds: tuple[RoundLog, ...]
    """All rounds."""
    best: int
    """Round whose model is in the bundle."""
    resumed_from: int = 0
    """How many rounds a checkpoint had already."""
    learnable: int
    """Parameters that are trained or fitted."""
    down_bytes: int
    """Bytes from the server to each site per round."""
    up_bytes: int
    """Bytes from each site to the server per round."""


class Traffic(Contract):
    """What one site sends per exchange with a method."""

    method: Method
    """Name of the method."""
    title: str
    """Method with its settings."""
    learnable: int
    """Parameters that are trained or fitted."""
    bytes: int
    """Bytes from a site to the server per exchange: float32 weights, or float64 sums."""
    exchanges: Literal["each round", "once"]
    """How often."""
