import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from schemas.features import FeatureSpec, LpmInfo
from schemas.manifest import Manifest, ManifestRow
from schemas.parse import parse_settings
from schemas.resolve import resolve
from schemas.results import BundleSpec
from schemas.specs import FinetuneSpec, SideNetworkSpec
from stages.evaluate.curves import roc_curves
from stages.evaluate.metrics import compute_metrics
from stages.evaluate.predictions import Predictions
from stages.evaluate.reliability import reliability
from stages.evaluate.report import confident_mistakes, render_report
from stages.evaluate.scoring import score

VOID = {"meta", "img", "br", "use"}


class Checker(HTMLParser):
    """Tags are closed in order, ids are unique, nothing outside is referred to."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.images: list[dict[str, str | None]] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)
        values = dict(attrs)
        if values.get("id"):
            self.ids.append(str(values["id"]))
        self.links += [str(value) for name, value in attrs if name in ("src", "href", "xlink:href") and value]
        if tag == "img":
            self.images.append(values)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def bundle_spec(classes: tuple[str, ...]) -> BundleSpec:
    lpm = LpmInfo(
        name="vit", depth=2, width=64, heads=2, patch=16, prefix_tokens=1, has_class_token=True, image_size=64,
        mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), interpolation="bicubic", mlp_width=256,
    )  # fmt: skip
    features = FeatureSpec(
        lpm=lpm, weights_sha256="a" * 64, layers=(1,), importance="global", kept=3, dtype="float16", side_image_size=48
    )
    network = SideNetworkSpec(
        method="fpt+", classes=len(classes), layers=1, lpm_width=64, heads=2, width=8, image_size=32, prompts=16,
        dropout=0.5,
    )  # fmt: skip
    recipe = resolve(parse_settings({"method": "fpt+"}), lpm).train
    return BundleSpec(
        classes=classes, network=network, features=features, train=recipe, best_epoch=3, val_auc=None,
        learnable=12_345, weights_sha256="b" * 64,
    )  # fmt: skip


def some_predictions(classes: tuple[str, ...], n: int = 40) -> Predictions:
    generator = np.random.default_rng(0)
    labels = np.arange(n) % len(classes)
    p = generator.dirichlet(np.ones(len(classes)), size=n) + 0.4 * np.eye(len(classes))[labels]
    rows = tuple(
        ManifestRow(id=f"{i:064x}", path=f"a&b/{i:03d}.png", label=classes[label], group=f"g{i // 2}", split="test")
        for i, label in enumerate(labels)
    )
    return Predictions(classes, rows, (p / p.sum(axis=1, keepdims=True)).astype(np.float32))


def render(predictions: Predictions, spec: BundleSpec | None = None, **keywords: object) -> str:
    manifest = Manifest(classes=predictions.classes, rows=predictions.rows)
    groups = [row.group for row in predictions.rows]
    metrics = compute_metrics(predictions.labels, predictions.probabilities, predictions.classes, groups=groups)
    metrics = metrics.model_copy(update={"unit": "groups"})
    spec = bundle_spec(predictions.classes) if spec is None else spec
    return render_report(metrics, predictions, manifest, spec, **keywords)  # type: ignore[arg-type]


def write_curves(folder: Path) -> None:
    for name in ("train/loss", "val/loss", "val/auc"):
        path = folder / "plots/metrics" / f"{name}.tsv"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"step\t{path.stem}\n1\t0.9\n2\t0.5\n")


@pytest.mark.parametrize("count", [2, 3, 12])
def test_report_is_whole_and_stands_alone(count: int, tmp_path: Path) -> None:
    predictions = some_predictions(("<script>", "b", "$c$", *(f"_{i}" for i in range(9)))[:count])
    write_curves(tmp_path)
    thumbnails = {row.id: np.full((3, 8, 8), 90, dtype=np.uint8) for row in predictions.rows}
    text = render(predictions, thumbnails=thumbnails, train_dir=tmp_path)
    checker = Checker()
    checker.feed(text)
    assert checker.open == []
    assert len(checker.ids) == len(set(checker.ids))
    assert all(link.startswith(("#", "data:image/jpeg;base64,")) for link in checker.links)
    assert {link[1:] for link in checker.links if link.startswith("#")} <= set(checker.ids)
    assert "script" not in checker.tags
    assert checker.images
    assert all(image["alt"] for image in checker.images)
    assert checker.tags.count("svg") == 4
    # Colours of figures come from the page, so that they follow its theme.
    assert not re.search(r"#(0\d){3}\b", text)
    assert "url(http" not in text
    assert "nan" not in re.findall(r">\s*([^<\s]+)\s*<", text)


def test_report_says_what_is_judged_and_how_it_was_trained() -> None:
    predictions = some_predictions(("a", "b", "c"))
    text = render(predictions)
    for said in ("test split", "40 images of 20 groups", "12,345", bundle_spec(("a", "b", "c")).features.fingerprint):
        assert said in text
    assert "Training</h2>" not in text


@pytest.mark.parametrize("hidden", [None, 1])
def test_the_recipe_lists_only_what_the_model_reads(hidden: int | None) -> None:
    predictions = some_predictions(("a", "b"))
    network = FinetuneSpec(
        classes=2, lpm="vit", image_size=64, depth=2, first_block=1, everything=False, hidden=hidden
    )  # fmt: skip
    spec = bundle_spec(("a", "b"))
    frozen, tuned = render(predictions, spec), render(predictions, spec.model_copy(update={"network": network}))
    for name, cached in (("Tapped blocks", False), ("Type of the features", True), ("Feature fingerprint", True)):
        assert name in frozen
        assert (name in tuned) == (cached and hidden is not None)
    assert "vit, frozen:" in frozen and "vit, fine-tuned:" in tuned


def test_same_predictions_same_report() -> None:
    assert render(some_predictions(("a", "b"))) == render(some_predictions(("a", "b")))


def test_mistakes_are_wrong_and_sorted() -> None:
    predictions = some_predictions(("a", "b", "c"))
    rows = confident_mistakes(predictions, 5)
    sureness = predictions.probabilities.max(axis=1)[rows]
    assert len(rows) == 5
    assert (np.diff(sureness) <= 0).all()
    wrong = predictions.labels != predictions.predicted
    assert wrong[rows].all()
    assert sureness[0] == predictions.probabilities.max(axis=1)[wrong].max()


def test_roc_runs_from_corner_to_corner_and_holds_the_auc() -> None:
    predictions = some_predictions(("a", "b", "c"))
    labels, p = predictions.labels, predictions.probabilities.astype(np.float64)
    metrics = compute_metrics(labels, p, predictions.classes)
    roc = roc_curves(labels, p, predictions.classes)
    assert roc.mean is not None
    x, y = roc.mean
    assert (x[0], y[0], x[-1], y[-1]) == (0, 0, 1, 1)
    assert np.trapezoid(y, x) == pytest.approx(metrics.auc, abs=0.005)


def test_reliability_counts_every_row() -> None:
    predictions = some_predictions(("a", "b"))
    curve = reliability(predictions.labels, predictions.probabilities.astype(np.float64))
    assert curve.rows.sum() == 40
    assert len(curve.rows) == len(curve.accuracy) == len(curve.confidence)
    right = (predictions.labels == predictions.predicted).mean()
    assert (curve.accuracy * curve.rows).sum() / 40 == pytest.approx(right)


def test_reliability_agrees_with_its_counts_on_edges() -> None:
    p = np.array([[0.5, 0.5], [0.6, 0.4], [0.7, 0.3], [0.3, 0.7], [1.0, 0.0]])
    curve = reliability(np.array([0, 0, 1, 1, 0]), p)
    assert len(curve.rows) == len(curve.accuracy)
    assert curve.rows.sum() == 5


def test_a_class_name_is_never_read_as_a_figure() -> None:
    text = render(some_predictions(("0", "1")))
    assert "AUC, class “1” against class “0”" in text
    assert "Always predicting “0” gives 0.500" in text
    assert "Class “1” against class “0”; the figure in the legend is the AUC." in text
    # In the confusion matrix and in the tables of classes, too.
    names = re.findall(r'<th scope="(?:row|col)"[^>]*>([^<]*)</th>', text)
    assert "“1”" in names
    assert not {"0", "1"} & set(names)


def test_warnings_come_before_the_headline() -> None:
    predictions = some_predictions(("a", "b"))
    manifest = Manifest(classes=predictions.classes, rows=predictions.rows)
    for warnings in ((), ("the model was trained on these images; this is not a test result.",)):
        text = render_report(score(predictions, warnings), predictions, manifest, bundle_spec(("a", "b")))
        assert ("<strong>Warning:</strong>" in text) == bool(warnings)
        if warnings:
            assert text.index(warnings[0]) < text.index('aria-label="Headline"')
