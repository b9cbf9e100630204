"""Resolve every "auto" from the settings and the shape of the LPM."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from schemas.errors import SettingsError
from schemas.features import FeatureSpec, LpmInfo
from schemas.method_row import MethodRow, Preset
from schemas.methods import METHODS
from schemas.resolved import ResolvedExtrapolation, ResolvedFeatures, ResolvedSettings, ResolvedTrain
from schemas.settings import FeatureSettings, Precision, Settings, TrainSettings

ATTENTIVE_WEIGHT = 0.1
"""Default ensemble weight of the attentive probes."""

SIDE_PATCH = 16
"""Patch size of the side network, in pixels."""


ChoosePrecision = Callable[[ResolvedSettings], Precision]


def resolve(settings: Settings, lpm: LpmInfo, choose_precision: ChoosePrecision | None = None) -> ResolvedSettings:
    """Replace every "auto", and round the image size to the patch grid.

    Args:
        settings: Parsed settings.
        lpm: Shape of `settings.lpm.name` at the nearest size that is a multiple of its patch.
        choose_precision: Replaces "auto" in `features.precision`, given the settings with float32 in its place. Chosen
            by the caller, because it depends on the hardware. None: float32.

    Raises:
        SettingsError: Values do not fit the LPM; lists all of them.
    """
    row, features, train = METHODS[settings.method], settings.features, settings.train
    preset = row.preset
    layers = tuple(range(int(preset.first_layer * lpm.depth), lpm.depth))
    if features.layers != "auto":
        layers = features.layers
    problems = _misfits(settings, lpm, layers[-1])
    ensemble = _ensemble(settings, row, problems)
    methods = settings.methods
    if row.resolve is not None:
        methods, method_problems = row.resolve(methods, lpm.depth, features.hidden)
        problems += method_problems
    if problems:
        raise SettingsError(f"The settings do not fit {lpm.name}.", problems, "Correct params.yaml.")
    side = preset.side_image_size if train.side_image_size == "auto" else train.side_image_size
    resolved = ResolvedSettings(
        **{
            name: getattr(settings, name)
            for name in type(settings).model_fields
            if name not in ("features", "train", "methods")
        },
        methods=methods,
        features=_features(features, lpm, layers, side),
        train=_train(train, preset, ensemble, features.hidden or 0, side),
    )
    if features.precision != "auto" or choose_precision is None:
        return resolved
    chosen = resolved.features.model_copy(update={"precision": choose_precision(resolved)})
    return resolved.model_copy(update={"features": chosen})


def _features(features: FeatureSettings, lpm: LpmInfo, layers: tuple[int, ...], side: int) -> ResolvedFeatures:
    """Resolve the features of an LPM; `side` is the size of the small image that the method reads, in pixels."""
    stored = stored_side_size(side) if features.side_image_size == "auto" else features.side_image_size
    resolved = {
        "image_size": lpm.image_size,
        "filter": lpm.interpolation if features.filter == "auto" else features.filter,
        "layers": layers,
        "side_image_size": stored,
        "precision": "float32" if features.precision == "auto" else features.precision,
    }
    return ResolvedFeatures(**{**features.model_dump(), **resolved})


def _train(train: TrainSettings, preset: Preset, ensemble: dict[str, Any], hidden: int, side: int) -> ResolvedTrain:
    """Resolve stage two; `hidden` is the block of the cached hidden tokens, 0 without, `side` as for `_features`."""
    extrapolation = {**train.extrapolation.model_dump(), "rate": train.extrapolation.relative_rate}
    resolved = {
        "extrapolation": ResolvedExtrapolation(**extrapolation),
        "side_image_size": side,
        "start_block": hidden if train.start_block == "auto" else train.start_block,
        "keep": preset.keep if train.keep == "auto" else train.keep,
        "order_seed": train.seed if train.order_seed == "auto" else train.order_seed,
    }
    return ResolvedTrain(**{**train.model_dump(), **ensemble, **resolved})


def _misfits(settings: Settings, lpm: LpmInfo, last_layer: int) -> list[tuple[str, str]]:
    """Return (dotted path, reason) of every value that does not fit the LPM or the classes."""
    features, train, problems = settings.features, settings.train, []
    blocks = f"{lpm.name} has blocks 0 to {lpm.depth - 1}"
    if last_layer >= lpm.depth:
        problems.append(("features.layers", f"{blocks} (is {last_layer})"))
    if features.hidden is not None and features.hidden >= lpm.depth:
        problems.append(("features.hidden", f"{blocks} (is {features.hidden})"))
    if train.start_block != "auto" and train.start_block >= lpm.depth:
        problems.append(("train.start_block", f"{blocks} (is {train.start_block})"))
    reads = METHODS[settings.method].inputs
    if lpm.map_widths and not METHODS[settings.method].closed_form:
        closed = ", ".join(row.name for row in METHODS.values() if row.closed_form)
        problems.append(("method", f"must be one of {closed}: {lpm.name} gives feature maps, no tokens"))
    elif "tokens" in reads and not features.tokens:
        problems.append(("features.tokens", f"must be true: {settings.method} reads cached tokens"))
    if "statistics" in reads and not features.statistics:
        problems.append(("features.statistics", f"must be true: {settings.method} reads token statistics"))
    if features.statistics and lpm.mlp_width is None and not lpm.map_widths:
        problems.append(("features.statistics", f"must be false: {lpm.name} has an MLP that is not supported"))
    if not (features.tokens or features.statistics or features.pooled):
        problems.append(("features.tokens", "must be true without features.statistics and features.pooled"))
    if features.importance == "class_token" and not lpm.has_class_token:
        problems.append(("features.importance", f"{lpm.name} has no class token; use global"))
    if features.tokens and int(features.ratio * lpm.tokens) < 1:
        problems.append(("features.ratio", f"keeps none of the {lpm.tokens} tokens"))
    width, rest = divmod(lpm.width, train.side_reduction)
    if METHODS[settings.method].has_side_network and (rest or width % lpm.heads):
        reason = f"{lpm.width} / {train.side_reduction} must be a multiple of the {lpm.heads} heads"
        problems.append(("train.side_reduction", reason))
    classes = settings.data.classes or settings.data.label_columns
    if isinstance(train.class_weights, tuple) and classes is not None and len(train.class_weights) != len(classes):
        reason = f"lists {len(train.class_weights)} weights for {len(classes)} classes"
        problems.append(("train.class_weights", reason))
    return problems


def _ensemble(settings: Settings, row: MethodRow, problems: list[tuple[str, str]]) -> dict[str, float]:
    """Return the sizes and weights of the ensemble, and append what is wrong with them to `problems`."""
    if not row.has_side_network:
        return {"members": 1, "attentive": 0, "attentive_weight": 0.0, "probe_weight": 0.0}
    train, preset = settings.train, row.preset
    auto = train.members == "auto" or (isinstance(train, ResolvedTrain) and train.adaptive_members)
    members = preset.members if train.members == "auto" else train.members
    attentive = preset.attentive if train.attentive == "auto" else train.attentive
    default_weight = ATTENTIVE_WEIGHT if attentive else 0.0
    attentive_weight = default_weight if train.attentive_weight == "auto" else train.attentive_weight
    probe_weight = preset.probe_weight if train.probe_weight == "auto" else train.probe_weight
    if attentive and "tokens" not in row.inputs:
        problems.append(("train.attentive", f"must be 0: {row.name} reads no cached tokens"))
    features = settings.features
    if probe_weight and not (features.pooled and features.statistics):
        name = "statistics" if features.pooled else "pooled"
        problems.append((f"features.{name}", "must be true: linear probes read pooled outputs and token statistics"))
    if bool(attentive) != bool(attentive_weight):
        problems.append(("train.attentive_weight", f"is {attentive_weight:g} with {attentive} attentive probes"))
    if attentive_weight + probe_weight >= 1.0:
        problems.append(("train.attentive_weight", "and train.probe_weight leave nothing for the side networks"))
    return {
        "members": members,
        # Without linear probes there is nothing to compare one network with.
        "adaptive_members": auto and preset.adaptive_members and probe_weight > 0 and not attentive,
        "attentive": attentive,
        "attentive_weight": attentive_weight,
        "probe_weight": probe_weight,
    }


def stored_side_size(side: int) -> int:
    """Return the side of the stored small image, in pixels: 9/8 of the network's input, rounded up to the patch grid.

    A random crop keeps at least 0.8 of the area, hence 0.89 of the side; with this margin it is never upsampled.
    """
    return -(-side * 9 // 8 // SIDE_PATCH) * SIDE_PATCH


def feature_spec(settings: ResolvedSettings, lpm: LpmInfo, weights_sha256: str) -> FeatureSpec:
    """Return the feature spec of resolved settings, with T = int(ratio * N) tokens per head."""
    features = settings.features
    return FeatureSpec(
        lpm=lpm,
        weights_sha256=weights_sha256,
        layers=features.layers if features.tokens else (),
        importance=features.importance,
        kept=int(features.ratio * lpm.tokens) if features.tokens else 0,
        dtype=features.dtype,
        pooled=features.pooled,
        precision=features.precision,
        codec=features.codec,
        bitround=features.bitround,
        side_image_size=features.side_image_size,
        resize=features.resize,
        filter=None if features.filter == lpm.interpolation else features.filter,
        normalisation=features.normalisation,
        window=features.window,
        frame=features.frame,
        hidden=features.hidden,
        statistics=features.statistics,
    )


def expected_spec(settings: ResolvedSettings, lpm: LpmInfo, extracted: FeatureSpec) -> FeatureSpec:
    """Return the feature spec of resolved settings, filled in from an extraction.

    Settings determine neither the digest of the weights file nor, with `features.normalisation: dataset`, the mean and
    standard deviation.
    """
    features = settings.features
    shape = extracted.normalised(lpm) if features.normalisation == "dataset" else lpm
    spec = feature_spec(settings, shape, extracted.weights_sha256)
    if features.filter == extracted.resize_filter:
        # If the catalogue entry of the LPM has changed, report that rather than the filter.
        spec = spec.model_copy(update={"filter": extracted.filter})
    return spec
