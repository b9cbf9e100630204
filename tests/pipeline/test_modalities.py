"""`fpt init --modality`: proposals are settings that work, with their reasons, and only where they were asked for."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from command_line import Fpt
from study_tools import draw_images

import fpt as api
from pipeline.doc_blocks import with_block
from pipeline.modality_tables import BEGIN, END, modalities_table
from pipeline.proposals import notes_on, propose
from schemas.errors import SettingsError
from schemas.modalities import GENERAL, GENERAL_SIZE, MODALITIES
from schemas.parse import parse_settings
from schemas.resolve import resolve
from schemas.settings import Settings
from stages.lpm.catalogue import find_model
from stages.lpm.loading import describe_lpm

MODELS = Path(__file__).parents[2] / "docs/models.md"


@pytest.mark.parametrize("name", MODALITIES)
def test_every_proposal_resolves_with_an_lpm_of_timm(name: str) -> None:
    settings = parse_settings(propose({}, MODALITIES[name]))
    lpm = describe_lpm(GENERAL, GENERAL_SIZE)
    assert resolve(settings, lpm).features.image_size == lpm.image_size == GENERAL_SIZE
    domain = MODALITIES[name].domain
    if domain is not None:
        # The page tells how its file is loaded, and with which architecture.
        rows = [line for line in MODELS.read_text().splitlines() if line.startswith(f"| {domain.title.split()[0]} ")]
        assert any(domain.name in line for line in rows)
        assert find_model(domain.name).name == domain.name


def test_licence_of_the_general_lpm_is_that_of_timm() -> None:
    assert find_model(GENERAL).cfg.license == "apache-2.0"


def test_the_page_is_generated_from_the_rows() -> None:
    text = MODELS.read_text(encoding="utf-8")
    assert with_block(text, BEGIN, END, modalities_table()) == text


def test_a_study_has_the_proposals_and_their_reasons(tmp_path: Path, fpt: Fpt) -> None:
    draw_images(tmp_path / "images", per_class=3)
    words = ("--images", "images", "--modality", "ct", "--set", "features.resize=squash")
    _, err = fpt("init", "study", *words, cwd=tmp_path)
    assert "Proposed for CT slices" in err
    text = (tmp_path / "study/params.yaml").read_text()
    params = yaml.safe_load(text)
    assert (params["lpm"]["name"], params["features"]["image_size"]) == (GENERAL, GENERAL_SIZE)
    assert params["features"]["window"] == [40.0, 400.0]
    assert params["features"]["resize"] == "squash"
    comments = " ".join(line.removeprefix("# ") for line in text.splitlines() if line.startswith("#"))
    for reason in notes_on(MODALITIES["ct"]):
        assert reason in comments
    parse_settings(params)


def test_without_the_option_the_published_lpm_stays(tmp_path: Path) -> None:
    draw_images(tmp_path / "images", per_class=3)
    api.init(tmp_path / "study", tmp_path / "images", version_control=False)
    text = (tmp_path / "study/params.yaml").read_text()
    assert "Proposed" not in text
    assert parse_settings(yaml.safe_load(text)).lpm == Settings().lpm
    study = api.init(tmp_path / "other", tmp_path / "images", version_control=False, modality="mammo")
    assert study.asked.features.resize == "letterbox"


def test_an_unknown_modality_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="did you mean 'fundus'"):
        api.init(tmp_path / "study", tmp_path, modality="fundis")
    assert not (tmp_path / "study").exists()
