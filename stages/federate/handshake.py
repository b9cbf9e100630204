"""Before the first round: which sites take part, and whether they would train the same model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from schemas.errors import SettingsError, TrainingError
from schemas.features import FeatureSpec
from schemas.federated import SiteSummary
from schemas.resolved import ResolvedSettings
from schemas.text import counted
from stages.federate.messages import Exchange, Failure, Reply, Request, Values
from stages.federate.site import method_key
from stages.train.targets import balanced_weights


@dataclass(frozen=True)
class Members:
    """The sites that take part."""

    settings: ResolvedSettings
    """Settings of the study, with class weights as a list or none."""
    sites: tuple[SiteSummary, ...]
    """Sites with training images, by name."""
    left_out: Mapping[str, str]
    """Other sites -> why they take no part."""
    features: FeatureSpec
    """Features of all sites."""
    constants: str
    """Digest of what every site draws from the seed; empty for closed forms."""

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the sites."""
        return tuple(site.name for site in self.sites)


def recipe(settings: ResolvedSettings) -> Values:
    """Return the values of a request with the recipe."""
    return {"train": settings.train.model_dump_json()}


def handshake(settings: ResolvedSettings, classes: Sequence[str], names: Sequence[str], exchange: Exchange) -> Members:
    """Request counts and settings of all sites, and compare what has to be equal.

    Args:
        settings: Settings of the study.
        classes: Classes in the order of the outputs.
        names: All sites.
        exchange: Carries requests.

    Raises:
        SettingsError: If sites differ in classes, method or features.
        TrainingError: If no site has training images, or a class has none anywhere.
    """
    replies = exchange(names, Request("describe", values=recipe(settings)))
    left_out = {name: reply.reason for name, reply in sorted(replies.items()) if isinstance(reply, Failure)}
    described = {name: reply for name, reply in sorted(replies.items()) if isinstance(reply, Reply)}
    left_out |= {name: "no training images" for name, reply in described.items() if not reply.values["train"]}
    present = {name: reply for name, reply in described.items() if name not in left_out}
    if not present:
        raise TrainingError(
            "No site has training images.",
            "\n".join(f"  {name}: {reason}" for name, reason in left_out.items()),
            "Check the sites, then run the same command again.",
        )
    first = next(iter(present.values()))
    _require_equal(settings, classes, first, present)
    sites = tuple(_summary(name, reply) for name, reply in present.items())
    return Members(
        settings=_with_weights(settings, classes, sites),
        sites=sites,
        left_out=left_out,
        features=FeatureSpec.model_validate_json(str(first.values["features"])),
        constants=str(first.values["constants"]),
    )


def _require_equal(
    settings: ResolvedSettings, classes: Sequence[str], first: Reply, present: Mapping[str, Reply]
) -> None:
    expected = {
        "classes": json.dumps(tuple(classes)),
        "method": method_key(settings),
        "features": first.values["features"],
        "constants": first.values["constants"],
    }
    titles = {
        "classes": "its classes or their order differ",
        "method": "its method or the settings of the method differ",
        "features": "its features differ: LPM, weights, preprocessing or layers",
        "constants": "its random numbers differ: another version of torch",
    }
    problems = [
        (name, titles[field])
        for name, reply in present.items()
        for field, value in expected.items()
        if reply.values[field] != value
    ]
    if problems:
        raise SettingsError(
            f"{counted(len({name for name, _ in problems}), 'site')} would not train the same model.",
            problems,
            "Use the same params.yaml, LPM weights and versions everywhere, and list data.classes.",
        )


def _summary(name: str, reply: Reply) -> SiteSummary:
    values = reply.values
    return SiteSummary(
        name=name, train=int(values["train"]), val=int(values["val"]), counts=tuple(json.loads(str(values["counts"])))
    )


def _with_weights(settings: ResolvedSettings, classes: Sequence[str], sites: Sequence[SiteSummary]) -> ResolvedSettings:
    """Replace balanced class weights by a list, from the images of all sites.

    Raises:
        TrainingError: If a class has no training images at any site.
    """
    counts = np.sum([site.counts for site in sites], axis=0).astype(np.int64)
    if absent := [name for name, count in zip(classes, counts.tolist(), strict=True) if not count]:
        raise TrainingError(
            f"No training image of any site has the label {', '.join(absent)}.",
            "The split left the class out, or the site that has it did not answer.",
            "Change the shares or data.seed, then run `fpt prepare`.",
        )
    if settings.train.class_weights != "balanced":
        return settings
    rows = sum(site.train for site in sites)
    weights = tuple(balanced_weights(counts, rows, settings.data.task).tolist())
    return settings.model_copy(update={"train": settings.train.model_copy(update={"class_weights": weights})})
