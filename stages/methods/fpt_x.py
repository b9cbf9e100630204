"""FPT-X: side networks, attentive probes and linear probes, averaged.

    log p = (1 - a - w) s_1 mean_m log softmax(side network m)
          + a s_2 mean_n log softmax(attentive probe n) + w s_3 log p(linear probes)   up to a constant

a logarithmic opinion pool of experts with ensemble weights a and w and inverse temperatures s from
`stages.methods.calibration` (s_3 is 1 but in fpt-x-kept), the linear probes from `stages.methods.statistics`. Untrained
side networks predict uniformly, so that the average starts as the linear probes; all members see the same batches, each
with its own initialisation and dropout.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import cast

import torch
from torch import nn

from schemas.methods import METHODS
from schemas.specs import AttentiveSpec, HeldOut, MethodSpec, SideNetworkSpec
from schemas.text import counted
from stages.methods.attentive import AttentiveProbe
from stages.methods.batch import Batch
from stages.methods.calibration import FIRST_PRIOR, PRIOR, fit_shares, inverse_temperatures
from stages.methods.fit_rows import describe_rows
from stages.methods.fpt import PromptedSideNetwork
from stages.methods.held_out_gain import group_folds, paired_losses
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
    """(3,) of `paired_losses` of the validation images without and with the networks; NaN without linear probes."""

    def __init__(self, spec: SideNetworkSpec) -> None:
        super().__init__()
        self.spec = spec
        self.networks = nn.ModuleList(PromptedSideNetwork(spec) for _ in range(spec.members))
        self.attentive = nn.ModuleList(AttentiveProbe(_attentive_spec(spec)) for _ in range(spec.attentive))
        if spec.probe_weight:
            self.probe = StatisticsProbe(spec.sources, spec.classes, spec.task)
        self.register_buffer("shares", torch.tensor(list(spec.experts.values())))
        self.register_buffer("sharpness", torch.ones(len(self.shares)))
        self.register_buffer("held_out_losses", torch.full((3,), torch.nan))

    @property
    def saved_spec(self) -> SideNetworkSpec:
        """Spec of the bundle: with the fitted ensemble weights, and what the networks add."""
        # What float32 adds to two decimals is no part of a weight.
        shares = tuple(round(share, 4) for share in self.shares.tolist()) if self.spec.fits_shares else ()
        return self.spec.model_copy(update={"shares": shares, "held_out": self.held_out})

    @property
    def held_out(self) -> HeldOut | None:
        """What the members add to the linear probes, as of the last calibration; None without linear probes."""
        probes, ensemble, error = (round(value, 6) for value in self.held_out_losses.tolist())
        if math.isnan(probes):
            return None
        return HeldOut(linear_probes=probes, ensemble=ensemble, standard_error=None if math.isnan(error) else error)

    @property
    def members(self) -> Sequence[PromptedSideNetwork | AttentiveProbe]:
        """Side networks, each with its prompts, then the attentive probes."""
        return (*self.networks, *self.attentive)

    @property
    def kinds(self) -> int:  # type: ignore[override]
        """Number of experts: side networks, attentive probes and linear probes, as far as the spec has them."""
        return len(self.shares)

    def continued(self, saved: MethodSpec, names: Iterable[str]) -> Sequence[str]:
        """Leave out members that the saved model does not have: they start from new weights."""
        saved = cast("SideNetworkSpec", saved)
        counts = {"networks": saved.members, "attentive": saved.attentive}
        return [name for name in names if int(name.split(".")[1]) < counts[name.split(".")[0]]]

    def forward(self, batch: Batch) -> torch.Tensor:
        """Compute log-probabilities up to a constant (B, classes) of a prepared batch."""
        probe_logits = None if self.probe is None else self.probe(describe_rows(batch))
        return self.join(self.member_logits(self.members, batch), probe_logits)

    def head_inputs(self, batch: Batch) -> torch.Tensor:
        """Return what the heads of all members read, then what the linear probes read, (B, F), of a prepared batch."""
        vectors, rows = super().head_inputs(batch), self.probe_inputs(batch)
        return vectors if rows is None else torch.cat([vectors, rows], dim=1)

    def head_logits(self, vectors: torch.Tensor) -> torch.Tensor:
        """Return log-probabilities up to a constant (B, classes) from `head_inputs`."""
        width = sum(member.head_width for member in self.members)
        probe_logits = None if self.probe is None else self.probe(vectors[:, width:])
        return self.join(self.split_logits(vectors[:, :width]), probe_logits)

    def probe_inputs(self, batch: Batch) -> torch.Tensor | None:
        """Return what the linear probes read, (B, F), of a prepared batch; None without probes."""
        return None if self.probe is None else describe_rows(batch)

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
        self,
        experts: torch.Tensor,
        labels: torch.Tensor,
        class_weights: torch.Tensor | None = None,
        groups: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Fit the inverse temperature and the ensemble weight of each expert on validation images.

        Args:
            experts: (n, kinds, classes), on the CPU.
            labels: (n,).
            class_weights: Weights of the loss.
            groups: Numbers of the patients (n,), for the comparison with the linear probes; None: one per image.

        Returns:
            The weighted average (n, classes).
        """
        weights = None if class_weights is None else class_weights.cpu()
        for fitted, buffer in zip(self._fitted(experts, labels, weights), (self.sharpness, self.shares), strict=True):
            buffer.copy_(fitted)
        if self.probe is not None and len(labels):
            patients = torch.arange(len(labels)) if groups is None else groups
            self.held_out_losses.copy_(self._compared(experts, labels, weights, patients))
        return self._pool(experts)

    def _fitted(
        self, experts: torch.Tensor, labels: torch.Tensor, class_weights: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return inverse temperatures and ensemble weights, (kinds,) each."""
        task, prior = self.spec.task, list(self.spec.experts.values())
        deviation = PRIOR if self.spec.fits_shares else FIRST_PRIOR
        sharpness = inverse_temperatures(experts, labels, task, class_weights, deviation)
        if not self.spec.fits_shares:
            return sharpness, torch.tensor(prior)
        if self.probe is not None:
            # Their penalties and weights were chosen by log-loss on all held-out images: a few dozen of them add noise.
            sharpness[-1] = 1.0
        return sharpness, fit_shares(experts * sharpness[:, None], labels, prior, task, class_weights)

    def _compared(
        self, experts: torch.Tensor, labels: torch.Tensor, class_weights: torch.Tensor | None, groups: torch.Tensor
    ) -> torch.Tensor:
        """Return `paired_losses` of predictions that are calibrated in folds, (3,)."""
        probes, averaged = torch.empty_like(experts[:, 0]), torch.empty_like(experts[:, 0])
        for fold in group_folds(groups):
            sharpness, shares = self._fitted(experts[~fold], labels[~fold], class_weights)
            probes[fold] = experts[fold, -1] * sharpness[-1]
            averaged[fold] = (experts[fold] * (sharpness * shares)[:, None]).sum(dim=1)
        return paired_losses(probes, averaged, labels, groups, self.spec.task, class_weights)

    def chosen(self) -> Mapping[str, float]:
        """Return the ensemble weights, and the held-out loss with and without the networks."""
        shares = zip(self.spec.experts, self.shares.tolist(), strict=True)
        found = {f"weight of {name}": round(share, 3) for name, share in shares}
        if (held_out := self.held_out) is not None:
            found |= {
                "loss of the linear probes": round(held_out.linear_probes, 4),
                "loss of the ensemble": round(held_out.ensemble, 4),
            }
        return found

    def conclusion(self) -> str:
        """Return sentences on what the networks add to the linear probes; empty without linear probes."""
        return conclusion(self.saved_spec)

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


def conclusion(spec: SideNetworkSpec) -> str:
    """Return how many side networks were trained and why, and what they add; empty if the spec does not record it."""
    held_out = spec.held_out
    if held_out is None:
        return ""
    reason, error = "", held_out.standard_error
    if spec.most_members:
        because = "" if spec.members == 1 else ", because the first one helped or may help"
        reason = f" of at most {spec.most_members}{because}"
    sentence = (
        f"{counted(spec.members, 'side network')}{reason}: held-out log-loss {held_out.linear_probes:.4f} by the "
        f"linear probes only, {held_out.ensemble:.4f} by the ensemble; gain {held_out.gain:.4f}, standard error "
        f"{'unknown' if error is None else f'{error:.4f}'}."
    )
    if held_out.helps or METHODS[spec.method].preset.probes != "all":
        return sentence
    if held_out.undecided:
        return f"{sentence} Too few validation images to tell whether networks help; `--method statistics` has none."
    return f"{sentence} No clear gain: `--method statistics` gives the same without training."


def _attentive_spec(spec: SideNetworkSpec) -> AttentiveSpec:
    return AttentiveSpec(
        classes=spec.classes,
        layers=spec.layers,
        lpm_width=spec.lpm_width,
        heads=spec.heads,
        queries=spec.prompts,
        task=spec.task,
    )
