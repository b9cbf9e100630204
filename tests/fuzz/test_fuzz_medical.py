"""Mutants of DICOM, NIfTI, PNG and TIFF files: each is refused by an ImageError, or its image has the declared size.

A process of its own reads them, so that a decoder that crashes, hangs or takes too much memory is noticed.
FPT_FUZZ_CASES sets the number of mutants, FPT_FUZZ_SEED selects others.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import select
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pydicom
import pytest
from dicom_files import dataset
from hypothesis import HealthCheck, example, given, seed, settings
from hypothesis import strategies as st
from PIL import Image
from pydicom.uid import JPEG2000Lossless, JPEGLSLossless, RLELossless

SEED = int(os.environ.get("FPT_FUZZ_SEED", "0"))
CASES = int(os.environ.get("FPT_FUZZ_CASES", "300"))
SECONDS = 20
GIBIBYTES = 2

READER = """
import json, sys, warnings
from pathlib import Path
from PIL import Image
from schemas.errors import ImageError
from schemas.rendering import Rendering
from stages.dicom_files import open_header
from stages.image_kinds import kind_of_bytes
from stages.images import read_image
warnings.simplefilter("ignore")

def fits(path, size):
    data = path.read_bytes()
    if kind_of_bytes(data[:1024]) == "NIfTI":
        import gzip, nibabel, zlib
        if data[:2] == b"\\x1f\\x8b":
            data = zlib.decompressobj(wbits=31).decompress(data, 1000)
        kind = nibabel.Nifti1Header if data[344:345] == b"n" else nibabel.Nifti2Header
        shape = list(kind(data[:kind.template_dtype.itemsize], check=False).get_data_shape()) + [1]
        return all(side in shape for side in size)
    # Turned by its EXIF orientation, an image has its sides exchanged.
    return sorted(size) == sorted(declared(path))

def declared(path):
    head = path.read_bytes()[:132]
    if head[128:] != b"DICM" and head[:4] in (b"\\x89PNG", b"II*\\0", b"MM\\0*"):
        with Image.open(path) as image:
            return list(image.size)
    with path.open("rb") as file:
        _, header, _ = open_header(file, path.stat().st_size, ("Columns", "Rows"))
    return [header.Columns, header.Rows]

for line in sys.stdin:
    path, window = Path(json.loads(line)[0]), json.loads(line)[1]
    try:
        image = read_image(path, max_pixels=4_000_000, rendering=Rendering(window=window))
        answer = image.mode if fits(path, image.size) else f"{image.size} is not its declared size"
    except ImageError as error:
        answer = "refused: " + error.reason
    except Exception as error:
        answer = f"raised {error!r}"
    status = Path("/proc/self/status")
    # Not ru_maxrss, which a process inherits from its parent.
    peak = int(status.read_text().split("VmHWM:")[1].split()[0]) if status.exists() else 0
    print(json.dumps([answer, peak]), flush=True)
