"""Documents outside of the code: the index lists every page, links lead somewhere, versions agree."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

import fpt

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
LINK = re.compile(r"\]\(([^)#:]+)(?:#[^)]*)?\)")


def test_the_index_lists_every_page_once() -> None:
    linked = LINK.findall((ROOT / "docs/README.md").read_text(encoding="utf-8"))
    pages = {path.name for path in (ROOT / "docs").iterdir() if path.suffix in (".md", ".ipynb")} - {"README.md"}
    assert sorted(name for name in linked if "/" not in name) == sorted(pages)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_to_files(document: Path) -> None:
    targets = LINK.findall(document.read_text(encoding="utf-8"))
    assert [target for target in targets if not (document.parent / target).exists()] == []


def test_the_citation_has_the_version_of_the_package() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == fpt.__version__
    assert citation["cff-version"] == "1.2.0" and citation["authors"]


def test_the_lock_file_satisfies_the_dependencies() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines()
    assert all(re.fullmatch(r"#.*|[A-Za-z0-9._-]+==[A-Za-z0-9.+!]+", line) for line in lines), "no host and no path"
    locked = dict(line.lower().replace("_", "-").split("==") for line in lines if not line.startswith("#"))
    extras = project["optional-dependencies"]
    for line in [*project["dependencies"], *extras["dev"], *extras["demo"]]:
        wish = Requirement(line)
        assert wish.specifier.contains(locked[wish.name.lower().replace("_", "-")], prereleases=True), line
