from pathlib import Path

import pytest

from pipeline.project import CACHE_VARIABLE, cache_root, open_study, original_study, remind_to_watch
from schemas.errors import SettingsError


@pytest.fixture(autouse=True)
def no_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(CACHE_VARIABLE, raising=False)


def repository(folder: Path) -> Path:
    (folder / ".dvc").mkdir(parents=True)
    return folder


def test_the_cache_lies_in_the_study(tmp_path: Path) -> None:
    assert cache_root(tmp_path) == tmp_path / ".fpt" / "cache"


def test_the_variable_names_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "shared"))
    assert cache_root(tmp_path / "study") == tmp_path / "shared"


@pytest.mark.parametrize("queue", ["tmpabc", "standalone/tmpabc"])
@pytest.mark.parametrize("inner", [".", "studies/one"])
def test_a_temporary_copy_uses_the_cache_of_the_original(tmp_path: Path, queue: str, inner: str) -> None:
    original = repository(tmp_path / "repo")
    copy = repository(original / ".dvc" / "tmp" / "exps" / queue)
    assert original_study(copy / inner) == (original / inner).resolve()
    assert cache_root(copy / inner) == (original / inner).resolve() / ".fpt" / "cache"


def test_a_dvc_project_in_a_subfolder_of_the_git_repository(tmp_path: Path) -> None:
    study = repository(tmp_path / "repo" / "studies" / "one")
    copy = study / ".dvc" / "tmp" / "exps" / "standalone" / "tmpabc"
    repository(copy / "studies" / "one")
    assert original_study(copy / "studies" / "one") == study.resolve()


def test_a_study_in_a_project_is_no_copy(tmp_path: Path) -> None:
    repository(tmp_path)
    assert original_study(tmp_path / "one") == (tmp_path / "one").resolve()


def test_a_moved_image_size_is_said_aloud(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("stages.lpm.loading")
    (tmp_path / "params.yaml").write_text("lpm: {name: vit_small_patch14_dinov2.lvd142m}\n")
    study = open_study(tmp_path / "params.yaml")
    assert study.settings.features.image_size == study.lpm.image_size == 518
    captured = capsys.readouterr()
    assert "512 -> 518" in captured.err
    assert captured.out == ""


def test_nothing_is_said_where_the_size_fits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("stages.lpm.loading")
    (tmp_path / "params.yaml").write_text("lpm: {name: test_vit}\nfeatures: {image_size: 64}\n")
    study = open_study(tmp_path / "params.yaml", ["features.layers=[0]"])
    assert study.settings.features.layers == (0,)
    assert study.root == tmp_path
    assert capsys.readouterr().err == ""


def test_settings_that_do_not_fit_the_lpm(tmp_path: Path) -> None:
    pytest.importorskip("stages.lpm.loading")
    (tmp_path / "params.yaml").write_text("lpm: {name: test_vit}\nfeatures: {image_size: 64, layers: [99]}\n")
    with pytest.raises(SettingsError, match=r"features\.layers"):
        open_study(tmp_path / "params.yaml")


@pytest.mark.parametrize(
    ("deps", "said"),
    [("- ${data.labels}", False), ("- labels.csv", False), ("# - ${data.labels}  # later", True), ("- x", True)],
)
def test_a_file_that_dvc_does_not_watch_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], deps: str, said: bool
) -> None:
    (tmp_path / "params.yaml").write_text("lpm: {name: test_vit}\nfeatures: {image_size: 64}\n")
    study = open_study(tmp_path / "params.yaml")
    remind_to_watch(study, "data.labels", "labels.csv")
    assert capsys.readouterr().err == ""
    (tmp_path / "dvc.yaml").write_text(f"stages:\n  prepare:\n    deps:\n      {deps}\n")
    remind_to_watch(study, "data.labels", "labels.csv")
    assert ("- ${data.labels}" in capsys.readouterr().err) is said


@pytest.mark.parametrize(
    ("named", "resolved"),
    [("s3://bucket/caches", "s3://bucket/caches"), ("../shared", "{root}/../shared"), ("/mnt/caches", "/mnt/caches")],
)
def test_a_remote_folder_starts_at_the_study(tmp_path: Path, named: str, resolved: str) -> None:
    (tmp_path / "params.yaml").write_text("lpm: {name: test_vit}\nfeatures: {image_size: 64}\n")
    assert open_study(tmp_path / "params.yaml").remote is None
    study = open_study(tmp_path / "params.yaml", [f"store.remote={named}"])
    assert study.remote == resolved.format(root=tmp_path.resolve())
