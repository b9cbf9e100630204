"""Make the images of held-out sites the test images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from schemas.data_settings import DataSettings
from schemas.errors import DataError
from schemas.text import counted
from stages.prepare.error_text import did_you_mean, listed
from stages.prepare.labelled_image import LabelledImage


def hold_out_sites(items: Sequence[LabelledImage], data: DataSettings) -> list[LabelledImage]:
    """Give the images of `data.test_sites` the split test.

    All others, also those without a known site, are drawn into train and val later; except that other images of a
    patient who has been at a held-out site follow into the test split, as do copies.

    Raises:
        DataError: No image is from such a site, or a given split contradicts the site.
    """
    if data.test_sites is None:
        return list(items)
    sites = {item.site for item in items if item.site is not None}
    unknown = [f"{site!r}{did_you_mean(site, sites)}" for site in data.test_sites if site not in sites]
    if unknown:
        raise DataError(
            f"{counted(len(unknown), 'site')} in data.test_sites that no image has.",
            listed([*unknown, f"existing sites: {', '.join(sorted(sites))}"]),
            "Correct data.test_sites or data.site_column in params.yaml.",
        )
    held_out = set(data.test_sites)
    contradictions = [
        f"{item.path}: {item.split}, from {item.site if item.site is not None else 'an unknown site'}"
        for item in items
        if item.split is not None and (item.split == "test") != (item.site in held_out)
    ]
    if contradictions:
        raise DataError(
            f"The given split of {counted(len(contradictions), 'image')} contradicts data.test_sites.",
            listed(contradictions),
            "Correct the split column, or set data.split_column: null or data.test_sites: null.",
        )
    return [replace(item, split="test") if item.site in held_out else item for item in items]
