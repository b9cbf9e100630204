"""What a file is, by its first bytes: an image that can be read, an image that cannot, or something else."""

from __future__ import annotations

from pathlib import Path

_START = 352
"""Bytes that decide: a NIfTI file has its mark at byte 344."""

_READ = ("PNG", "JPEG", "TIFF", "BMP", "WebP")
"""What `stages.images` reads."""

_MAGIC = (
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"\xff\xd8\xff", "JPEG"),
    (b"II\x2a\x00", "TIFF"),
    (b"MM\x00\x2a", "TIFF"),
    (b"II\x2b\x00", "TIFF"),
    (b"MM\x00\x2b", "TIFF"),
    (b"GIF87a", "GIF"),
    (b"GIF89a", "GIF"),
    (b"\x00\x00\x00\x0cjP  \r\n\x87\n", "JPEG 2000"),
    (b"\xff\x4f\xff\x51", "JPEG 2000"),
    (b"\x00\x00\x00\x0cJXL \r\n\x87\n", "JPEG XL"),
    (b"\xff\x0a", "JPEG XL"),
    (b"\x76\x2f\x31\x01", "OpenEXR"),
    (b"8BPS", "Photoshop"),
    (b"NRRD000", "NRRD"),
    (b"ObjectType = Image", "MetaImage"),
)

_BY_SUFFIX = {
    **dict.fromkeys((".dcm", ".dicom", ".ima"), "DICOM"),
    **dict.fromkeys((".nii", ".nii.gz"), "NIfTI"),
    **dict.fromkeys((".mha", ".mhd"), "MetaImage"),
    **dict.fromkeys((".nrrd", ".nhdr"), "NRRD"),
    # TIFF files by their first bytes, whose first page is often a small preview of the photograph.
    **dict.fromkeys((".dng", ".nef", ".cr2", ".cr3", ".arw", ".orf", ".rw2", ".pef", ".raf"), "camera raw"),
}
"""Formats that the first bytes do not always show."""

_BMP_HEADERS = (12, 40, 52, 56, 64, 108, 124)
_ISO_BRANDS = {b"heic": "HEIC", b"heix": "HEIC", b"mif1": "HEIC", b"msf1": "HEIC", b"avif": "AVIF", b"avis": "AVIF"}


def image_kind(path: Path) -> str | None:
    """Name the image format of a regular file, by its first bytes and, for a few formats, its suffix.

    Args:
        path: A regular file: opening a pipe would wait for ever.

    Returns:
        Such as "PNG" or "DICOM"; None if it is no image that is known here.

    Raises:
        OSError: It cannot be read.
    """
    name = path.name.strip().lower()
    by_suffix = next((kind for suffix, kind in _BY_SUFFIX.items() if name.endswith(suffix)), None)
    if by_suffix is not None:
        return by_suffix
    with path.open("rb") as file:
        start = file.read(_START)
    return kind_of_bytes(start)


def kind_of_bytes(start: bytes) -> str | None:
    """Name the image format that a file with these first bytes has, or None."""
    known = next((kind for magic, kind in _MAGIC if start.startswith(magic)), None)
    if known is not None:
        return known
    if start[:4] == b"RIFF" and start[8:12] == b"WEBP":
        return "WebP"
    # Two letters are too few to go by: a text may begin with BM, too.
    if start[:2] == b"BM" and int.from_bytes(start[14:18], "little") in _BMP_HEADERS:
        return "BMP"
    if start[128:132] == b"DICM":
        return "DICOM"
    if start[4:8] == b"ftyp":
        return _ISO_BRANDS.get(start[8:12])
    return "NIfTI" if start[344:347] in (b"n+1", b"ni1") else None


def is_read(kind: str) -> bool:
    """Whether `stages.images.read_image` reads this format."""
    return kind in _READ
