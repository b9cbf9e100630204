"""Leave out DICOM files by elements of their headers, and point out those that are probably no images to learn from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from schemas.data_settings import DataSettings
from schemas.text import counted

Values = Mapping[str, list[str]]
"""Keyword -> values of an element."""
SEEN = ("Modality", "ImageType")
"""Elements that the remarks depend on."""
_LOCALIZER = "LOCALIZER"
_ROWS = "Rows"
NO_IMAGE = "DICOM without an image"


@dataclass
class TagFilter:
    """`data.tag_filter`, and what was seen of the files that passed it."""

    accepted: Mapping[str, tuple[str, ...]]
    """Keyword -> values, those that are left out with a ! in front."""
    left_out: Counter[str] = field(default_factory=Counter)
    """Reason -> files."""
    modalities: Counter[str] = field(default_factory=Counter)
    """Modality -> files that passed."""
    localizers: int = 0
    """Files that passed and are localizers."""

    @classmethod
    def of(cls, data: DataSettings) -> TagFilter:
        """Take the filter from the settings."""
        return cls(data.tag_filter or {})

    @property
    def keywords(self) -> tuple[str, ...]:
        """Elements that `passes` reads."""
        return tuple(dict.fromkeys((*self.accepted, *SEEN, _ROWS)))

    def is_image(self, values: Values) -> bool:
        """Whether a file has rows of pixels; reports and plans of private classes have none."""
        return bool(values[_ROWS])

    def passes(self, values: Values) -> bool:
        """Whether the settings accept a file; counts it."""
        for keyword, listed in self.accepted.items():
            found = {value.casefold() for value in values[keyword]}
            wanted = {value.casefold() for value in listed if not value.startswith("!")}
            unwanted = {value[1:].casefold() for value in listed if value.startswith("!")}
            if found & unwanted or (wanted and not found & wanted):
                self.left_out[f"{keyword} is {' '.join(values[keyword]) or 'missing'}"] += 1
                return False
        self.modalities[" ".join(values["Modality"]) or "unknown"] += 1
        self.localizers += _LOCALIZER in values["ImageType"]
        return True

    def notes(self) -> list[str]:
        """Return lines for the user."""
        lines = [
            f"{counted(number, 'image')} left out, because {reason} (data.tag_filter)."
            for reason, number in sorted(self.left_out.items())
        ]
        if len(self.modalities) > 1:
            found = ", ".join(f"{number:,} {name}" for name, number in self.modalities.most_common())
            first = self.modalities.most_common(1)[0][0]
            lines.append(f"Images of several modalities: {found}. To use one: data.tag_filter: {{Modality: [{first}]}}")
        if self.localizers:
            lines.append(
                f"Warning: {counted(self.localizers, 'image')} for planning a scan (localizers). To leave them out: "
                f'data.tag_filter: {{ImageType: ["!{_LOCALIZER}"]}}'
            )
        return lines
