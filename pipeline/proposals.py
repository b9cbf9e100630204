"""Proposals for a kind of images in the settings of a new study."""

from __future__ import annotations

from typing import Any

from schemas.errors import SettingsError
from schemas.modalities import MODALITIES, Modality


def find_modality(name: str | None) -> Modality | None:
    """Return the row of a modality; None without a name.

    Raises:
        SettingsError: There is no such modality.
    """
    from stages.prepare.error_text import did_you_mean

    if name is None or name in MODALITIES:
        return None if name is None else MODALITIES[name]
    raise SettingsError(
        f"There are no proposals for {name!r}.",
        [("--modality", f"is one of {', '.join(MODALITIES)}{did_you_mean(name, MODALITIES)}")],
        "Without --modality, the study has the published LPM.",
    )


def propose(raw: dict[str, Any], modality: Modality | None) -> dict[str, Any]:
    """Return settings with what is proposed for a modality.

    Args:
        raw: Settings of the study, by section.
        modality: None: nothing is proposed.
    """
    tree = {name: dict(section) for name, section in raw.items()}
    for key, value in ({} if modality is None else modality.settings).items():
        section, _, name = key.partition(".")
        tree.setdefault(section, {})[name] = value
    return tree


def notes_on(modality: Modality | None) -> tuple[str, ...]:
    """Return paragraphs on what is proposed and what is known of it."""
    return () if modality is None else modality.reasons
