"""Every error has state, cause and repair, and survives pickling."""

from __future__ import annotations

import pickle
from collections.abc import Callable

import pytest

from schemas import errors
from schemas.errors import FptError

SAID = ("The state.", "The cause.", "The repair.")
MAKE: dict[str, Callable[[], FptError]] = {
    "SettingsError": lambda: errors.SettingsError("The state.", [("train.lr", "too high")], "The repair."),
    "ProjectError": lambda: errors.ProjectError(*SAID),
    "DataError": lambda: errors.DataError(*SAID),
    "ImageError": lambda: errors.ImageError("a/b.png", "truncated"),
    "UnreadableImagesError": lambda: errors.UnreadableImagesError([("a.png", "truncated")] * 25, "The repair."),
    "ManifestError": lambda: errors.ManifestError(*SAID),
    "UnsupportedModelError": lambda: errors.UnsupportedModelError(*SAID),
    "WeightsError": lambda: errors.WeightsError(*SAID),
    "StorageError": lambda: errors.StorageError(*SAID),
    "TransferError": lambda: errors.TransferError(*SAID),
    "CacheMismatchError": lambda: errors.CacheMismatchError(
        "The state.", {"lpm.depth": (12, 6)}, "The cause.", "The repair."
    ),
    "CacheIncompleteError": lambda: errors.CacheIncompleteError("The state.", ["0" * 64], "The cause.", "The repair."),
    "CacheCorruptError": lambda: errors.CacheCorruptError("The state.", "3", "The cause.", "The repair."),
    "TrainingError": lambda: errors.TrainingError(*SAID),
    "BundleError": lambda: errors.BundleError(*SAID),
    "EvaluationError": lambda: errors.EvaluationError(*SAID),
    "DeviceMemoryError": lambda: errors.DeviceMemoryError(*SAID),
    "ClusterError": lambda: errors.ClusterError(*SAID),
    "PlatformError": lambda: errors.PlatformError(*SAID),
}


def every_error() -> list[type[FptError]]:
    found, todo = [], [FptError]
    while todo:
        children = todo.pop().__subclasses__()
        found += children
        todo += children
    return [kind for kind in found if kind.__module__ == "schemas.errors"]


def test_every_leaf_is_tested_here() -> None:
    assert {kind.__name__ for kind in every_error()} == set(MAKE)


@pytest.mark.parametrize("name", MAKE)
def test_a_leaf_is_also_a_builtin_error(name: str) -> None:
    kind = getattr(errors, name)
    builtins = [base for base in kind.__mro__ if base.__module__ == "builtins"]
    assert builtins[0] not in (Exception, BaseException, object)


@pytest.mark.parametrize("name", MAKE)
def test_pickling_keeps_kind_message_and_fields(name: str) -> None:
    error = MAKE[name]()
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error)
    assert str(again) == str(error)
    assert again.__dict__ == error.__dict__
    # A second hop, as from a worker through a scheduler to the user.
    assert str(pickle.loads(pickle.dumps(again))) == str(error)


@pytest.mark.parametrize("name", sorted(set(MAKE) - {"ImageError"}))
def test_message_is_state_cause_repair(name: str) -> None:
    error = MAKE[name]()
    assert error.repair == "The repair."
    lines = str(error).splitlines()
    assert lines[0] == error.state
    assert lines[-1] == "The repair."
    assert str(error) == "\n".join((error.state, error.cause, error.repair))


def test_empty_parts_leave_no_empty_lines() -> None:
    assert str(errors.DataError("The state.")) == "The state."
    assert str(errors.DataError("The state.", repair="The repair.")) == "The state.\nThe repair."
    assert str(errors.StorageError("The state.")) == "The state."


def test_storage_error_is_an_os_error_that_keeps_its_words() -> None:
    error = errors.StorageError(*SAID)
    assert isinstance(error, OSError)
    assert str(error) == "The state.\nThe cause.\nThe repair."
    with pytest.raises(OSError, match="The cause"):
        raise error


def test_fields_of_the_leaves() -> None:
    assert errors.SettingsError("s", [("train.lr", "too high")]).problems == (("train.lr", "too high"),)
    assert "  train.lr: too high" in str(errors.SettingsError("s", [("train.lr", "too high")]))
    image = errors.ImageError("a/b.png", "truncated")
    assert (image.path, image.reason, str(image)) == ("a/b.png", "truncated", "a/b.png: truncated")
    mismatch = errors.CacheMismatchError("s", {"lpm.depth": (12, 6)}, cause="Why.")
    assert mismatch.differing == {"lpm.depth": (12, 6)}
    assert str(mismatch) == "s\n  lpm.depth: expected 12, found 6\nWhy."
    assert errors.CacheIncompleteError("s", ["a"]).missing == ("a",)
    assert errors.CacheCorruptError("s", "3").shard == "3"


def test_a_long_list_of_images_is_cut_but_kept() -> None:
    error = errors.UnreadableImagesError([(f"{i}.png", "truncated") for i in range(25)])
    assert str(error).startswith("25 images cannot be used.")
    assert "19.png" in str(error)
    assert "20.png" not in str(error)
    assert "... and 5 more" in str(error)
    assert len(error.failures) == 25
    assert str(errors.UnreadableImagesError([("a.png", "empty")])).startswith("1 image cannot")
