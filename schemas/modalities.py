"""What `fpt init --modality` proposes for a kind of images: an LPM, a resize rule and a window, with reasons.

docs/models.md has the table, generated from these rows.
"""

from __future__ import annotations

from typing import Any

from schemas.base import Contract
from schemas.settings import FeatureResize

Window = str | tuple[float, float]
"""Value of `features.window`: a word, or center and width."""

GENERAL = "vit_base_patch14_dinov2.lvd142m"
"""LPM that is proposed for every kind of images: its weights need no agreement."""
GENERAL_SIZE = 518
"""Its own input, in pixels."""
GENERAL_KNOWN = (
    "DINOv2 ViT-B/14, Apache-2.0, fetched from the hub; trained on photographs. Its smaller sibling ViT-S/14 gave the "
    "figures of docs/lab-notes.md on dermoscopy, fundus images and chest X-rays; the published LPM was not compared "
    "with it here"
)


class DomainModel(Contract):
    """A checkpoint trained on such images, whose file timm's architecture loads."""

    title: str
    """Name and training images."""
    licence: str
    """As far as it is known."""
    source: str
    """Who publishes the file."""
    name: str
    """Value of `lpm.name`."""
    file: str
    """Value of `lpm.weights`: where the file is to lie."""


class Modality(Contract):
    """A kind of images."""

    name: str
    """On the command line."""
    title: str
    """For people."""
    domain: DomainModel | None = None
    """Checkpoint to try; None: none is known to load."""
    resize: FeatureResize
    """Proposed `features.resize`."""
    resize_reason: str
    """Why."""
    window: Window | None = None
    """Proposed `features.window`; None: such images have 8 bits per channel, and the default stays."""
    window_reason: str = "images of 8 bits need none"
    """Why."""

    @property
    def settings(self) -> dict[str, Any]:
        """Proposed settings by dotted name."""
        proposed: dict[str, Any] = {
            "lpm.name": GENERAL,
            "features.image_size": GENERAL_SIZE,
            "features.resize": self.resize,
        }
        if self.window is not None:
            proposed["features.window"] = self.window
        return proposed

    @property
    def reasons(self) -> tuple[str, ...]:
        """Sentences on what is proposed and what is known."""
        one = self.domain
        domain = (
            "No checkpoint of such images is known to load here."
            if one is None
            else f"To try: {one.title}; {one.licence}; file from {one.source}: lpm.name: {one.name}, "
            f"lpm.weights: {one.file} (docs/models.md). Not measured here."
        )
        window = f"features.window: {written(self.window)}: {self.window_reason}."
        return (
            f"Proposed for {self.title} (--modality {self.name}).",
            f"lpm: {GENERAL_KNOWN}. {domain}",
            f"features.resize: {self.resize}: {self.resize_reason}.",
            window,
        )


def written(window: Window | None) -> str:
    """Return a proposed window as in `params.yaml`."""
    if window is None:
        return "default"
    return window if isinstance(window, str) else f"[{window[0]:g}, {window[1]:g}]"


_PUBLISHED = "both sides scaled to the square, as published"
_SHAPE = "the aspect ratio stays, the rest is filled; a guess, not measured here"
_STORED = "the window that the scanner stored in a DICOM file, else percentiles"

_ROWS = (
    Modality(
        name="cxr",
        title="chest X-rays",
        domain=DomainModel(
            title="RAD-DINO (chest X-rays)",
            licence="MIT by its model card, earlier MSRLA; research only",
            source="https://huggingface.co/microsoft/rad-dino",
            name=GENERAL,
            file="weights/rad-dino.safetensors",
        ),
        resize="squash",
        resize_reason=_PUBLISHED,
        window="stored",
        window_reason=_STORED,
    ),
    Modality(
        name="fundus",
        title="fundus images",
        domain=DomainModel(
            title="RETFound (fundus images)",
            licence="CC BY-NC 4.0, on request",
            source="https://github.com/rmaphoh/RETFound_MAE",
            name="vit_large_patch16_224.mae",
            file="weights/RETFound_cfp_weights.pth",
        ),
        resize="squash",
        resize_reason=_PUBLISHED,
    ),
    Modality(name="derm", title="dermoscopy", resize="squash", resize_reason=_PUBLISHED),
    Modality(
        name="histology",
        title="histology tiles",
        domain=DomainModel(
            title="UNI (H&E tiles)",
            licence="CC BY-NC-ND 4.0, on request",
            source="https://huggingface.co/MahmoodLab/UNI",
            name="vit_large_patch16_224.mae",
            file="weights/uni.bin",
        ),
        resize="squash",
        resize_reason="tiles are square, so that both rules are the same",
    ),
    Modality(name="us", title="ultrasound", resize="letterbox", resize_reason=_SHAPE),
    Modality(
        name="mri",
        title="MRI slices",
        resize="letterbox",
        resize_reason=_SHAPE,
        window="percentile",
        window_reason="MRI has no units: the 0.5th and 99.5th percentile of each image",
    ),
    Modality(
        name="ct",
        title="CT slices",
        resize="letterbox",
        resize_reason=_SHAPE,
        window=(40.0, 400.0),
        window_reason="[center, width] in Hounsfield units, a usual window for soft tissue; for lungs [-600, 1500], "
        "for bones [400, 1800]",
    ),
    Modality(
        name="mammo",
        title="mammography",
        resize="letterbox",
        resize_reason="breasts are taller than wide; squash is as published, letterbox a guess, not measured here",
        window="stored",
        window_reason=_STORED,
    ),
)
MODALITIES: dict[str, Modality] = {row.name: row for row in _ROWS}
"""Name -> row."""
