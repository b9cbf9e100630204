"""The HTML page of a check, with a contact sheet of each class."""

from __future__ import annotations

from importlib.resources import files

import numpy as np
from PIL import Image

from schemas.data_check import DataCheck
from schemas.tasks import names_in
from stages.data_check.check import ReadData
from stages.data_check.wording import count_tables, findings, headline
from stages.evaluate.pages import page_template
from stages.evaluate.pictures import thumbnail_uri
from stages.images import read_image
from stages.study_images import accepted

_PER_CLASS = 24
"""Images of a class on the contact sheet."""
_MAX_CLASSES = 50
"""Classes on the contact sheet."""
_SIDE = 112
"""Longer side of an image on the contact sheet, in pixels."""


def render_check(check: DataCheck, read: ReadData, pixels: bool = True) -> str:
    """Return the page as one HTML text without a script and without a reference to another file.

    Args:
        check: From `check_data`.
        read: The same data set.
        pixels: Whether the page shows images.
    """
    template = page_template(files("stages.data_check").joinpath("data_check.html.j2").read_text(encoding="utf-8"))
    return template.render(
        title="Data check",
        subtitle=headline(check),
        findings=findings(check),
        tables=count_tables(check),
        sheets=_sheets(read) if pixels else [],
    )


def _sheets(read: ReadData) -> list[dict[str, object]]:
    sheets: list[dict[str, object]] = []
    for name in read.classes[:_MAX_CLASSES]:
        paths = [item.path for item in read.usable if name in names_in(item.label, read.data.task)]
        chosen = np.linspace(0, len(paths) - 1, min(_PER_CLASS, len(paths))).round().astype(int).tolist()
        pictures = [{"path": paths[at], "image": _picture(read, paths[at])} for at in chosen]
        sheets.append({"name": name, "pictures": pictures})
    return sheets


def _picture(read: ReadData, path: str) -> str:
    data = read.data
    file, accept = read.listing.images / path, accepted(data)
    image = read_image(file, max_pixels=data.max_pixels, accept=accept, rendering=read.rendering)
    image.thumbnail((_SIDE, _SIDE), Image.Resampling.BOX)
    # From mode F, which medical formats may have, only by way of L.
    small = image if image.mode == "RGB" else image.convert("L").convert("RGB")
    return thumbnail_uri(np.asarray(small).transpose(2, 0, 1))
