"""Read the arrays of an .npz file image by image, and write them as PNG files. Nothing is ever unpickled."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt
from PIL import Image

from schemas.errors import DataError
from schemas.manifest import SPLITS
from schemas.recipes import Arrays, Recipe
from schemas.tasks import written
from stages.files import storage_errors
from stages.prepare.labelled_image import LabelledImage
from stages.prepare.recipes.download import Download
from stages.prepare.recipes.readers import Found


def write_arrays(download: Download, recipe: Recipe, reading: Arrays, folder: Path) -> Found:
    """Write every image of the file as PNG, and read the labels.

    Args:
        download: Contains the file.
        recipe: Labels by number.
        reading: Names of the file.
        folder: Folder of the images, with a folder per split.

    Raises:
        DataError: The file cannot be read, or is not what the recipe expects.
        StorageError: The images cannot be written.
    """
    found = Found()
    names = [end for end in reading.files if any(f"/{name}".endswith(f"/{end}") for name in download.files)]
    path = download.find(names[0] if names else reading.files[0])
    if path is None:
        return found
    try:
        with storage_errors(folder), zipfile.ZipFile(path) as archive:
            for split in SPLITS:
                labels = np.stack(list(_rows(archive, f"{split}_labels")))
                (folder / split).mkdir(parents=True, exist_ok=True)
                for number, (pixels, label) in enumerate(zip(_rows(archive, f"{split}_images"), labels, strict=True)):
                    name = f"{split}/{number:06d}.png"
                    Image.fromarray(pixels).save(folder / name)
                    found.images.append(LabelledImage(name, _label(recipe, label), None, split))
    except (ValueError, LookupError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{path} is not a file of {recipe.title}.", str(error), "Download it again.") from None
    return found


def _label(recipe: Recipe, label: npt.NDArray[np.uint8]) -> str:
    if recipe.task == "multilabel":
        return written(sorted(recipe.classes[number] for number in np.flatnonzero(label)))
    (number,) = np.ravel(label).tolist()
    name = recipe.labels[str(number)]
    if name is None:
        raise KeyError(f"label {number}")
    return name


def _rows(archive: zipfile.ZipFile, name: str) -> Iterator[npt.NDArray[np.uint8]]:
    """Yield the rows of an array without reading all of it.

    Raises:
        ValueError: The array is not of bytes, or damaged.
    """
    with archive.open(f"{name}.npy") as member:
        version = np.lib.format.read_magic(member)
        read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        shape, by_columns, dtype = read_header[version](member)
        if dtype != np.uint8 or by_columns or not shape:
            raise ValueError(f"{name} is an array of {dtype} with the shape {shape}")
        size = int(np.prod(shape[1:])) * dtype.itemsize
        for _ in range(shape[0]):
            yield np.frombuffer(_exactly(member, size), dtype=dtype).reshape(shape[1:])


def _exactly(member: IO[bytes], size: int) -> bytes:
    data = member.read(size)
    if len(data) != size:
        raise EOFError("The file ends too early.")
    return data
