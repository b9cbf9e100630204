"""The registry of methods: settings, help texts, saved specs and cost read the same rows."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from command_line import Fpt, command_line
from pydantic import ValidationError

from schemas.errors import BundleError, SettingsError
from schemas.features import FeatureSpec, LpmInfo
from schemas.methods import METHODS, METHODS_HELP, model_inputs
from schemas.parse import parse_settings
from schemas.probe_specs import KnnSpec, LinearSpec, PooledSpec, RidgeSpec, StatisticsSpec
from schemas.resolve import feature_spec, resolve
from schemas.results import BundleSpec
from schemas.settings import TrainSettings
from schemas.specs import (
    AdaptationSpec,
    AdaptedLpmSpec,
    AlfSpec,
    AttentiveSpec,
    FinetuneSpec,
    LoffTaSpec,
    MethodSpec,
    SideNetworkSpec,
)
from schemas.statistics import ProbeRule, output_vectors
from stages.methods.base import ClosedFormMethod, GradientMethod, build_model, method_of
from stages.train.bundle import load_bundle
from stages.train.bundle_spec import encode_spec, read_spec

LPM = LpmInfo(
    name="test_vit", depth=6, width=64, heads=2, patch=16, prefix_tokens=1, has_class_token=True, image_size=64,
    mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), interpolation="bicubic", mlp_width=192,
)  # fmt: skip
CLASSES = ("a", "b", "c")
LAYERS = (3, 4, 5)
FEATURES = FeatureSpec(
    lpm=LPM, weights_sha256="0" * 64, layers=LAYERS, importance="global", kept=3, dtype="float16", side_image_size=144,
    statistics=True,
)  # fmt: skip
SOURCES = FEATURES.probe_sources("all")


def side_network(method: str, **changes: Any) -> SideNetworkSpec:
    raw = {
        "method": method, "classes": 3, "layers": 3, "lpm_width": 64, "heads": 2, "width": 16, "image_size": 32,
        "prompts": 4, "dropout": 0.5, **changes,
    }  # fmt: skip
    return SideNetworkSpec.model_validate(raw)


def test_the_help_of_the_ensemble_weight_states_that_of_every_method() -> None:
    description = TrainSettings.model_fields["probe_weight"].description or ""
    weights = {name: row.preset.probe_weight for name, row in METHODS.items() if row.preset.probe_weight}
    assert weights == {name: float(weight) for weight, name in re.findall(r"(0\.\d+)\s+for\s+([\w-]+)", description)}


def finetuned(**changes: Any) -> FinetuneSpec:
    raw = {"lpm": "test_vit", "image_size": 64, "depth": 6, "first_block": 4, "everything": False, "hidden": None}
    return FinetuneSpec.model_validate({"classes": 3, **raw, **changes})


def probes(method: str, rule: ProbeRule) -> StatisticsSpec:
    sources = FEATURES.probe_sources(rule)
    return StatisticsSpec(method=method, classes=3, sources=sources, shares=(1 / len(sources),) * len(sources))


STATISTICS = FEATURES.segments
VECTORS = output_vectors(STATISTICS, 64)

EXAMPLES: dict[str, MethodSpec] = {
    "fpt": side_network("fpt"),
    "fpt+": side_network("fpt+", task="ordinal"),
    "fpt-x": side_network("fpt-x", members=2, attentive=1, attentive_weight=0.1, probe_weight=0.5, sources=SOURCES),
    "fpt-x-kept": side_network("fpt-x-kept", members=2, probe_weight=0.5, sources=FEATURES.probe_sources("kept")),
    "side": side_network("side"),
    "statistics": probes("statistics", "all"),
    "ridge": RidgeSpec(
        classes=3,
        sources=(central := FEATURES.probe_sources("central")),
        shares=(1 / len(central),) * len(central),
        penalties=(0.1,) * len(central),
    ),
    "covariance": probes("covariance", "covariance"),
    "all-block-linear": probes("all-block-linear", "every block"),
    "linear": LinearSpec(classes=3, features=128, c=0.1),
    "knn": KnnSpec(classes=3, features=128, rows=20, neighbours=5, task="multilabel"),
    "attentive": AttentiveSpec(classes=3, layers=3, lpm_width=64, heads=2, queries=4),
    "alf": AlfSpec(classes=3, lpm_width=64, vectors=VECTORS, heads=12, dropout=0.1),
    "loff-ta": LoffTaSpec(
        classes=3, hidden=4, lpm_width=64, grid=4, prefix_tokens=1, pooled_grid=4, width=24, blocks=2, heads=3
    ),
    "finetune": finetuned(),
}
"""A saved spec of each method with fields of its own."""


def example(name: str) -> MethodSpec:
    """Return a saved spec of a method: its own, that of any adaptation, or that of any closed form."""
    if name in EXAMPLES:
        return EXAMPLES[name]
    raw: dict[str, Any] = {"method": name, "classes": 3, "features": 128}
    if METHODS[name].spec is AdaptationSpec:
        shape = {"depth": 6, "width": 64, "heads": 2, "mlp_width": 192, "patch": 16, "prefix_tokens": 1}
        raw = {
            "method": name,
            "classes": 3,
            "lpm": "test_vit",
            "image_size": 64,
            "first_block": 4,
            "hidden": 4,
            **shape,
        }
    return METHODS[name].spec.model_validate(raw)


SPECS: dict[str, MethodSpec] = {name: example(name) for name in METHODS}
"""A saved spec of every method."""


def bundle(spec: MethodSpec, **features: Any) -> BundleSpec:
    settings = resolve(parse_settings({"method": "fpt+", "train": {"side_reduction": 4}}), LPM)
    read = feature_spec(settings, LPM, "0" * 64).model_copy(update={"layers": LAYERS, "hidden": 4, **features})
    return BundleSpec(
        classes=CLASSES, network=spec, features=FeatureSpec.model_validate(read.model_dump()), train=settings.train,
        best_epoch=1, val_auc=0.5, learnable=7, weights_sha256="0" * 64,
    )  # fmt: skip


def save(folder: Path, content: dict[str, Any]) -> None:
    """Write a `model.json` whose digest fits its content."""
    from schemas.base import digest

    (folder / "model.json").write_text(json.dumps({**content, "sha256": digest(content)}))


@pytest.fixture
def fpt(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Fpt:
    return command_line(capsys, monkeypatch)


def test_every_row_is_filed_under_its_name_and_has_all_texts() -> None:
    assert list(METHODS) == [row.name for row in METHODS.values()] == list(SPECS)
    assert len({row.title for row in METHODS.values()}) == len(METHODS)
    for name, row in METHODS.items():
        assert row.title, name
        assert row.help, name
        assert f"{name} ({row.help})" in METHODS_HELP


@pytest.mark.parametrize("name", METHODS)
def test_the_module_of_a_row_implements_it_as_it_is_trained(name: str) -> None:
    kind = ClosedFormMethod if METHODS[name].closed_form else GradientMethod
    assert isinstance(method_of(name), kind)
    assert type(SPECS[name]) is METHODS[name].spec


@pytest.mark.parametrize("value", ["ftp", "", "FPT+", 3, None, ["fpt"]])
def test_an_unknown_method_in_settings_is_an_error_with_its_path_and_all_names(value: Any) -> None:
    with pytest.raises(SettingsError) as caught:
        parse_settings({"method": value, "train": {"lr": -1}})
    problems = dict(caught.value.problems)
    assert set(problems) == {"method", "train.lr"}
    if isinstance(value, str):
        for name in METHODS:
            assert repr(name) in problems["method"], name


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_accepted_in_settings_and_resolved(name: str) -> None:
    raw = {"method": name, "features": {"hidden": 4}, "train": {"side_reduction": 4}}
    settings = resolve(parse_settings(raw), LPM)
    assert settings.method == name
    assert METHODS[name].reads(settings) >= METHODS[name].inputs
    assert METHODS[name].reads(settings), "a method reads something"


@pytest.mark.parametrize(
    ("raw", "hidden", "source", "reads"),
    [
        ({}, None, "image", {"image"}),
        ({}, 4, "hidden", {"hidden"}),
        ({"blocks": 1}, 4, "hidden", {"hidden"}),
        ({"blocks": 3}, 4, "image", {"image"}),
        ({"blocks": "all"}, 0, "image", {"image"}),
        ({"source": "image"}, 4, "image", {"image"}),
    ],
)
def test_what_fine_tuning_reads(raw: dict[str, Any], hidden: int | None, source: str, reads: set[str]) -> None:
    settings = parse_settings({"method": "finetune", "features": {"hidden": hidden}, "methods": {"finetune": raw}})
    resolved = resolve(settings, LPM)
    assert resolved.methods.finetune.source == source
    assert METHODS["finetune"].reads(resolved) == reads


@pytest.mark.parametrize(
    ("raw", "hidden", "path", "words"),
    [
        ({"blocks": 7}, None, "methods.finetune.blocks", "at most 6"),
        ({"source": "hidden"}, None, "methods.finetune.source", "features.hidden: 4"),
        ({"source": "hidden", "blocks": 4}, 4, "methods.finetune.source", "features.hidden: 2"),
        ({"source": "hidden", "blocks": "all"}, 0, "methods.finetune.source", "embeddings"),
    ],
)
def test_settings_of_fine_tuning_that_do_not_fit(
    raw: dict[str, Any], hidden: int | None, path: str, words: str
) -> None:
    settings = parse_settings({"method": "finetune", "features": {"hidden": hidden}, "methods": {"finetune": raw}})
    with pytest.raises(SettingsError) as caught:
        resolve(settings, LPM)
    problems = dict(caught.value.problems)
    assert set(problems) == {path}
    assert words in problems[path]


@pytest.mark.parametrize("verb", ["train", "cost"])
def test_help_lists_every_method(verb: str, fpt: Fpt, tmp_path: Path) -> None:
    out, _ = fpt(verb, "--help", cwd=tmp_path)
    listed = set(re.split(r"[^\w+-]+", out))
    assert set(METHODS) <= listed


@pytest.mark.parametrize("spec", [*SPECS.values(), finetuned(hidden=4), finetuned(first_block=0, everything=True)])
def test_a_saved_spec_comes_back_as_its_class_with_every_field(spec: MethodSpec) -> None:
    saved = bundle(spec)
    loaded = BundleSpec.model_validate_json(saved.model_dump_json())
    assert type(loaded.network) is METHODS[spec.method].spec
    assert loaded.network == spec
    assert loaded == saved
    assert loaded.fitted_splits == spec.fitted_splits
    assert model_inputs(loaded.network) == model_inputs(spec) != frozenset()
    assert loaded.model_dump(mode="json")["network"] == spec.model_dump(mode="json")


@pytest.mark.parametrize("name", METHODS)
def test_a_model_json_is_read_and_its_network_built(name: str, tmp_path: Path) -> None:
    (tmp_path / "model.json").write_bytes(encode_spec(bundle(SPECS[name])))
    spec = read_spec(tmp_path)
    assert spec.network == SPECS[name]
    assert build_model(spec.network).spec == SPECS[name]


@pytest.mark.parametrize("name", ["fpt++", "", None, 3, ["fpt"], {"fpt": 1}])
def test_an_unknown_method_in_a_model_json_is_of_another_version(name: Any, tmp_path: Path) -> None:
    content = bundle(SPECS["fpt+"]).model_dump(mode="json")
    save(tmp_path, content)
    assert read_spec(tmp_path).network == SPECS["fpt+"], "what is refused below is the method only"
    content["network"]["method"] = name
    save(tmp_path, content)
    for read in (read_spec, load_bundle):
        with pytest.raises(BundleError, match="written by another version") as caught:
            read(tmp_path)
        assert "fpt train" in str(caught.value)


@pytest.mark.parametrize("name", METHODS)
def test_fields_of_another_method_are_refused(name: str) -> None:
    raw = SPECS[name].model_dump(mode="json")
    for other, row in METHODS.items():
        if row.spec is METHODS[name].spec:
            continue
        content = bundle(SPECS[name]).model_dump(mode="json")
        content["network"] = {**raw, "method": other}
        with pytest.raises(ValidationError):
            BundleSpec.model_validate(content)


@pytest.mark.parametrize(
    "spec",
    [
        *(spec for name, spec in SPECS.items() if name != "side" and not isinstance(spec, PooledSpec | FinetuneSpec)),
        finetuned(hidden=4),
    ],
)
def test_a_model_of_other_features_is_refused(spec: MethodSpec, tmp_path: Path) -> None:
    (tmp_path / "model.json").write_bytes(encode_spec(bundle(spec)))
    assert read_spec(tmp_path).network == spec
    others: dict[str, Any] = {"layers": (4, 5)}
    if isinstance(spec, AdaptedLpmSpec | LoffTaSpec):
        others = {"hidden": 3}
    if isinstance(spec, AlfSpec):
        others = {"statistics": False}
    if isinstance(spec, StatisticsSpec | RidgeSpec):
        # Statistics of every block begin elsewhere without a class token; tapped layers do not matter to them.
        others = {"lpm": LPM.model_copy(update={"has_class_token": False})}
    (tmp_path / "model.json").write_bytes(encode_spec(bundle(spec, **others)))
    with pytest.raises(BundleError, match="cannot be understood"):
        read_spec(tmp_path)
