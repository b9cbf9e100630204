"""A study: its folders, its resolved settings, and the cache that all its copies share."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.console import say
from pipeline.params import PARAMS, load_settings
from schemas.data_settings import DataSettings
from schemas.errors import FptError
from schemas.features import LpmInfo
from schemas.resolved import ResolvedSettings
from schemas.settings import OUTPUTS, Precision, Settings

if TYPE_CHECKING:
    from schemas.manifest import Manifest
    from stages.train.inputs import StudyFiles

CACHE_VARIABLE = "FPT_CACHE_DIR"


@dataclass(frozen=True)
class Study:
    """A study with resolved settings."""

    root: Path
    """Folder of `params.yaml`; relative paths of the settings start here."""
    settings: ResolvedSettings
    """Without "auto" in `features` and `train`."""
    lpm: LpmInfo
    """Shape of the LPM at the resolved image size."""
    cache: Path
    """Root of the feature stores."""
    asked: Settings
    """As written, with the overrides, before "auto" was resolved."""
    params: Path = Path(PARAMS)
    """The file of the settings."""
    assignments: tuple[str, ...] = ()
    """`key.path=value` overrides that the settings include."""

    @property
    def outputs(self) -> Path:
        """Folder of all results."""
        return self.root / OUTPUTS

    @property
    def manifest_folder(self) -> Path:
        """Folder in which `fpt prepare` writes the manifest."""
        return self.outputs / "manifest"

    @property
    def splits(self) -> Path:
        """Folder of the split of every image that was drawn before; shared with temporary copies."""
        return splits_folder(self.root)

    @cached_property
    def manifest(self) -> Path:
        """The manifest's file, or its last copy if the file is missing.

        DVC deletes the outputs of a stage before it runs the stage again: a run that failed leaves no manifest.
        """
        return manifest_file(self.root, self.settings.data)

    @property
    def receipt(self) -> Path:
        """The receipt of the extraction."""
        return self.outputs / "features" / "receipt.json"

    @property
    def remote(self) -> str | None:
        """`store.remote`; a relative folder starts at the study's."""
        return remote_store(self.settings, self.root)

    def files(self, manifest: Manifest) -> StudyFiles:
        """What training and evaluation read; without a receipt where nothing was extracted."""
        from stages.store.extraction_receipt import read_extraction_receipt
        from stages.train.inputs import StudyFiles

        return StudyFiles(
            manifest=manifest,
            lpm=self.lpm,
            receipt=read_extraction_receipt(self.receipt) if self.receipt.exists() else None,
            cache_root=self.cache,
            root=self.root,
            data=self.settings.data,
            weights=self.settings.lpm,
            remote=self.remote,
        )

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints of unfinished trainings, named by what they train; shared with temporary copies."""
        return original_study(self.root) / ".fpt" / "checkpoints"


def splits_folder(root: Path) -> Path:
    """Return the folder of the earlier splits of the study in `root`."""
    return original_study(root) / ".fpt" / "splits"


def index_folder(root: Path) -> Path | None:
    """Return the folder that remembers what was read of each image file; None for a temporary copy of a study."""
    original = original_study(root)
    return original / ".fpt" / "images" if original == root.resolve() else None


def manifest_file(root: Path, data: DataSettings) -> Path:
    """Return the manifest of the study in `root`, or its last copy if the file is missing."""
    from stages.prepare.split_history import manifest_copy

    written = root / OUTPUTS / "manifest" / "manifest.parquet"
    copy = manifest_copy(splits_folder(root), data)
    if written.exists() or not copy.exists():
        return written
    say(f"The manifest {written} is missing: taking the copy of the last `fpt prepare` with these split settings.")
    return copy


def open_study(params: Path, assignments: Sequence[str] = ()) -> Study:
    """Read, override, validate and resolve the settings of a study.

    Args:
        params: Path of `params.yaml`.
        assignments: `key.path=value` overrides.

    Raises:
        ProjectError: The file does not exist.
        SettingsError: With every problem at once.
        UnsupportedModelError: The LPM is unknown or cannot be tapped.
    """
    settings = load_settings(params, assignments)
    root = params.absolute().parent
    cache = cache_root(root)

    def choose(partly: ResolvedSettings, lpm: LpmInfo) -> Precision:
        # Imported late, because it loads torch, which most commands that only read settings do not need.
        from stages.extract.precision import choose_precision

        return choose_precision(partly, lpm, cache)

    resolved, lpm = resolve_aloud(settings, root, choose)
    return Study(
        root=root,
        settings=resolved,
        lpm=lpm,
        cache=cache,
        asked=settings,
        params=params.absolute(),
        assignments=tuple(assignments),
    )


def study_files(params: Path, assignments: Sequence[str]) -> StudyFiles | None:
    """Return the files of the study of a `params.yaml`, for what is computed from its training images; None without it.

    Args:
        params: Settings of the study.
        assignments: `key.path=value` overrides; those of the images are left out, which belong to others.
    """
    from stages.manifest import read_manifest

    if not params.exists():
        return None
    try:
        study = open_study(params, [one for one in assignments if not one.startswith("data.")])
        return study.files(read_manifest(study.manifest))
    except FptError:
        return None


def resolve_aloud(
    settings: Settings, root: Path, choose_precision: Callable[[ResolvedSettings, LpmInfo], Precision] | None = None
) -> tuple[ResolvedSettings, LpmInfo]:
    """Resolve settings, and print a line if the image size moves to the LPM's patch grid."""
    from schemas.resolve import resolve
    from stages.lpm.loading import describe_lpm

    features = settings.features
    lpm = describe_lpm(settings.lpm.name, features.image_size, root, features.with_tokens)
    if lpm.image_size != features.image_size:
        grid = f"{lpm.patch} pixels" if lpm.map_widths else f"its {lpm.patch}-pixel patch"
        say(f"Image size {features.image_size} -> {lpm.image_size}: {lpm.name} needs a multiple of {grid}.")
    if choose_precision is None:
        return resolve(settings, lpm), lpm
    return resolve(settings, lpm, lambda partly: choose_precision(partly, lpm)), lpm


