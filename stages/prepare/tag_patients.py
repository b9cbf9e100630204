"""Tell patients apart by the headers of their DICOM files; only keyed hashes of identifiers leave this module."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from schemas.text import counted
from stages.prepare.label_cells import is_missing
from stages.prepare.pseudonyms import pseudonym

PATIENT, STUDY = "PatientID", "StudyInstanceUID"
"""Elements with the patient and with the examination."""
Values = Mapping[str, list[str]]
"""Keyword -> values of an element."""


@dataclass(frozen=True)
class HeaderGroups:
    """Groups of files by an element of their headers."""

    of: Mapping[str, str]
    """Path -> pseudonym, for files whose group is known."""
    notes: list[str]
    """Lines for the user."""


def group_files(headers: Mapping[str, Values], element: str, key: bytes) -> HeaderGroups:
    """Group files by an element, such as PatientID.

    A file without PatientID belongs to the patient of other files of its study (StudyInstanceUID), or to one of its own
    study.

    Args:
        headers: Path -> values of `element`, and of StudyInstanceUID if it is PatientID.
        element: Keyword.
        key: From `stages.prepare.pseudonyms.study_key`.
    """
    texts = {path: "\\".join(values.get(element, [])) for path, values in headers.items()}
    named = {path: text for path, text in texts.items() if not is_missing(text)}
    by_study: dict[str, str] = {}
    if element == PATIENT:
        studies = {path: "\\".join(values.get(STUDY, [])) for path, values in headers.items()}
        patient_of = {studies[path]: text for path, text in named.items()}
        by_study = {
            path: patient_of.get(study, f"study {study}")
            for path, study in studies.items()
            if study and path not in named
        }
    of = {path: pseudonym(text, key) for path, text in {**named, **by_study}.items()}
    return HeaderGroups(of, _notes(element, len(headers), named, by_study))


def _notes(element: str, files: int, named: Mapping[str, str], by_study: Mapping[str, str]) -> list[str]:
    notes = []
    if by_study:
        notes.append(
            f"{counted(len(by_study), 'image')} without {element}: those of one examination ({STUDY}) stay together."
        )
    if missing := files - len(named) - len(by_study):
        notes.append(f"{counted(missing, 'image')} without {element}: each counts as a group of its own.")
    if element == PATIENT and len(set(named.values())) == 1 and len(named) > 1:
        notes.append(
            f"Warning: all files have the same {element}, as after anonymisation. If they are of several patients: "
            f"data.group_column: {STUDY}"
        )
    return notes
