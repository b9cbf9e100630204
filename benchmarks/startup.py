"""Measure the start-up cost of verbs: CPU seconds and imported modules, on a study of twelve tiny images.

    python benchmarks/startup.py [--runs 5]

Prints CPU time (user and system) instead of wall-clock time, which depends on other processes; one thread, warm file
cache.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

VERBS = ("--help", "prepare", "doctor", "predict images/dark/0.png")
HEAVY = ("torch", "torch._dynamo", "torchvision", "timm", "zarr", "sklearn", "scipy", "matplotlib", "pyarrow", "dask")
SETTINGS = """\
method: fpt+
data: {images: images}
lpm: {name: test_vit, weights: lpm.safetensors}
features: {image_size: 64, shard_size: 4, side_image_size: 32}
train: {epochs: 1, side_image_size: 32, side_reduction: 4}
"""
PROBE = """\
import sys
from pipeline.cli import main
try:
    main(sys.argv[1:])
except SystemExit:
    print("MODULES", len(sys.modules), *(n for n in {heavy!r} if n in sys.modules), file=sys.stderr)
"""


def make_study(folder: Path) -> None:
    """Write images and weights, and train a model."""
    import numpy as np
    import timm
    from PIL import Image
    from safetensors.torch import save_file

    rng = np.random.default_rng(0)
    for name, base in (("bright", 120), ("dark", 0)):
        (folder / "images" / name).mkdir(parents=True)
        for number in range(6):
            pixels = (rng.integers(0, 120, (64, 64, 3)) + base).astype(np.uint8)
            Image.fromarray(pixels).save(folder / "images" / name / f"{number}.png")
    save_file(timm.create_model("test_vit", pretrained=False).state_dict(), folder / "lpm.safetensors")
    (folder / "params.yaml").write_text(SETTINGS)
    for verb in ("prepare", "extract", "train"):
        subprocess.run([sys.executable, "-m", "pipeline", verb], cwd=folder, check=True, capture_output=True)


def measure(verb: str, folder: Path) -> tuple[float, list[str]]:
    """Return the CPU seconds of one run, and the number of its modules with the names of the heavy ones."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-c", PROBE.format(heavy=HEAVY), *verb.split()]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    modules = next(line for line in done.stderr.splitlines() if line.startswith("MODULES")).split()[1:]
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, modules


def main() -> None:
    """Measure each verb several times and print the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    runs = parser.parse_args().runs
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_study(folder)
        results_of = {verb: [measure(verb, folder) for _ in range(runs)] for verb in VERBS}
    print(f"{'verb':<28}{'CPU s':>7}{'modules':>9}  heavy modules")
    for verb, results in results_of.items():
        seconds = statistics.median(seconds for seconds, _ in results)
        count, *heavy = results[-1][1]
        print(f"{verb:<28}{seconds:>7.2f}{count:>9}  {', '.join(heavy)}")


if __name__ == "__main__":
    main()