"""


class Reader:
    """A process that reads one file after another."""

    def __init__(self, folder: Path) -> None:
        self._file, self.peak = folder / "mutant", 0
        self._start()

    def _start(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", READER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )

    def outcome(self, data: bytes, window: Any = "stored") -> str:
        self._file.write_bytes(data)
        process = self._process
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(json.dumps([str(self._file), window]).encode() + b"\n")
        process.stdin.flush()
        ready, _, _ = select.select([process.stdout], [], [], SECONDS)
        line = process.stdout.readline() if ready else b""
        if not line:
            self.close()
            self._start()
            return "crashed" if ready else "hung"
        answer, self.peak = json.loads(line)
        return str(answer)

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reader]:
    process = Reader(tmp_path_factory.mktemp("fuzz"))
    yield process
    process.close()


def originals() -> list[bytes]:
    """Encode a small file for each kind of pixels and each compression that can be written."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[0:36, 0:40]
    grey = (x * 90 + y * 40 + rng.integers(0, 30, x.shape)).astype(np.uint16)
    colour = np.stack([x * 6, y * 7, x + y], axis=-1).astype(np.uint8)
    window = {"WindowCenter": 1200, "WindowWidth": 2000, "RescaleSlope": 2, "RescaleIntercept": -100}
    palette = {f"{name}PaletteColorLookupTable{part}": value for name in ("Red", "Green", "Blue")
               for part, value in (("Descriptor", [256, 0, 16]), ("Data", bytes(range(256)) * 2))}  # fmt: skip
    made = [
        dataset(grey, 12, **window, PhotometricInterpretation="MONOCHROME1", PixelPaddingValue=0),
        dataset((grey - 2000).astype(np.int16)),
        dataset(colour),
        dataset(grey.astype(np.uint8), PhotometricInterpretation="PALETTE COLOR", **palette),
        dataset(np.stack([grey] * 3), NumberOfFrames=3),
    ]
    for syntax in (JPEG2000Lossless, JPEGLSLossless, RLELossless):
        for pixels in (grey, colour):
            data = dataset(pixels)
            data.compress(syntax, generate_instance_uid=False)
            made.append(data)
    files = []
    for data in made:
        buffer = io.BytesIO()
        data.save_as(buffer)
        files.append(buffer.getvalue())
    folder = Path(pydicom.__file__).parent / "data/test_files"
    names = ["SC_rgb_jpeg_gdcm", "JPGExtended", "SC_rgb_small_odd_jpeg", "image_dfl", "JPEGLSNearLossless_16"]
    names.append("MR_small_expb")
    files += [(folder / f"{name}.dcm").read_bytes() for name in names]
    for kind, pixels in (("PNG", grey), ("TIFF", grey), ("TIFF", grey.astype(np.float32))):
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, kind)
        files.append(buffer.getvalue())
    volume = nibabel.Nifti1Image(np.stack([grey] * 3, axis=-1).astype(np.int16), np.eye(4)).to_bytes()
    return [*files, volume, gzip.compress(volume)]


FILES = originals()
WINDOWS = ("stored", "percentile", "full", [1000.0, 500.0])
Edit = tuple[str, float, bytes]
EDITS = st.lists(
    st.tuples(
        st.sampled_from(["overwrite", "remove", "insert", "cut", "repeat"]),
        st.floats(0, 1, exclude_max=True),
        st.one_of(st.binary(min_size=1, max_size=8), st.sampled_from([b"\0\0\0\0", b"\xff\xff\xff\xff", b"\xff\xd9"])),
    ),
    min_size=1,
    max_size=3,
)


def mutated(data: bytes, edits: list[Edit]) -> bytes:
    mutant = bytearray(data)
    for kind, place, value in edits:
        # The square root of a place would favour pixels, its square the header, where most structure is.
        at = int(place**2 * len(mutant))
        if kind == "overwrite":
            mutant[at : at + len(value)] = value
        elif kind == "remove":
            del mutant[at : at + len(value)]
        elif kind == "insert":
            mutant[at:at] = value
        elif kind == "cut":
            del mutant[max(1, len(mutant) - at) :]
        else:
            mutant[at:at] = mutant[at : at + 40 * len(value)]
    return bytes(mutant)


OUTCOMES: Counter[str] = Counter()


def test_every_original_is_read(reader: Reader) -> None:
    assert [reader.outcome(data, "percentile") in ("F", "RGB") for data in FILES] == [True] * len(FILES)


@seed(SEED)
@settings(max_examples=CASES, deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, len(FILES) - 1), EDITS, st.sampled_from(WINDOWS))
@example(5, [("cut", 0.5, b"x")], "stored")
def test_mutants_are_refused_or_have_their_declared_size(
    reader: Reader, number: int, edits: list[Edit], window: Any
) -> None:
    outcome = reader.outcome(mutated(FILES[number], edits), window)
    OUTCOMES[outcome[:60]] += 1
    assert outcome in ("F", "RGB") or (outcome.startswith("refused: ") and 9 < len(outcome) < 300), (number, edits)
    assert reader.peak < GIBIBYTES * 2**20  # in KiB


def test_both_outcomes_are_frequent(reader: Reader) -> None:
    total = OUTCOMES.total()
    read = OUTCOMES["F"] + OUTCOMES["RGB"]
    sys.stdout.write(f"{total} mutants, {read} read, peak {reader.peak / 2**20:.2f} GiB\n")
    assert 0.1 * total < read < 0.9 * total
