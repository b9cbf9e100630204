"""Images as a row source: pixels of the LPM's input, decoded when they are read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from schemas.data_settings import DataSettings
from schemas.errors import DataError
from schemas.features import FeatureSpec
from schemas.manifest import Manifest
from stages.extract.resize import to_lpm_square
from stages.images import read_image
from stages.store.layout import ArrayLayout
from stages.study_images import accepted


class ImageRows:
    """Images of a manifest at the LPM's input size, resized by the rule of a spec."""

    url = None
    """They are read on this machine."""

    def __init__(self, manifest: Manifest, folder: Path, data: DataSettings, spec: FeatureSpec) -> None:
        """Open nothing yet.

        Args:
            manifest: From `prepare`.
            folder: Folder of the images.
            data: Limits of an image's size.
            spec: Gives the input size, the resize rule, the filter and the padding colour.
        """
        self._paths: Mapping[str, Path] = {row.id: folder / row.path for row in manifest.every()}
        self._data, self._spec = data, spec

    @property
    def layouts(self) -> dict[str, ArrayLayout]:
        """Shape and type of one row of each array."""
        size = self._spec.lpm.image_size
        return {"image": ArrayLayout((3, size, size), "uint8", ("channel", "y", "x"))}

    def locate(self, ids: Sequence[str]) -> NDArray[np.int64]:
        """Return a number per image; rows are read by their ids.

        Raises:
            DataError: If the manifest lacks an image.
        """
        missing = [image_id for image_id in ids if image_id not in self._paths]
        if missing:
            raise DataError(
                f"{len(missing)} images are not in the manifest, the first is {missing[0][:16]}.",
                "Views of images are rows of the cache only.",
                "Run `fpt prepare` again.",
            )
        return np.arange(len(ids), dtype=np.int64)

    def read_rows(
        self,
        rows: NDArray[np.int64],
        ids: Sequence[str],
        names: Iterable[str],
        out: dict[str, NDArray[Any]] | None = None,
    ) -> dict[str, NDArray[Any]]:
        """Decode and resize images, in their order.

        Raises:
            ImageError: If an image can no longer be read.
        """
        size = self._spec.lpm.image_size
        if "image" not in set(names):
            return {}
        pixels = np.empty((len(rows), 3, size, size), np.uint8) if out is None else out["image"][: len(ids)]
        most, accept, rendering = self._data.max_pixels, accepted(self._data), self._spec.rendering
        for row, image_id in enumerate(ids):
            image = read_image(self._paths[image_id], max_pixels=most, accept=accept, rendering=rendering)
            pixels[row] = to_lpm_square(image, self._spec).transpose(2, 0, 1)
        return {"image": pixels}
