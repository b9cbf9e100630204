"""Measure the time from cached features to a report: training and evaluation of a method, from a cold start.

    python benchmarks/report_speed.py STUDY                           a study with extracted features; statistics
    python benchmarks/report_speed.py STUDY --method fpt-x --runs 1

Ways take turns: `fpt train` and then `fpt evaluate`, `fpt train --evaluate`, and `fpt.train` and `fpt.evaluate` of the
Python API, which imports torch once as well. Medians of wall-clock seconds, with the time of every run; the page cache
is warm. Outputs go to a temporary folder.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

FPT = [sys.executable, "-m", "fpt"]
IN_PYTHON = """\
import sys, fpt
from pathlib import Path
method, output = sys.argv[1], Path(sys.argv[2])
study = fpt.open_study("params.yaml", method=method)
fpt.train(study, output=output)
fpt.evaluate(study, model=output / "model", output=output / "evaluation")
"""


def ways(method: str, folder: Path) -> dict[str, list[list[str]]]:
    """Return the commands of each way, with outputs of its own: a finished training would be resumed."""

    def train(output: Path) -> list[str]:
        return [*FPT, "train", "--method", method, "--output", str(output)]

    two, one, api = folder / "two", folder / "one", folder / "api"
    evaluate = [*FPT, "evaluate", "--model", str(two / "model"), "--output", str(two / "evaluation")]
    return {
        "fpt train, then fpt evaluate": [train(two), evaluate],
        "fpt train --evaluate": [[*train(one), "--evaluate"]],
        "Python API": [[sys.executable, "-c", IN_PYTHON, method, str(api)]],
    }


def measure(commands: list[list[str]], study: Path) -> float:
    """Return the seconds of some commands, one after the other."""
    began = time.perf_counter()
    for command in commands:
        subprocess.run(command, cwd=study, check=True, capture_output=True)
    return time.perf_counter() - began


def main() -> None:
    """Measure every way several times in turn, and print the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path, help="folder of params.yaml, with extracted features")
    parser.add_argument("--method", default="statistics")
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args()
    seconds: dict[str, list[float]] = {}
    for _ in range(options.runs):
        with tempfile.TemporaryDirectory() as folder:
            for name, commands in ways(options.method, Path(folder)).items():
                seconds.setdefault(name, []).append(measure(commands, options.study))
    print(f"{'from cached features to a report':<34}{'median s':>9}  every run")
    for name, values in seconds.items():
        print(f"{name:<34}{statistics.median(values):>9.1f}  {', '.join(f'{value:.1f}' for value in values)}")


if __name__ == "__main__":
    main()