def cache_root(root: Path) -> Path:
    """Return the folder of the feature stores of the study in `root`.

    `FPT_CACHE_DIR` if it is set, else `.fpt/cache` of the study. An experiment that DVC runs in a temporary copy of the
    repository uses the cache of the original study: features are computed once.
    """
    folder = os.environ.get(CACHE_VARIABLE)
    if folder:
        return Path(folder).expanduser().absolute()
    return original_study(root) / ".fpt" / "cache"


def remote_store(settings: Settings, root: Path) -> str | None:
    """Return `store.remote` of the study in `root`; a relative folder starts at the study's."""
    remote = settings.store.remote
    if remote is None or "://" in remote or "::" in remote:
        return remote
    return str(original_study(root) / Path(remote).expanduser())


def original_study(root: Path) -> Path:
    """Return the study that `root` is a temporary copy of; `root` itself if it is not a copy.

    DVC puts such copies of a repository below `<repository>/.dvc/tmp/exps/`, in one more folder or two, by the kind
    of queue. The innermost folder with a `.dvc` is the copy's repository root.
    """
    here = root.resolve()
    copy = next((folder for folder in (here, *here.parents) if (folder / ".dvc").is_dir()), None)
    if copy is None:
        return here
    for folder in copy.parents:
        if folder.parts[-3:] == (".dvc", "tmp", "exps"):
            return folder.parents[2] / here.relative_to(copy)
    return here


def remind_to_watch(study: Study, key: str, value: str) -> None:
    """Print a line if DVC does not watch a file of the settings, whose changes would go unnoticed.

    Args:
        study: The study.
        key: Name of the setting, such as `data.labels`.
        value: Path of the file.
    """
    path = study.root / "dvc.yaml"
    if not path.is_file():
        return
    active = "\n".join(line.partition("#")[0] for line in path.read_text(encoding="utf-8").splitlines())
    if f"${{{key}}}" not in active and value not in active:
        say(f"DVC does not watch {value}. Add this line to the deps in {path}: - ${{{key}}}")


def extraction_log(root: Path) -> Path:
    """Return the log file of the extractions of the study in `root`; shared with temporary copies."""
    return original_study(root) / ".fpt" / "logs" / "extract.log"
