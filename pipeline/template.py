"""Generate `params.yaml` and `dvc.yaml` of a study, for the demo and for `fpt init`."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any, Literal, get_args, get_origin

import yaml

from schemas.base import Contract
from schemas.settings import Settings

WIDTH = 110
"""Longest line of a generated comment."""

STAGES = """\
  prepare:
    desc: Read images and labels, name every image by its content, draw the splits.
    cmd: fpt prepare
    deps:
      - ${{data.images}}
{labels}{lists}    params:
      - data
      - features.window
      - features.frame
    outs:
      - outputs/manifest
  extract:
    # DVC does not track the features in the cache; it tracks the receipt, which lists those that later stages read.
    desc: Run the LPM once over every image that the cache does not hold yet.
    cmd: fpt extract
    deps:
      - outputs/manifest/manifest.parquet
{weights}    params:
      - method
      - lpm
      - features
      - train.side_image_size
    outs:
      - outputs/features
  train:
    desc: Train the method on the inputs that it reads.
    cmd: fpt train
    deps:
      - outputs/manifest/manifest.parquet
      - outputs/features/receipt.json
    params:
      - method
      - methods
      - train
    outs:
      - outputs/model
    metrics:
      - outputs/train/metrics.json
    plots:
      - outputs/train/plots/metrics:
          x: step
  evaluate:
    desc: Evaluate the model on the test split.
    cmd: fpt evaluate
    deps:
      - outputs/manifest/manifest.parquet
      - outputs/features/receipt.json
      - outputs/model
    outs:
      - outputs/evaluation/predictions.parquet
      - outputs/evaluation/report.html
      - outputs/evaluation/settings.yaml
    metrics:
      - outputs/evaluation/metrics.json
    plots:
      - outputs/evaluation/plots/confusion.csv:
          template: confusion
          x: predicted
          y: actual
      - outputs/evaluation/plots/roc.csv:
          x: fpr
          y: tpr
          template: simple
          title: ROC
"""
"""The four stages of every study. `params` are fine-grained: a change under `train` re-runs train and evaluate."""

DEMO_DATA = """\
  demo-data:
    desc: Draw the demo's images and fetch the weights of its LPM.
    cmd: fpt demo data
    outs:
      - ${data.images}
      - ${lpm.weights}
"""

BASELINE = """\
  baseline:
    desc: The same side network without the cached features, on the same images and splits.
    cmd:
      - fpt train --method side --output outputs/baseline
      - fpt evaluate --model outputs/baseline/model --output outputs/baseline/evaluation
    deps:
      - outputs/manifest/manifest.parquet
      - outputs/features/receipt.json
    params:
      - train
    outs:
      - outputs/baseline/model
      - outputs/baseline/train
      - outputs/baseline/evaluation/plots
      - outputs/baseline/evaluation/predictions.parquet
      - outputs/baseline/evaluation/report.html
      - outputs/baseline/evaluation/settings.yaml
    metrics:
      - outputs/baseline/evaluation/metrics.json
"""

HEAD = """\
# The pipeline of this study: `dvc repro` runs the stages that are out of date, `dvc dag` draws them.
# Try settings with `dvc exp run -S train.lr=0.001` and compare them:
# dvc exp show --drop '.*' --keep 'Experiment|^method$|^train\\.(lr|epochs)$|^val\\.(loss|auc)$|^auc$|^accuracy$'
"""


DEMO_HEAD = """\
The demo: `make demo` in a copy of the repository, `fpt demo run` anywhere else.
200 images that the demo draws itself, 518 x 518 pixels. Their class is the direction of a faint fine grating, gone at
128 pixels. DINOv2 ViT-S/14 reads them once; FPT-X then trains on the cached features.
Time: some minutes on two cores, most of it in `extract`. Disk: about 1 GiB with the weights.
Expect a test AUC of at least 0.90 with the cached features, and under 0.65 for the side network without them.
Every key is listed; `fpt init` writes the same file for your own images."""

DEMO = {
    "data": {"images": "data/demo"},
    "lpm": {
        "name": "vit_small_patch14_dinov2.lvd142m",
        "weights": "weights/vit_small_patch14_dinov2.safetensors",
    },
    "features": {"image_size": 518},
}
"""Settings of the demo study that are not defaults."""


def four_stages(*, labels: bool, weights: bool, lists: Sequence[str] = ()) -> str:
    """Return the stages prepare, extract, train and evaluate as the YAML of `dvc.yaml`.

    Args:
        labels: Whether `data.labels` names a CSV that DVC should watch.
        weights: Whether `lpm.weights` names a local file that DVC should watch.
        lists: Splits of which `data.split_files` names a file that DVC should watch.
    """
    # DVC would take a dependency that is null or "hub" for the name of a file.
    return STAGES.format(
        labels=_dependency("data.labels", labels),
        lists="".join(_dependency(f"data.split_files.{split}", True) for split in lists),
        weights=_dependency("lpm.weights", weights),
    )


def _dependency(key: str, watched: bool) -> str:
    entry = f"- ${{{key}}}"
    return f"      {entry}\n" if watched else f"      # {entry}  # remove the first # once it names a file\n"


def dvc_yaml(*, labels: bool, weights: bool, lists: Sequence[str] = ()) -> str:
    """Return `dvc.yaml` of a study."""
    return f"{HEAD}stages:\n{four_stages(labels=labels, weights=weights, lists=lists)}"


def demo_dvc_yaml() -> str:
    """Return `dvc.yaml` of the demo study: its data, the four stages, and a baseline."""
    return f"{HEAD}stages:\n{DEMO_DATA}{four_stages(labels=False, weights=True)}{BASELINE}"


def params_yaml(settings: Settings, head: str = "") -> str:
    """Return `params.yaml` with every key, its value, and its description from the schema.

    Args:
        settings: Values of the keys.
        head: First lines, without `#`.
    """
    lines = [f"# {line}".rstrip() for line in head.splitlines()]
    return "\n".join([*lines, *([""] if lines else []), *_section(settings, "")]) + "\n"


def wrapped(paragraphs: Sequence[str]) -> list[str]:
    """Return the lines of paragraphs for the head of `params.yaml`, each with a blank line before it."""
    return [line for text in paragraphs for line in ("", *textwrap.wrap(text, WIDTH - 2))]


def _section(model: Contract, indent: str) -> list[str]:
    lines: list[str] = []
    for name, field in type(model).model_fields.items():
        value = getattr(model, name)
        comment = _comment(field.description or "", field.annotation)
        if not indent and isinstance(value, Contract) and lines:
            lines.append("")
        lines += [f"{indent}# {line}" for line in textwrap.wrap(comment, WIDTH - len(indent) - 2)]
        if isinstance(value, Contract):
            lines += [f"{indent}{name}:", *_section(value, indent + "  ")]
        else:
            lines.append(f"{indent}{name}: {_flow(value)}")
    return lines


def _comment(description: str, annotation: Any) -> str:
    choices = [str(choice) for choice in get_args(annotation)] if get_origin(annotation) is Literal else []
    if all(choice in description for choice in choices):
        return description
    return f"{description} Choices: {'|'.join(choices)}."


def _flow(value: Any) -> str:
    plain = list(value) if isinstance(value, tuple) else value
    text = yaml.safe_dump(plain, default_flow_style=True, allow_unicode=True, width=10_000)
    return text.removesuffix("...\n").strip()
