"""Forward-only adaptation (FOA, Niu et al. 2024, arXiv 2404.01650): prompts by CMA-ES, and a shift of activations.

For each batch of B images, 27 candidates drawn by CMA-ES and the best one of the batch before are run forward, and

    v = sum_x H(softmax(head(f_x))) + 0.4 (B / 64) sum_l ( |mean_B e_l - mu_l|^2 + |std_B e_l - sigma_l|^2 )

is the fitness of each: e_l is the class token after block l and the norm that comes next, mu_l and sigma_l are its mean
and standard deviation over source images, without prompts. The prediction is that of the best candidate, with the
vector f that the head reads shifted by mu - h, where h is the running mean of f over earlier batches and candidates.

This follows the published code where it differs from the paper (squares instead of norms in equation 5). The paper's
variant for single images is not here (UNVERIFIED). Translations: prompts of side networks
(`stages.methods.side_prompts`); heads that read more than the class token, whose complete vector is shifted; with
several labels per image the entropy is the sum over labels. The first best candidate is the mean of the search, prompts
of zeros (UNVERIFIED).
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from schemas.errors import EvaluationError, PlatformError
from schemas.tasks import Task
from schemas.version import DISTRIBUTION
from stages.methods.batch import Batch
from stages.scores import probabilities
from stages.train.source_statistics import Moments

POPULATION = 27
"""Candidates that CMA-ES draws per batch: 4 + floor(3 ln 2304), for three prompts of ViT-B."""
STEP = 1.0
"""Initial step size of CMA-ES."""
WEIGHT = 0.4
"""Weight of the distance of statistics, lambda."""
REFERENCE_BATCH = 64
"""Batch size for which the weight was chosen."""
KEPT = 0.9
"""Share of the running mean that is kept from batch to batch."""


class PromptTarget(Protocol):
    """A model into which candidate prompts are inserted."""

    @property
    def numbers(self) -> int:
        """Numbers of a candidate."""

    def begin(self, batch: Batch, /) -> Any:
        """Compute what all candidates share, from a prepared batch."""

    def run(self, state: Any, candidate: torch.Tensor | None, /) -> tuple[torch.Tensor, torch.Tensor]:
        """Return activations (B, A) and what the head reads (B, F); None: without prompts."""

    def logits(self, vectors: torch.Tensor, /) -> torch.Tensor:
        """Return logits (B, C) of what the head reads."""


def entropies(logits: torch.Tensor, task: Task) -> torch.Tensor:
    """Return the entropy (B,) of the probabilities of each image, float64; multi-label: the sum over labels."""
    p = probabilities(logits, task)
    found = -torch.xlogy(p, p)
    if task == "multilabel":
        found = found - torch.xlogy(1.0 - p, 1.0 - p)
    return found.sum(dim=1)


def fitness(logits: torch.Tensor, activations: torch.Tensor, source: Moments, task: Task = "multiclass") -> float:
    """Compute the fitness of a candidate; lower is better.

    Args:
        logits: (B, C) unshifted.
        activations: (B, A), all e_l side by side; B at least 2.
        source: Mean and standard deviation (A,) over source images.
        task: Meaning of the logits.
    """
    # On the CPU first: some devices have no double precision.
    batch = activations.cpu().double()
    apart = (batch.mean(dim=0) - source.mean.double()).square().sum()
    spread = (batch.std(dim=0) - source.spread.double()).square().sum()
    value = entropies(logits.cpu(), task).sum() + WEIGHT * len(batch) / REFERENCE_BATCH * (apart + spread)
    return float(value)


class ActivationShift:
    """Shift of what the head reads towards its mean over source images."""

    def __init__(self, source: Moments) -> None:
        """Begin without any batch.

        Args:
            source: Of the vectors, (F,).
        """
        self._target = source.mean.double()
        self._running: torch.Tensor | None = None

    def shifted(self, vectors: torch.Tensor) -> torch.Tensor:
        """Return vectors (B, F) plus mu - h, h from the batches before; the first batch is not shifted."""
        if self._running is None:
            return vectors
        return vectors + (self._target - self._running).float().to(vectors)

    def update(self, mean: torch.Tensor) -> None:
        """Take the mean (F,) of a batch into the running mean, which starts as that of the first batch."""
        mean = mean.cpu().double()
        self._running = mean if self._running is None else KEPT * self._running + (1.0 - KEPT) * mean


class Foa:
    """Search of prompts over a stream of batches."""

    def __init__(
        self, target: PromptTarget, vectors: Moments, activations: Moments, seed: int, task: Task = "multiclass"
    ) -> None:
        """Begin the search at prompts of zeros.

        Args:
            target: Model.
            vectors: Statistics of what its head reads, over source images.
            activations: Statistics of its class tokens, over source images.
            seed: Seed of the candidates.
            task: Task of the model.

        Raises:
            PlatformError: `cma` is not installed.
        """
        self._target, self._source, self._task = target, activations, task
        self._shift = ActivationShift(vectors)
        self._search = _search(target.numbers, seed)
        self._best: npt.NDArray[np.float64] = np.zeros(target.numbers)

    @torch.inference_mode()
    def step(self, batch: Batch) -> torch.Tensor:
        """Return adapted logits (B, C) of a prepared batch of at least two images, and go on with the search.

        Raises:
            EvaluationError: No candidate has a finite fitness.
        """
        state = self._target.begin(batch)
        candidates = [*self._search.ask(), self._best]
        values: list[float] = []
        mean: torch.Tensor | None = None
        chosen: torch.Tensor | None = None
        for candidate in candidates:
            tensor = torch.from_numpy(np.asarray(candidate, np.float32)).to(batch.labels.device)
            activations, vectors = self._target.run(state, tensor)
            value = fitness(self._target.logits(vectors), activations, self._source, self._task)
            if np.isfinite(value) and value < min(values, default=np.inf):
                chosen = vectors
                self._best = np.asarray(candidate, np.float64)
            values.append(value if np.isfinite(value) else np.inf)
            own = vectors.cpu().double().mean(dim=0) / len(candidates)
            mean = own if mean is None else mean + own
        if chosen is None or mean is None:
            raise EvaluationError(
                "The outputs of the model are not finite with any candidate prompt.",
                "Its weights are damaged, or training diverged.",
                "Train again, with a lower rate: fpt train --set train.lr=1e-4",
            )
        self._search.tell(candidates, values)
        logits = self._target.logits(self._shift.shifted(chosen))
        self._shift.update(mean)
        return logits


def _search(numbers: int, seed: int) -> Any:
    """Return a search by CMA-ES with random numbers of its own: several searches in a process do not mix."""
    try:
        import cma
    except ImportError as error:
        raise PlatformError(
            "Adaptation by foa needs the package cma, which is not installed.",
            "It is an optional dependency; foa-shift and vptta do not need it.",
            f"Run `pip install cma`, or install fpt with its extra: `pip install '{DISTRIBUTION}[adapt]'`.",
        ) from error
    generator = np.random.default_rng(seed)
    options = {
        "popsize": POPULATION,
        "seed": np.nan,
        "randn": lambda *shape: generator.standard_normal(shape),
        "verbose": -9,
    }
    return cma.CMAEvolutionStrategy(np.zeros(numbers), STEP, options)
