"""What holds for every adaptation of the LPM: published parameter counts, frozen weights, bundles, hidden tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from study import Study, evaluated_and_predicted, make_study
from torch import nn

from schemas.features import LpmInfo
from schemas.methods import METHODS
from schemas.parse import parse_settings
from schemas.resolve import resolve
from schemas.results import TrainResult
from schemas.specs import AdaptationSpec
from stages.lpm.loading import load_lpm
from stages.methods.adapted_lpm import AdaptedLpm
from stages.methods.base import gradient_method, learnable_parameters
from stages.train.trainer import train

VIT_B = LpmInfo(
    name="vit_base_patch16_224", depth=12, width=768, heads=12, patch=16, prefix_tokens=1, has_class_token=True,
    image_size=224, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), interpolation="bicubic", mlp_width=3072,
)  # fmt: skip
HEAD = 3_845
"""Parameters of the linear head: 768 * 5 + 5."""
COUNTS: list[tuple[str, dict[str, Any], int]] = [
    ("finetune", {"blocks": "all"}, 85_798_656),
    ("finetune", {"blocks": 1}, 7_089_408),
    ("ept", {}, 236_400),
    ("ept", {"prompts": 600}, 1_418_400),
    ("ept-lse", {}, 2_364),
    ("cvpt", {}, 92_160),
    ("cvpt", {"prompts": 20}, 184_320),
    ("dvpt", {}, 218_208),
    ("dvpt-release", {}, 202_836),
    ("apt", {}, 534_540),
    ("apt", {"prompts": 200}, 1_916_940),
    ("apt", {"zero_gate": True}, 534_552),
    ("vpt-shallow", {}, 7_680),
    ("vpt-deep", {}, 92_160),
    ("vpt-deep", {"prompts": 1}, 9_216),
    ("vpt-deep", {"prompts": 100}, 921_600),
    ("decomposed-prompts", {}, 37_344),
    ("decomposed-prompts", {"rank": 1}, 9_336),
    ("decomposed-prompts", {"freeze_u": True}, 36_864),
    ("vfpt", {}, 92_160),
    ("e2vpt", {}, 138_240),
    ("e2vpt", {"shared": False}, 184_320),
    ("e2vpt", {"prune": True}, 138_410),
    ("prefix", {"prompts": 10}, 184_320),
    ("prefix", {}, 294_912),
    ("pt-peft", {"prompts": 10}, 479_232),
    ("pt-peft", {}, 589_824),
    ("bitfit", {}, 102_912),
    ("ln-tune", {}, 38_400),
    ("attn-scale", {}, 144),
    ("attn-scale-matrix", {}, 465_708),
    ("ln-scale", {}, 38_544),
    ("dra", {}, 18_432),
    ("ssf", {}, 205_824),
    ("adapter", {}, 156_768),
    ("adapter", {"width": 96}, 1_779_840),
    ("adaptformer", {}, 1_189_632),
    ("mlp-3", {}, 1_181_184),
    ("lora", {"rank": 4}, 147_456),
    ("lora", {}, 294_912),
    ("lora", {"rank": 16}, 589_824),
    ("lora", {"freeze_a": True}, 221_184),
    ("dora", {}, 294_912 + 27_648),
    ("ia3", {}, 64_512),
    ("vera", {}, 12 * (256 + 2_304)),
]
"""Method, its settings, and the published parameter count without the head, of ViT-B/16 at 224 pixels."""
ADAPTATIONS = [name for name, row in METHODS.items() if row.spec is AdaptationSpec]
TINY: dict[str, dict[str, Any]] = {
    "ept": {"prompts": 3},
    "cvpt": {"prompts": 3},
    "dvpt": {"prompts": 3, "latent": 4},
    "dvpt_release": {"prompts": 3, "latent": 4},
    "apt": {"prompts": 3},
    "vpt": {"prompts": 3},
    "decomposed_prompts": {"prompts": 3, "rank": 2},
    "vfpt": {"prompts": 4},
    "e2vpt": {"prompts": 3, "kv_prompts": 2},
    "prefix": {"prompts": 3},
    "pt_peft": {"prompts": 3, "rank": 2},
    "adapter": {"width": 4},
    "adaptformer": {"width": 4},
    "lora": {"rank": 4},
    "vera": {"rank": 16},
}
"""Settings of small models, by section of `methods`."""
PLAIN = {"flip": 0.0, "brightness": 0.0, "contrast": 0.0, "crop_scale": (1.0, 1.0), "crop_ratio": (1.0, 1.0)}
"""Augmentation that changes nothing."""


@pytest.mark.parametrize(("name", "options", "expected"), COUNTS)
def test_the_number_of_learnable_parameters_is_the_published_one(
    name: str, options: dict[str, Any], expected: int
) -> None:
    section = METHODS[name].settings_section
    methods = {section: options} if options else {}
    raw = {"method": name, "lpm": {"name": VIT_B.name}, "features": {"image_size": 224}, "methods": methods}
    settings = resolve(parse_settings(raw), VIT_B)
    method = gradient_method(name)
    with torch.device("meta"):
        network = method.build(method.spec(settings, VIT_B, 5))
    assert learnable_parameters(network) == expected + HEAD


def study_at(root: Path, name: str, source: str, **train_changes: Any) -> Study:
    section = METHODS[name].settings_section
    options = {section: TINY[section]} if section in TINY else {}
    return make_study(
        root,
        method=name,
        features={"hidden": 3 if source == "hidden" else None, "dtype": "float32"},
        methods=options,
        train={"augment": PLAIN, "lr": 1e-2, "start_block": 3, "seed": 1, **train_changes},
    )


def run(study: Study) -> TrainResult:
    receipt = study.extract() if study.settings.features.hidden is not None else None
    return train(study.settings, study.files(receipt), study.root / "model", study.root / "checkpoints")


@pytest.mark.parametrize("name", ADAPTATIONS)
def test_hidden_tokens_give_the_model_of_images_which_predicts_as_it_is_evaluated(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    studies = [study_at(tmp_path / source, name, source) for source in ("hidden", "image")]
    image = run(studies[1])
    receipt = studies[0].extract()
    blocks = _count_blocks(monkeypatch)
    files = studies[0].files(receipt)
    hidden = train(studies[0].settings, files, studies[0].root / "model", studies[0].root / "checkpoints")
    # The lower blocks never run.
    assert blocks and min(blocks) >= 3
    for mine, other in zip(hidden.epochs, image.epochs, strict=True):
        assert mine.val_loss == pytest.approx(other.val_loss, abs=1e-4)
    assert hidden.learnable == image.learnable
    states = [load_file(study.root / "model/model.safetensors") for study in studies]
    assert states[0].keys() == states[1].keys()
    for key, value in states[0].items():
        torch.testing.assert_close(value, states[1][key], rtol=1e-2, atol=1e-3)
    for study, extracted in zip(studies, (receipt, None), strict=True):
        evaluated, predicted = evaluated_and_predicted(study, extracted)
        np.testing.assert_allclose(predicted, evaluated, atol=1e-4)


def _count_blocks(monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """Return a set to which every forward pass of a block of the LPM adds its number."""
    ran: set[int] = set()
    build = AdaptedLpm.__init__

    def watched(self: Any, spec: Any, lpm: Any, adaptation: Any) -> None:
        build(self, spec, lpm, adaptation)
        for number, block in enumerate(self.lpm.blocks):
            if any(True for _ in block.parameters()):
                block.register_forward_hook(lambda *_, number=number: ran.add(number))

    monkeypatch.setattr(AdaptedLpm, "__init__", watched)
    return ran


@pytest.mark.parametrize("name", ADAPTATIONS)
def test_only_what_is_trained_is_saved_and_the_lpm_does_not_move(tmp_path: Path, name: str) -> None:
    study = study_at(tmp_path, name, "image", start_block=0, epochs=1)
    lpm = load_lpm(study.settings.lpm, study.lpm.image_size, tmp_path).model
    before = {key: value.clone() for key, value in lpm.state_dict().items()}
    run(study)
    saved = load_file(tmp_path / "model/model.safetensors")
    assert {"lpm.head.weight", "lpm.head.bias"} <= saved.keys()
    method = gradient_method(name)
    network: Any = method.build(method.spec(study.settings, study.lpm, 3))
    network.start_from(lpm)
    learnt = {key for key, value in network.named_parameters() if value.requires_grad}
    assert learnt <= saved.keys() and {key for key in saved if key.startswith("lpm.")} <= learnt
    optimizer = torch.optim.SGD([value for value in network.parameters() if value.requires_grad], lr=1.0)
    pixels = torch.randn(2, 3, 64, 64)
    network.train()
    network.lpm(pixels).square().sum().backward()
    optimizer.step()
    for key, value in lpm.state_dict().items():
        assert torch.equal(value, before[key]), key
    frozen = [value for key, value in network.named_parameters() if key not in learnt]
    assert frozen and all(value.grad is None for value in frozen)


@pytest.mark.parametrize("name", ADAPTATIONS)
def test_what_is_folded_predicts_as_what_was_trained(tmp_path: Path, name: str) -> None:
    study = study_at(tmp_path, name, "image", start_block=0)
    method = gradient_method(name)
    torch.manual_seed(0)
    live: Any = method.build(method.spec(study.settings, study.lpm, 3))
    lpm = load_lpm(study.settings.lpm, study.lpm.image_size, tmp_path).model
    live.start_from(lpm)
    with torch.no_grad():
        for value in live.parameters():
            if value.requires_grad:
                value.add_(0.05 * torch.randn_like(value))
    state = {key: value.clone() for key, value in live.state_dict().items()}
    served: Any = method.build(live.spec)
    served.load_state_dict(state)
    served.use_lpm(lpm)
    pixels = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(served.eval().lpm(pixels), live.eval().lpm(pixels), rtol=1e-4, atol=1e-5)


def changed_at_start(name: str, tmp_path: Path) -> float:
    """Return how much the features of images differ from those of the LPM before training, relative to their size."""
    study = study_at(tmp_path, name, "image", start_block=0)
    lpm: Any = load_lpm(study.settings.lpm, study.lpm.image_size, tmp_path).model
    method = gradient_method(name)
    torch.manual_seed(0)
    network: Any = method.build(method.spec(study.settings, study.lpm, 3))
    network.start_from(lpm)
    network.eval()
    pixels = torch.randn(4, 3, 64, 64)
    with torch.no_grad():
        features = network.lpm.forward_head(network.lpm.forward_features(pixels), pre_logits=True)
        expected = lpm.forward_head(lpm.forward_features(pixels), pre_logits=True)
    assert isinstance(network, nn.Module)
    return float((features - expected).norm() / expected.norm())


IDENTICAL: set[str] = {
    "bitfit", "ln-tune", "attn-scale", "attn-scale-matrix", "ln-scale", "dra", "ssf", "adapter", "adaptformer", "lora",
    "dora", "ia3", "vera", "dvpt",
}  # fmt: skip
"""Adaptations that start as the LPM; the others are published with another start, which nobody should "fix"."""


@pytest.mark.parametrize("name", ADAPTATIONS)
def test_an_adaptation_starts_as_the_lpm_if_it_is_published_so(tmp_path: Path, name: str) -> None:
    change = changed_at_start(name, tmp_path)
    assert change < 1e-5 if name in IDENTICAL else change > 1e-3
