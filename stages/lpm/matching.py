"""The LPM that a trained model needs: the one whose features it was trained on, or an error."""

from __future__ import annotations

from pathlib import Path

import torch

from schemas.errors import CacheMismatchError, WeightsError
from schemas.features import FEATURE_VERSION, FeatureSpec
from schemas.settings import LpmSettings
from stages.lpm.loading import LoadedLpm, describe_lpm, load_lpm


def load_matching(spec: FeatureSpec, source: LpmSettings | None, root: Path, device: torch.device) -> LoadedLpm:
    """Load the LPM to a device, and refuse it unless it gives features of this spec.

    Args:
        spec: Features that a model was trained on.
        source: Name and weights of the LPM; None: the hub, for the model that the spec names.
        root: Folder that a relative `lpm.weights` or `local-dir:` starts at.
        device: Where it computes.

    Raises:
        CacheMismatchError: The LPM has another shape or preprocessing than in training.
        WeightsError: The weights are missing, or are not those of the spec.
    """
    source = source or LpmSettings(name=spec.lpm.name)
    with_tokens = not spec.lpm.map_widths
    info = spec.normalised(describe_lpm(source.name, spec.lpm.image_size, root, with_tokens))
    if differing := spec.differing(spec.model_copy(update={"lpm": info, "feature_version": FEATURE_VERSION})):
        raise CacheMismatchError(
            f"The model was trained on features of {spec.lpm.name}, which {source.name} does not give.",
            differing,
            "lpm.name is another model, or this version of timm describes it differently.",
            f"Set lpm.name to {'the local-dir: of that model' if 'local-dir:' in spec.lpm.name else spec.lpm.name}.",
        )
    loaded = load_lpm(source, spec.lpm.image_size, root, with_tokens)
    if loaded.weights_sha256 != spec.weights_sha256:
        raise WeightsError(
            f"The weights of {spec.lpm.name} have the sha256 {loaded.weights_sha256}, "
            f"the model was trained with {spec.weights_sha256}.",
            f"lpm.weights ({source.weights}) is another file than in training.",
            "Set lpm.weights to the file that the model was trained with.",
        )
    loaded.model.to(device)
    return loaded
