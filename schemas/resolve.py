"""No "auto" survives this step: settings and the shape of the LPM give what will be run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from schemas.errors import SettingsError
from schemas.features import FeatureSpec, LpmInfo
from schemas.resolved import ResolvedFeatures, ResolvedSettings, ResolvedTrain
from schemas.results import AttentiveSpec, SideNetworkSpec
from schemas.settings import Method, Precision, Settings

WITHOUT_SIDE_NETWORK: frozenset[Method] = frozenset({"statistics", "linear", "knn", "attentive"})
"""Methods that read no side image."""

ATTENTIVE_WEIGHT = 0.1
"""Share of attentive probes in the averaged log-probabilities, where there are any."""

SIDE_PATCH = 16
"""Side of the side network's patch, in pixels."""


@dataclass(frozen=True)
class Preset:
    """What "auto" means for a method."""

    first_layer: float
    """First tapped block as a share of the depth."""
    side_image_size: int
    """Input of the side network, in pixels."""
    members: int = 1
    """Side networks."""
    attentive: int = 0
    """Attentive probes."""
    probe_weight: float = 0.0
    """Of the linear probes."""
    keep: Literal["best", "late", "last"] = "best"
    """Which epoch."""


ChoosePrecision = Callable[[ResolvedSettings], Precision]

PRESETS: dict[Method, Preset] = {
    "fpt": Preset(first_layer=0.0, side_image_size=224),
    "fpt+": Preset(first_layer=0.5, side_image_size=128),
    "fpt-x": Preset(first_layer=0.5, side_image_size=128, members=5, attentive=1, probe_weight=0.5, keep="late"),
    "side": Preset(first_layer=0.5, side_image_size=128),
    "statistics": Preset(first_layer=0.5, side_image_size=128),
    "linear": Preset(first_layer=0.5, side_image_size=128),
    "knn": Preset(first_layer=0.5, side_image_size=128),
    "attentive": Preset(first_layer=0.5, side_image_size=128),
}


def resolve(settings: Settings, lpm: LpmInfo, choose_precision: ChoosePrecision | None = None) -> ResolvedSettings:
    """Replace every "auto" and take the image size to the patch grid.

    Args:
        settings: As parsed.
        lpm: Of `settings.lpm.name` at the nearest size that its patch divides.
        choose_precision: Gives what "auto" means, from the settings with float32 in its place: it depends on the
            machine, on which nothing here depends. None: float32.

    Raises:
        SettingsError: Where a value does not fit the LPM; all problems at once.
    """
    preset, features, train = PRESETS[settings.method], settings.features, settings.train
    problems: list[tuple[str, str]] = []
    layers = tuple(range(int(preset.first_layer * lpm.depth), lpm.depth))
    if features.layers != "auto":
        layers = features.layers
        if layers[-1] >= lpm.depth:
            problems.append(("features.layers", f"{lpm.name} has blocks 0 to {lpm.depth - 1} (is {layers[-1]})"))
    if features.hidden is not None and features.hidden >= lpm.depth:
        problems.append(("features.hidden", f"{lpm.name} has blocks 0 to {lpm.depth - 1} (is {features.hidden})"))
    if features.importance == "class_token" and not lpm.has_class_token:
        problems.append(("features.importance", f"{lpm.name} has no class token; use global"))
    if int(features.ratio * lpm.tokens) < 1:
        problems.append(("features.ratio", f"keeps none of the {lpm.tokens} tokens"))
    width, rest = divmod(lpm.width, train.side_reduction)
    if settings.method not in WITHOUT_SIDE_NETWORK and (rest or width % lpm.heads):
        whole = f"{lpm.width} / {train.side_reduction} must be a multiple of the {lpm.heads} heads"
        problems.append(("train.side_reduction", whole))
    pool = _pool(settings, preset, problems)
    if pool["probe_weight"] and not features.pooled:
        problems.append(("features.pooled", "must be true: linear probes read the pooled outputs"))
    named = settings.data.classes or settings.data.label_columns
    if isinstance(train.class_weights, tuple) and named is not None:
        have, need = len(train.class_weights), len(named)
        if have != need:
            problems.append(("train.class_weights", f"lists {have} weights for {need} classes"))
    if problems:
        raise SettingsError(f"The settings do not fit {lpm.name}.", problems, "Correct params.yaml.")
    side = preset.side_image_size if train.side_image_size == "auto" else train.side_image_size
    stored = stored_side_size(side) if features.side_image_size == "auto" else features.side_image_size
    resolved = ResolvedSettings(
        **{name: getattr(settings, name) for name in type(settings).model_fields if name not in ("features", "train")},
        features=ResolvedFeatures(
            **{
                **features.model_dump(),
                "image_size": lpm.image_size,
                "filter": lpm.interpolation if features.filter == "auto" else features.filter,
                "layers": layers,
                "side_image_size": stored,
                "precision": "float32" if features.precision == "auto" else features.precision,
            }
        ),
        train=ResolvedTrain(
            **{
                **train.model_dump(),
                **pool,
                "side_image_size": side,
                "keep": preset.keep if train.keep == "auto" else train.keep,
                "order_seed": train.seed if train.order_seed == "auto" else train.order_seed,
            }
        ),
    )
    if features.precision != "auto" or choose_precision is None:
        return resolved
    chosen = resolved.features.model_copy(update={"precision": choose_precision(resolved)})
    return resolved.model_copy(update={"features": chosen})


