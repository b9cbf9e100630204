"""Remarks about usable files, which `prepare` counts and explains."""

from __future__ import annotations

BURNED_IN, ULTRASOUND, SECONDARY_CAPTURE = "burned-in annotation", "ultrasound", "secondary capture"
DARK = "narrow range"

_TEXT = (
    "may show names or dates in their pixels, which nothing here detects or removes. Look at them before you share "
    "images, reports or models."
)
EXPLAINED = {
    BURNED_IN: f"whose header says that text is burned in: they {_TEXT}",
    ULTRASOUND: f"of ultrasound: they {_TEXT}",
    SECONDARY_CAPTURE: f"that are secondary captures, such as screenshots: they {_TEXT}",
    DARK: "of 16 bits that use less than an eighth of that range, so they are nearly black. Set features.window to "
    "percentile or to [center, width] in params.yaml; `fpt prepare` need not run again.",
}
"""Remark -> what follows after "3 images"."""
