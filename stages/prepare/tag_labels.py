"""Labels and patients from the headers of DICOM files, for `data.labels: tags`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from schemas.data_settings import DataSettings
from schemas.errors import DataError
from schemas.tasks import SEPARATOR, written
from schemas.text import counted
from stages.dicom_files import open_header, pydicom
from stages.image_kinds import kind_of
from stages.image_limits import RefusalError
from stages.prepare.error_text import did_you_mean
from stages.prepare.image_files import SkippedFile, find_image_files
from stages.prepare.label_cells import is_missing
from stages.prepare.labelled_image import LabelledImage
from stages.prepare.pseudonyms import study_key
from stages.prepare.table_columns import AUTO
from stages.prepare.tag_filter import NO_IMAGE, TagFilter
from stages.prepare.tag_patients import PATIENT, STUDY, HeaderGroups, Values, group_files

LABEL = "BodyPartExamined"
"""Keyword of the label by default."""
_DEFAULT_COLUMN = DataSettings.model_fields["label_column"].default
_KEEP = "data.keep_columns"
_THREADS = 4
_DAMAGED = "its header is damaged"

_IDENTIFYING = ("Patient", "Accession", "Physician", "Operator", "BirthDate", "Address", "Telephone", "InstanceUID")
"""Parts of keywords whose values may identify a patient or a person, as names of persons do; they are never labels."""
_HARMLESS = ("PatientSex", "PatientAge", "PatientPosition", "PatientOrientation", "PatientSize", "PatientWeight")
_TEXT = frozenset(
    ("AS", "CS", "DA", "DS", "IS", "LO", "LT", "PN", "SH", "ST", "UC", "UI", "US", "SS", "FL", "FD", "TM")
)
"""Value representations of single short values."""


@dataclass(frozen=True)
class TagScan:
    """Images below a folder, with what their headers say."""

    items: list[LabelledImage]
    """Sorted by path; groups are pseudonyms."""
    unlabelled: list[LabelledImage]
    """Images without a label, if the settings allow them; sorted by path."""
    missing_labels: dict[str, str]
    """Path of any other image without a label -> reason."""
    skipped: list[SkippedFile]
    """Files that are not images."""
    group_column: str | None
    """Keyword of the groups, or None if no group is known."""
    notes: list[str]
    """Choices, as lines for the user."""


def scan_tags(data: DataSettings, images: Path, key: bytes) -> TagScan:
    """Read label and patient of every image below a folder from its DICOM header; pixels are not read.

    The label is the element that `data.label_column` names, BodyPartExamined by default; the group is the pseudonym of
    `data.group_column`, PatientID by default; `data.site_column` and `data.keep_columns` name further elements.

    Args:
        data: Settings.
        images: Folder.
        key: From `stages.prepare.pseudonyms.study_key`.

    Raises:
        DataError: A keyword is unknown, or would put identifiers into the manifest; or there are no images.
        PlatformError: pydicom is not installed.
    """
    label = LABEL if data.label_column == _DEFAULT_COLUMN else data.label_column
    group = PATIENT if data.group_column == AUTO else data.group_column
    check_keyword("data.label_column", label)
    _check_harmless("data.label_column", label)
    keywords: tuple[str, ...] = (label,)
    for setting, named in (("data.site_column", data.site_column), *((_KEEP, name) for name in data.keep_columns)):
        if named is not None:
            check_keyword(setting, named)
            _check_harmless(setting, named)
            keywords = (*keywords, named)
    if group is not None:
        check_keyword("data.group_column", group)
        keywords = (*keywords, group, STUDY)
    chosen, contents = tag_filter(data), find_image_files(images)
    if not contents.images:
        raise DataError(f"{images} has no images.", "", "Correct data.images in params.yaml.")
    skipped = list(contents.skipped)
    items: list[LabelledImage] = []
    unlabelled: list[LabelledImage] = []
    missing: dict[str, str] = {}
    headers: dict[str, Values] = {}
    for path, read in header_values(contents.images, (*keywords, *chosen.keywords)):
        name, values = path.relative_to(images).as_posix(), {} if isinstance(read, str) else read
        if values and not chosen.is_image(values):
            skipped.append(SkippedFile(path, NO_IMAGE, True))
            continue
        if values and not chosen.passes(values):
            continue
        text = _label(values.get(label, []), data)
        if text is None and (data.unlabelled == "error" or read == _DAMAGED):
            missing[name] = read if isinstance(read, str) else f"its header has no {label}"
            continue
        headers[name] = values
        kept = {keyword: _joined(values.get(keyword, [])) for keyword in data.keep_columns}
        site = _joined(values.get(data.site_column or "", [])) or None
        image = LabelledImage(name, text or "", site=site, others=kept)
        (items if text is not None else unlabelled).append(image)
    groups = HeaderGroups({}, []) if group is None else group_files(headers, group, key)
    for images_of in (items, unlabelled):
        images_of[:] = [replace(item, group=groups.of.get(item.path)) for item in images_of]
    notes = [f"The label of each image is {label} of its header.", _group_note(group), *groups.notes, *chosen.notes()]
    return TagScan(items, unlabelled, missing, skipped, group if groups.of else None, notes)


def tag_filter(data: DataSettings) -> TagFilter:
    """Return the filter of the settings.

    Raises:
        DataError: It names an element that is unknown.
    """
    for keyword in data.tag_filter or {}:
        check_keyword(f"data.tag_filter.{keyword}", keyword)
    return TagFilter.of(data)


def files_that_pass(paths: Sequence[str], images: Path, data: DataSettings) -> tuple[set[str], list[str]]:
    """Return the files that `data.tag_filter` accepts, and notes; files of other formats are accepted.

    Args:
        paths: Relative to `images`.
        images: Image folder.
        data: Settings.
    """
    chosen, passed = tag_filter(data), set(paths)
    dicom = [path for path in paths if _kind(images / path) == "DICOM"]
    read = header_values([images / path for path in dicom], chosen.keywords)
    for path, (_, values) in zip(dicom, read, strict=True):
        if isinstance(values, dict) and not chosen.passes(values):
            passed.discard(path)
    return passed, chosen.notes()


def patients_of_headers(paths: Sequence[str], images: Path, private: Path | None) -> tuple[dict[str, str], list[str]]:
    """Return the pseudonym of the patient of each DICOM file with a PatientID, and notes for the user.

    Args:
        paths: Relative to `images`; other formats and missing files have no patient.
        images: Image folder.
        private: As for `stages.prepare.pseudonyms.study_key`, which makes a key only if it is needed.
    """
    dicom = [path for path in paths if _kind(images / path) == "DICOM"]
    read = header_values([images / path for path in dicom], (PATIENT, STUDY))
    headers: dict[str, Values] = {
        path: found for path, (_, found) in zip(dicom, read, strict=True) if isinstance(found, dict)
    }
    number = sum(not is_missing("".join(values[PATIENT])) for values in headers.values())
    if not any(values[PATIENT] or values[STUDY] for values in headers.values()):
        return {}, []
    groups = group_files(headers, PATIENT, study_key(private))
    return dict(groups.of), [
        f"{counted(number, 'DICOM file')} with a PatientID: all images of a patient stay in one split; only keyed "
        "hashes are stored.",
        *groups.notes,
    ]


def _kind(path: Path) -> str | None:
    try:
        return kind_of(path)
    except OSError:
        return None


def check_keyword(setting: str, keyword: str) -> None:
    """Refuse a keyword of no short element of DICOM.

    Raises:
        DataError: Names similar keywords.
        PlatformError: pydicom is not installed.
    """
    names = pydicom().datadict
    tag = names.tag_for_keyword(keyword)
    if tag is None or names.dictionary_VR(tag) not in _TEXT:
        words = [entry[4] for entry in names.DicomDictionary.values()]
        problem = "is not an element of DICOM" if tag is None else "is not a short text or number"
        raise DataError(
            f"{setting}: {keyword!r} {problem}{did_you_mean(keyword, words) if tag is None else ''}.",
            "With data.labels: tags, columns are keywords of DICOM such as BodyPartExamined, Laterality, ViewPosition.",
            f"Correct {setting} in params.yaml.",
        )


def _check_harmless(setting: str, keyword: str) -> None:
    names = pydicom().datadict
    person = names.dictionary_VR(names.tag_for_keyword(keyword)) == "PN"
    if person or (any(part in keyword for part in _IDENTIFYING) and keyword not in _HARMLESS):
        raise DataError(
            f"{setting}: {keyword} may identify a person.",
            "Its values would be written to the manifest and the report as they are.",
            "Name another element. data.group_column may name identifiers: only their keyed hashes are stored.",
        )


def header_values(
    paths: Sequence[Path], keywords: tuple[str, ...]
) -> Iterator[tuple[Path, dict[str, list[str]] | str]]:
    """Read elements of the header of each file, in threads; pixels and other elements are not read.

    Args:
        paths: Files.
        keywords: Elements.

    Yields:
        Path, and keyword -> values as text, or the reason why the file has no header.
    """
    with ThreadPoolExecutor(_THREADS) as pool:
        yield from zip(paths, pool.map(lambda path: _values(path, keywords), paths), strict=True)


def _values(path: Path, keywords: tuple[str, ...]) -> dict[str, list[str]] | str:
    try:
        if _kind(path) != "DICOM":
            return "is not a DICOM file, so it has no header"
        with path.open("rb") as file:
            _, header, _ = open_header(file, path.stat().st_size, keywords)
            return {keyword: _texts(header.get(keyword)) for keyword in keywords}
    except RefusalError as refusal:
        return str(refusal)
    except OSError as error:
        return (error.strerror or "cannot be read").lower()
    # pydicom raises nearly anything on damaged bytes.
    except Exception:
        return _DAMAGED


def _texts(value: Any) -> list[str]:
    several = value if isinstance(value, list | tuple) or type(value).__name__ == "MultiValue" else [value]
    texts = [" ".join(str(item).split()) for item in several if item is not None]
    return [text for text in texts if text]


def _joined(values: list[str]) -> str:
    return " ".join(values)


def _label(values: list[str], data: DataSettings) -> str | None:
    if not values or is_missing(values[0]):
        return None
    if data.task == "multilabel":
        return written(sorted({value.replace(SEPARATOR, "/") for value in values}))
    return _joined(values)


def _group_note(group: str | None) -> str:
    if group is None:
        return "PatientID is not used (data.group_column: null): images of one patient may be in different splits."
    return f"All images with the same {group} stay in one split; only its keyed hash is stored."
