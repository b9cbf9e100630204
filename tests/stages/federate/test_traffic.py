"""Bytes that travel: the published parameter counts times four, and the sizes of what is really sent."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from federated_studies import run
from study import make_study

from schemas.features import LpmInfo
from schemas.federated import FederatedPlan
from schemas.parse import parse_settings
from schemas.resolve import resolve
from stages.federate.traffic import traffic_of, traffic_table

VIT_B = LpmInfo(
    name="vit_base_patch16_224", depth=12, width=768, heads=12, patch=16, prefix_tokens=1, has_class_token=True,
    image_size=224, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), interpolation="bicubic", mlp_width=3072,
)  # fmt: skip
BYTES: list[tuple[str, dict[str, Any], int]] = [
    ("finetune", {"blocks": "all"}, 343_210_004),
    ("fpt+", {}, 3_603_860),
    ("lora", {}, 1_195_028),
    ("lora", {"freeze_a": True}, 900_116),
    ("vpt-deep", {}, 384_020),
    ("decomposed-prompts", {}, 164_756),
    ("decomposed-prompts", {"rank": 1}, 52_724),
    ("ept-lse", {}, 24_836),
    # 3 folds of sums of 1,536 pooled outputs and three times 2,304 outputs of a block.
    ("ridge", {}, 8 * 3 * (6 + 8_448 * 6 + 1_536 * 1_537 // 2 + 3 * (2_304 * 2_305 // 2))),
]
"""Method, its settings, and bytes from a site per exchange: ViT-B/16 at 224 pixels with 5 classes."""


LEARNABLE = {"ridge": 42_245}
"""Parameters of methods that send something else."""


@pytest.mark.parametrize(("name", "options", "expected"), BYTES)
def test_bytes_are_those_of_the_published_parameter_counts(name: str, options: dict[str, Any], expected: int) -> None:
    raw = {"method": name, "features": {"image_size": 224}, "lpm": {"name": VIT_B.name}}
    settings = resolve(parse_settings({**raw, "methods": {name.replace("-", "_"): options} if options else {}}), VIT_B)
    (found,) = traffic_of(settings, VIT_B, 5, options)
    assert found.bytes == expected
    assert found.learnable == LEARNABLE.get(name, expected // 4)
    assert found.exchanges == ("once" if name == "ridge" else "each round")


def test_the_table_has_what_can_be_federated_and_its_bytes_are_what_is_sent(tmp_path: Path) -> None:
    study = make_study(tmp_path, features={"hidden": 3})
    receipt = study.extract()
    raw = study.settings.model_dump(mode="json", include={"data", "lpm", "features"})
    raw["train"] = {"side_image_size": 32, "epochs": 1, "side_reduction": 4}
    rows = {one.title: one for one in traffic_table(parse_settings({**raw, "method": "fpt+"}), study.lpm, 3)}
    assert {"FPT+", "fine-tuning", "fine-tuning, blocks: all", "LoRA, freeze_a: true", "LOFF-TA"} <= rows.keys()
    assert not {"FPT-X", "attentive layer fusion", "statistics probe", "k nearest neighbours"} & rows.keys()
    sizes = [one.bytes for one in rows.values()]
    assert sizes == sorted(sizes, reverse=True)
    for method, title in [("fpt+", "FPT+"), ("ept-lse", "EPT-lse"), ("ridge", "ridge regression on sums")]:
        settings = resolve(parse_settings({**raw, "method": method}), study.lpm)
        result = run(study, receipt, {"all": study.manifest}, FederatedPlan(rounds=1), settings=settings)
        assert result.up_bytes == rows[title].bytes, method
