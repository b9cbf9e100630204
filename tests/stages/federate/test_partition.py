"""Sites: patients stay together, draws are reproducible, and the real column is taken as it is."""

from __future__ import annotations

from collections import Counter

import pytest
from prepared import by_patient

from schemas.errors import DataError, SettingsError
from schemas.federated import Partition
from schemas.manifest import Manifest
from stages.federate.partition import simulate, sites_of

MANIFEST = by_patient({"a": 30, "b": 20, "c": 10})


def site_by_path(manifests: dict[str, Manifest]) -> dict[str, str]:
    return {row.path: name for name, manifest in manifests.items() for row in manifest.rows}


@pytest.mark.parametrize("alpha", [None, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("sites", [1, 3, 6])
def test_every_image_is_at_one_site_and_patients_stay_together(sites: int, alpha: float | None) -> None:
    manifests = simulate(MANIFEST, Partition(sites=sites, alpha=alpha))
    found = site_by_path(manifests)
    assert len(found) == sum(len(one.rows) for one in manifests.values()) == len(MANIFEST.rows)
    assert len(manifests) == sites and all(one.classes == MANIFEST.classes for one in manifests.values())
    patients = {(row.group, found[row.path]) for row in MANIFEST.rows}
    assert len(patients) == len({row.group for row in MANIFEST.rows})
    for name, manifest in manifests.items():
        assert sum(1 for _ in manifest.of("train")) >= 10 and {row.site for row in manifest.rows} == {name}
        assert list(manifest.rows) == sorted(manifest.rows, key=lambda row: row.path)


@pytest.mark.parametrize("alpha", [None, 0.5])
def test_seed_and_contents_determine_the_draw_not_names(alpha: float | None) -> None:
    first, again, other = (simulate(MANIFEST, Partition(sites=3, alpha=alpha, seed=seed)) for seed in (0, 0, 1))
    assert first == again
    assert site_by_path(first) != site_by_path(other)
    renamed = MANIFEST.model_copy(
        update={
            "rows": tuple(
                row.model_copy(update={"path": f"{9999 - number:04d}.png"}) for number, row in enumerate(MANIFEST.rows)
            )[::-1]
        }
    )
    by_content = [
        {row.id: name for name, one in manifests.items() for row in one.rows}
        for manifests in (first, simulate(renamed, Partition(sites=3, alpha=alpha)))
    ]
    assert by_content[0] == by_content[1]


def test_a_low_concentration_gives_sites_of_few_classes_and_iid_gives_all() -> None:
    def dominance(alpha: float | None) -> float:
        shares = []
        for seed in range(5):
            for one in simulate(MANIFEST, Partition(sites=3, alpha=alpha, seed=seed)).values():
                counts = Counter(row.label for row in one.rows)
                shares.append(max(counts.values()) / len(one.rows))
        return sum(shares) / len(shares)

    assert dominance(None) < dominance(1.0) < dominance(0.1)
    sizes = [len(one.rows) for one in simulate(MANIFEST, Partition(sites=3)).values()]
    assert max(sizes) - min(sizes) <= 3


def test_copies_and_near_duplicates_stay_together() -> None:
    rows = list(MANIFEST.rows)
    # The first images of ten patients are nearly the same.
    near = {number: rows[number].model_copy(update={"near": rows[0].id}) for number in range(0, 30, 3)}
    linked = MANIFEST.model_copy(update={"rows": tuple(near.get(number, row) for number, row in enumerate(rows))})
    found = site_by_path(simulate(linked, Partition(sites=3)))
    assert len({found[rows[number].path] for number in range(30)}) == 1


def test_too_many_sites_are_refused() -> None:
    with pytest.raises(DataError, match="100 sites"):
        simulate(MANIFEST, Partition(sites=100))


def with_sites(manifest: Manifest, sites: dict[int, str | None]) -> Manifest:
    rows = (row.model_copy(update={"site": sites.get(number, "x")}) for number, row in enumerate(manifest.rows))
    return manifest.model_copy(update={"rows": tuple(rows)})


def test_sites_of_the_manifest_are_taken_and_contradictions_are_errors() -> None:
    manifest = with_sites(MANIFEST, dict.fromkeys(range(9), "y"))
    assert {name: len(one.rows) for name, one in sites_of(manifest).items()} == {"x": 171, "y": 9}
    with pytest.raises(DataError, match="1 patient with images at several sites"):
        sites_of(with_sites(MANIFEST, dict.fromkeys(range(8), "y")))
    with pytest.raises(DataError, match="2 images of 180 have no site"):
        sites_of(with_sites(MANIFEST, dict.fromkeys(range(2))))


@pytest.mark.parametrize(("text", "alpha"), [("iid", None), ("dirichlet:0.1", 0.1), ("Dirichlet:1", 1.0)])
def test_partitions_are_parsed(text: str, alpha: float | None) -> None:
    assert Partition.parse(3, text, 7) == Partition(sites=3, alpha=alpha, seed=7)


@pytest.mark.parametrize(
    "text", ["", "dirichlet", "dirichlet:0", "dirichlet:-1", "dirichlet:x", "dirichlet:1e9", "iid:1"]
)
def test_other_partitions_are_refused(text: str) -> None:
    with pytest.raises(SettingsError, match="--partition"):
        Partition.parse(3, text, 0)