def _pool(settings: Settings, preset: Preset, problems: list[tuple[str, str]]) -> dict[str, float]:
    """What is averaged, and with which shares."""
    if settings.method in WITHOUT_SIDE_NETWORK:
        return {"members": 1, "attentive": 0, "attentive_weight": 0.0, "probe_weight": 0.0}
    train = settings.train
    members = preset.members if train.members == "auto" else train.members
    attentive = preset.attentive if train.attentive == "auto" else train.attentive
    share = ATTENTIVE_WEIGHT if attentive else 0.0
    attentive_weight = share if train.attentive_weight == "auto" else train.attentive_weight
    probe_weight = preset.probe_weight if train.probe_weight == "auto" else train.probe_weight
    if attentive and settings.method == "side":
        problems.append(("train.attentive", "must be 0: side reads no cached tokens"))
    if bool(attentive) != bool(attentive_weight):
        problems.append(("train.attentive_weight", f"is {attentive_weight:g} with {attentive} attentive probes"))
    if attentive_weight + probe_weight >= 1.0:
        problems.append(("train.attentive_weight", "and train.probe_weight leave nothing for the side networks"))
    return {
        "members": members,
        "attentive": attentive,
        "attentive_weight": attentive_weight,
        "probe_weight": probe_weight,
    }


def stored_side_size(side: int) -> int:
    """Side of the stored small image, in pixels: 1/8 more than the network's input, in whole patches.

    A random crop keeps 0.8 of the area, so 0.89 of the side: with this margin it is never enlarged.
    """
    return -(-side * 9 // 8 // SIDE_PATCH) * SIDE_PATCH


def feature_spec(settings: ResolvedSettings, lpm: LpmInfo, weights_sha256: str) -> FeatureSpec:
    """The spec of resolved settings. T = int(ratio * N)."""
    features = settings.features
    return FeatureSpec(
        lpm=lpm,
        weights_sha256=weights_sha256,
        layers=features.layers,
        importance=features.importance,
        kept=int(features.ratio * lpm.tokens),
        dtype=features.dtype,
        pooled=features.pooled,
        precision=features.precision,
        codec=features.codec,
        bitround=features.bitround,
        side_image_size=features.side_image_size,
        resize=features.resize,
        filter=None if features.filter == lpm.interpolation else features.filter,
        normalisation=features.normalisation,
        hidden=features.hidden,
    )


def expected_spec(settings: ResolvedSettings, lpm: LpmInfo, extracted: FeatureSpec) -> FeatureSpec:
    """Return the spec of resolved settings, with what they leave open taken from an extraction.

    These are the digest of the weights file and, with `features.normalisation: dataset`, mean and standard deviation.
    """
    features = settings.features
    shape = extracted.normalised(lpm) if features.normalisation == "dataset" else lpm
    spec = feature_spec(settings, shape, extracted.weights_sha256)
    if features.filter == extracted.resize_filter:
        # If the LPM is described differently now, that is the difference to report, not the filter.
        spec = spec.model_copy(update={"filter": extracted.filter})
    return spec


def network_spec(settings: ResolvedSettings, lpm: LpmInfo, classes: int) -> SideNetworkSpec | AttentiveSpec:
    """The network of resolved settings.

    Raises:
        SettingsError: If the method trains none: it is fitted to all rows at once.
    """
    features, train = settings.features, settings.train
    if settings.method == "statistics" or settings.method == "linear" or settings.method == "knn":
        raise SettingsError(
            f"{settings.method} has no training step: there is nothing to estimate.",
            [("method", "is fitted to all training images at once")],
            "Choose a method that trains a network, such as --method attentive.",
        )
    if settings.method == "attentive":
        return AttentiveSpec(
            classes=classes,
            layers=len(features.layers),
            lpm_width=lpm.width,
            heads=lpm.heads,
            queries=train.prompts,
            task=settings.data.task,
        )
    return SideNetworkSpec(
        method=settings.method,
        classes=classes,
        layers=len(features.layers),
        lpm_width=lpm.width,
        heads=lpm.heads,
        width=lpm.width // train.side_reduction,
        image_size=train.side_image_size,
        prompts=train.prompts,
        dropout=train.dropout,
        members=train.members,
        attentive=train.attentive,
        attentive_weight=train.attentive_weight,
        probe_weight=train.probe_weight,
        task=settings.data.task,
    )


def attentive_spec(spec: SideNetworkSpec) -> AttentiveSpec:
    """The attentive probes that learn beside side networks of this spec."""
    return AttentiveSpec(
        classes=spec.classes,
        layers=spec.layers,
        lpm_width=spec.lpm_width,
        heads=spec.heads,
        queries=spec.prompts,
        task=spec.task,
    )
