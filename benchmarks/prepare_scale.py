"""Measure `prepare` on many small images: CPU seconds and memory of a first run, a second one, and those after changes.

    python benchmarks/prepare_scale.py [--images 100000] [--folder FOLDER]

Draws grey PNGs of 64 x 64 pixels in four classes. Each run is a process of its own. CPU time is user and system time
of all threads; memory is the highest resident size.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CLASSES = 4
RUN = """\
import sys
from pathlib import Path
from schemas.data_settings import DataSettings
from stages.prepare import prepare
root = Path(sys.argv[1])
full = sys.argv[2] == "full"
out = root / sys.argv[2]
result = prepare(DataSettings(images="images"), root, out, None, root / "splits", False, root / "index", full)
print(result.images, result.near, result.known)
"""


def draw(folder: Path, numbers: range) -> None:
    """Write one image per number."""
    import numpy as np
    from PIL import Image

    for number in range(CLASSES):
        (folder / f"class{number}").mkdir(parents=True, exist_ok=True)
    for number in numbers:
        coarse = np.random.default_rng(number).integers(0, 256, (8, 8), dtype=np.uint8)
        image = Image.fromarray(coarse).resize((64, 64), Image.Resampling.BICUBIC)
        image.save(folder / f"class{number % CLASSES}" / f"{number:06}.png", compress_level=1)


def measure(root: Path, what: str, output: str = "out") -> bytes:
    """Run `prepare` in a process of its own, print what it takes, and return its manifest.

    The output "full" reads every file again.
    """
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    code = f"import resource\n{RUN}print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    done = subprocess.run([sys.executable, "-c", code, root, output], check=True, capture_output=True, text=True)
    after, wall = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter() - start
    counts, peak = done.stdout.splitlines()
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    print(
        f"{what:24} {cpu:8.1f} CPU s {wall:8.1f} s {int(peak) / 2**10:8.0f} MiB   images, near, known: {counts}",
        flush=True,
    )
    return (root / output / "manifest.parquet").read_bytes()


def main() -> None:
    """Draw the images, and measure three runs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--folder", type=Path, help="folder to keep the images in")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        root: Path = arguments.folder or Path(temporary)
        draw(root / "images", range(arguments.images))
        # Files that were written just now are not remembered.
        time.sleep(3)
        measure(root, "first run")
        measure(root, "second run")
        draw(root / "images", range(arguments.images, arguments.images + arguments.images // 100))
        partial = measure(root, "1% more images")
        print("the same manifest as a full run:", measure(root, "full run", "full") == partial)


if __name__ == "__main__":
    main()
