"""Queue learning rates as DVC experiments after one extraction, and check that the feature store does not change.

    python benchmarks/exp_queue.py STUDY                     a study with Git and DVC, which is updated first
    python benchmarks/exp_queue.py STUDY --rates 1e-3,2e-3

Runs `dvc repro`, queues one experiment per rate with `dvc exp run --queue -S train.lr=...`, runs the queue, and prints
the test AUC of each. It fails if a stage before `train` ran, or if any file of the feature store was created, changed
or removed, because then the LPM would have run again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from pipeline.project import cache_root

RATES = "1e-4,2e-4,3e-4,5e-4,7e-4,1e-3,1.5e-3,2e-3"
BEFORE_TRAINING = {"demo-data", "prepare", "extract"}


def main() -> None:
    """Parse the arguments, run the queue, and print the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path, help="folder of params.yaml and dvc.yaml")
    parser.add_argument("--rates", default=RATES, help="values of train.lr")
    arguments = parser.parse_args()
    study, rates = arguments.study.absolute(), [float(rate) for rate in arguments.rates.split(",")]
    dvc(study, "repro", "evaluate")
    state = ["git", "status", "--porcelain", "--", "dvc.lock"]
    if subprocess.run(state, cwd=study, check=True, capture_output=True, text=True).stdout:
        # The queue starts from the last commit, where DVC needs the lock file to skip finished stages.
        raise SystemExit(
            "dvc.lock is not committed. Run: git add -f dvc.lock && git commit -m 'Add lock'. Then repeat this command."
        )
    before = files_of_stores(study)
    if not before:
        raise SystemExit(f"There is no feature store at {cache_root(study)}.")
    names = queue(study, rates)
    start = time.perf_counter()
    # One worker, because parallel runs would compete for the cores.
    dvc(study, "exp", "run", "--run-all", "--jobs", "1")
    seconds = time.perf_counter() - start
    logs = {name: dvc(study, "queue", "logs", name) for name in names}
    repeated = {name: early for name, log in logs.items() if (early := BEFORE_TRAINING & set(stages(log)))}
    changed = before.items() ^ files_of_stores(study).items()
    aucs = results(study, names)
    print(f"{'train.lr':>10} {'test AUC':>9}  stages that ran")
    for rate, name in zip(rates, names, strict=True):
        print(f"{rate:10g} {aucs[name]:9.4f}  {', '.join(stages(logs[name])) or 'none, already cached'}")
    print(f"{len(rates)} experiments in {seconds:.1f} s, {seconds / len(rates):.1f} s each")
    print(f"Files of the feature store: {len(before)}, changed: {len({path for path, _ in changed})}")
    if repeated or changed:
        raise SystemExit(f"Stage one ran again: {repeated or sorted({path for path, _ in changed})[:5]}")
    print("No stage before train ran: the LPM made no forward pass.")


def queue(study: Path, rates: list[float]) -> list[str]:
    """Queue one experiment per rate, and return their names."""
    names = []
    for number, rate in enumerate(rates):
        name = f"queue-{time.time_ns():x}-{number}"
        dvc(study, "exp", "run", "--queue", "--name", name, "-S", f"train.lr={rate:g}", "evaluate")
        names.append(name)
    return names


def stages(log: str) -> list[str]:
    """Return the stages that ran, from a log of DVC."""
    return [line.split("'")[1] for line in log.splitlines() if line.startswith("Running stage '")]


def files_of_stores(study: Path) -> dict[str, tuple[int, int]]:
    """Return path -> (size, modification time) for all files of the stores of a study, except notes and locks."""
    return {
        str(path): (path.stat().st_size, path.stat().st_mtime_ns)
        for path in cache_root(study).rglob("*")
        if path.is_file() and not {"used-by", "locks"} & set(path.parts)
    }


def results(study: Path, names: list[str]) -> dict[str, float]:
    """Return experiment -> test AUC."""
    shown: list[dict[str, Any]] = json.loads(dvc(study, "exp", "show", "--json"))
    aucs = {}
    for commit in shown:
        for group in commit.get("experiments") or []:
            for revision in group["revs"]:
                if revision["name"] in names:
                    metrics = revision["data"]["metrics"]["outputs/evaluation/metrics.json"]
                    aucs[revision["name"]] = float(metrics["data"]["auc"])
    if absent := sorted(set(names) - aucs.keys()):
        raise SystemExit(f"These experiments failed: {', '.join(absent)}. Show their errors: dvc queue logs NAME")
    return aucs


def dvc(study: Path, *words: str) -> str:
    """Run a DVC command, and return its output."""
    done = subprocess.run([sys.executable, "-m", "dvc", *words], cwd=study, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"dvc {' '.join(words)} failed:\n{done.stdout}\n{done.stderr}")
    return done.stdout


if __name__ == "__main__":
    main()
