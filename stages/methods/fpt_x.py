"""FPT-X: side networks, attentive probes and linear probes, averaged.

    log p = (1 - a - w) s_1 mean_m log softmax(side network m)
          + a s_2 mean_n log softmax(attentive probe n) + w s_3 log p(linear probes)   up to a constant

a logarithmic opinion pool of experts with ensemble weights a and w and inverse temperatures s from
`stages.methods.calibration`, the linear probes from `stages.methods.statistics`. Untrained side networks predict
uniformly, so that the average starts as the linear probes; all members see the same batches, each with its own
initialisation and dropout.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import cast

import torch
from torch import nn

from schemas.specs import AttentiveSpec, SideNetworkSpec
from stages.losses import plain_loss
from stages.methods.attentive import AttentiveProbe
from stages.methods.batch import Batch
from stages.methods.calibration import fit_shares, inverse_temperatures
from stages.methods.fit_rows import describe_rows
from stages.methods.fpt import PromptedSideNetwork
from stages.methods.joint_attention import TokenNetwork
from stages.methods.statistics import StatisticsProbe
from stages.scores import log_pool_terms


class Ensemble(TokenNetwork):
    """Side networks and attentive probes that read the cached tokens together, and linear probes."""

    spec: SideNetworkSpec
    shares: torch.Tensor
    sharpness: torch.Tensor
    """(kinds,) inverse temperatures; the name in bundles of every version."""
    held_out_losses: torch.Tensor
    """(2,) log-loss of the validation images: linear probes (NaN without them), and the average."""

    def __init__(self, spec: SideNetworkSpec) -> None:
        super().__init__()
        self.spec = spec
        self.networks = nn.ModuleList(PromptedSideNetwork(spec) for _ in range(spec.members))
        self.attentive = nn.ModuleList(AttentiveProbe(_attentive_spec(spec)) for _ in range(spec.attentive))
        if spec.probe_weight:
            self.probe = StatisticsProbe(spec.sources, spec.classes, spec.task)
        self.register_buffer("shares", torch.tensor(list(spec.experts.values())))
        self.register_buffer("sharpness", torch.ones(len(self.shares)))
        self.register_buffer("held_out_losses", torch.full((2,), torch.nan))

    @property
    def saved_spec(self) -> SideNetworkSpec:
        """Spec of the bundle: with the fitted ensemble weights."""
        if not self.spec.fits_shares:
            return self.spec
        # What float32 adds to two decimals is no part of a weight.
        return self.spec.model_copy(update={"shares": tuple(round(share, 4) for share in self.shares.tolist())})

    @property
    def members(self) -> Sequence[PromptedSideNetwork | AttentiveProbe]:
        """Side networks, each with its prompts, then the attentive probes."""
        return (*self.networks, *self.attentive)

    @property
    def kinds(self) -> int:  # type: ignore[override]
        """Number of experts: side networks, attentive probes and linear probes, as far as the spec has them."""
        return len(self.shares)

    def forward(self, batch: Batch) -> torch.Tensor:
        """Compute log-probabilities up to a constant (B, classes) of a prepared batch."""
        probe_logits = None if self.probe is None else self.probe(describe_rows(batch))
        return self.join(self.member_logits(self.members, batch), probe_logits)

    def join(self, logits: torch.Tensor, probe_logits: torch.Tensor | None = None) -> torch.Tensor:
        """Average (M, B, classes) of `member_logits` and (B, classes) of the linear probes to (B, classes)."""
        return self._pool(self.experts(logits, probe_logits))

    def experts(self, logits: torch.Tensor, probe_logits: torch.Tensor | None = None) -> torch.Tensor:
        """Return what the average is made of: as for `join` -> (B, kinds, classes)."""
        logs = log_pool_terms(logits, self.spec.task)
        kinds = (logs[: self.spec.members], logs[self.spec.members :])
        terms = [kind.mean(dim=0) for kind in kinds if len(kind)]
        if self.probe is not None:
            if probe_logits is None:
                raise ValueError("the logits of the linear probes are missing")
            terms.append(log_pool_terms(probe_logits, self.spec.task))
        return torch.stack(terms, dim=1)

    def calibrate(
        self, experts: torch.Tensor, labels: torch.Tensor, class_weights: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Fit the inverse temperature and the ensemble weight of each expert on validation images.

        Args:
            experts: (n, kinds, classes), on the CPU.
            labels: (n,).
            class_weights: Weights of the loss.

        Returns:
            The weighted average (n, classes).
        """
        task = self.spec.task
        self.sharpness.copy_(inverse_temperatures(experts, labels, task, class_weights))
        scaled = experts * self.sharpness.to(experts.device)[:, None]
        if self.spec.fits_shares:
            self.shares.copy_(fit_shares(scaled, labels, list(self.spec.experts.values()), task, class_weights))
        averaged = self._pool(experts)
        if len(labels):
            weights = None if class_weights is None else class_weights.cpu()
            compared = [averaged if self.probe is None else scaled[:, -1], averaged]
            self.held_out_losses.copy_(torch.stack([plain_loss(one, labels, task, weights) for one in compared]))
        return averaged

    def chosen(self) -> Mapping[str, float]:
        """Return the ensemble weights, and the held-out loss with and without the networks."""
        shares = zip(self.spec.experts, self.shares.tolist(), strict=True)
        found = {f"weight of {name}": round(share, 3) for name, share in shares}
        if self.probe is not None:
            only, averaged = self.held_out_losses.tolist()
            found |= {"loss of the linear probes": round(only, 4), "loss of the ensemble": round(averaged, 4)}
        return found

    def _pool(self, experts: torch.Tensor) -> torch.Tensor:
        weights = (self.shares * self.sharpness).to(experts.device)
        return (experts * weights[:, None]).sum(dim=1)

    def reseed(self, *entropy: int) -> None:
        """Draw dropout from here on as these numbers determine, each member in its own way."""
        for position, member in enumerate(self.members):
            member.reseed(*entropy, position)

    def compiled_blocks(self) -> Iterator[nn.Module]:
        """Yield the side blocks of every member."""
        for network in self.networks:
            yield from cast("PromptedSideNetwork", network).compiled_blocks()

    def set_micro_batch(self, rows: slice | None, batch_rows: int, again: bool) -> None:
        """Draw the dropout of the complete batch in every side network, and use that of some rows."""
        for network in self.networks:
            cast("PromptedSideNetwork", network).set_micro_batch(rows, batch_rows, again)


def _attentive_spec(spec: SideNetworkSpec) -> AttentiveSpec:
    return AttentiveSpec(
        classes=spec.classes,
        layers=spec.layers,
        lpm_width=spec.lpm_width,
        heads=spec.heads,
        queries=spec.prompts,
        task=spec.task,
    )
