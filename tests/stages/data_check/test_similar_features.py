"""Images with nearly the same cached features are found after an extraction."""

from __future__ import annotations

from pathlib import Path

from PIL import Image
from study import make_study

from schemas.data_check import Copies
from stages.data_check.check import read_data
from stages.data_check.similar_features import find_similar_features


def test_a_brighter_copy_has_similar_features(tmp_path: Path) -> None:
    study = make_study(tmp_path, per_class=12)
    source = study.root / "images/plain/0-003.png"
    Image.open(source).point(lambda value: value + 1).save(study.root / "images/plain/copy.png")
    study.prepare()
    receipt = study.extract()
    read = read_data(study.settings.data, study.root)
    found = find_similar_features(read, study.cache, receipt)
    assert found is not None and found[0].paths == ("plain/0-003.png", "plain/copy.png")
    assert found[0].similarity > 0.9 and isinstance(found[0], Copies)


def test_few_images_and_images_without_features(tmp_path: Path) -> None:
    study = make_study(tmp_path, per_class=4)
    receipt = study.extract()
    assert find_similar_features(read_data(study.settings.data, study.root), study.cache, receipt) is None
    Image.new("L", (64, 64), 9).save(study.root / "images/plain/new.png")
    assert find_similar_features(read_data(study.settings.data, study.root), study.cache, receipt) is None
