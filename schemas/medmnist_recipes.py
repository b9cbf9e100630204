"""Recipes of the twelve two-dimensional sets of MedMNIST v2, from its table of labels and counts."""

from __future__ import annotations

from schemas.manifest import SPLITS
from schemas.recipes import Arrays, Published, Recipe
from schemas.tasks import Task

_ORGANS = (
    *("bladder", "femur-left", "femur-right", "heart", "kidney-left", "kidney-right", "liver", "lung-left"),
    *("lung-right", "pancreas", "spleen"),
)
_SETS: tuple[tuple[str, str, tuple[str, ...], tuple[int, int, int]], ...] = (
    (
        "PathMNIST",
        "histology",
        ("adipose", "background", "debris", "lymphocytes", "mucus", "smooth muscle", "normal colon mucosa",
         "cancer-associated stroma", "colorectal adenocarcinoma epithelium"),
        (89_996, 10_004, 7_180),
    ),
    (
        "ChestMNIST",
        "chest X-ray",
        ("atelectasis", "cardiomegaly", "effusion", "infiltration", "mass", "nodule", "pneumonia", "pneumothorax",
         "consolidation", "edema", "emphysema", "fibrosis", "pleural", "hernia"),
        (78_468, 11_219, 22_433),
    ),
    (
        "DermaMNIST",
        "dermoscopy",
        ("actinic keratoses and intraepithelial carcinoma", "basal cell carcinoma", "benign keratosis-like lesions",
         "dermatofibroma", "melanoma", "melanocytic nevi", "vascular lesions"),
        (7_007, 1_003, 2_005),
    ),
    (
        "OCTMNIST",
        "retinal OCT",
        ("choroidal neovascularization", "diabetic macular edema", "drusen", "normal"),
        (97_477, 10_832, 1_000),
    ),
    ("PneumoniaMNIST", "chest X-ray", ("normal", "pneumonia"), (4_708, 524, 624)),
    ("RetinaMNIST", "fundus", ("0", "1", "2", "3", "4"), (1_080, 120, 400)),
    ("BreastMNIST", "breast ultrasound", ("malignant", "normal, benign"), (546, 78, 156)),
    (
        "BloodMNIST",
        "blood cell microscopy",
        ("basophil", "eosinophil", "erythroblast", "immature granulocytes", "lymphocyte", "monocyte", "neutrophil",
         "platelet"),
        (11_959, 1_712, 3_421),
    ),
    (
        "TissueMNIST",
        "kidney cell microscopy",
        ("Collecting Duct, Connecting Tubule", "Distal Convoluted Tubule", "Glomerular endothelial cells",
         "Interstitial endothelial cells", "Leukocytes", "Podocytes", "Proximal Tubule Segments",
         "Thick Ascending Limb"),
        (165_466, 23_640, 47_280),
    ),
    ("OrganAMNIST", "abdominal CT", _ORGANS, (34_581, 6_491, 17_778)),
    ("OrganCMNIST", "abdominal CT", _ORGANS, (13_000, 2_392, 8_268)),
    ("OrganSMNIST", "abdominal CT", _ORGANS, (13_940, 2_452, 8_829)),
)  # fmt: skip
"""Name, modality, labels from 0, images of train, val and test."""
_TASKS: dict[str, Task] = {"ChestMNIST": "multilabel", "RetinaMNIST": "ordinal"}


def _recipe(title: str, kind: str, labels: tuple[str, ...], counts: tuple[int, int, int]) -> Recipe:
    name = title.lower()
    return Recipe(
        name=name,
        title=title,
        kind=kind,
        source="https://doi.org/10.1038/s41597-022-01721-8",
        licence="CC BY-NC 4.0" if title == "DermaMNIST" else "CC BY 4.0",
        layout=(f"{name}_224.npz, _128, _64 or {name}.npz (28 pixels); the largest is used",),
        reading=Arrays(files=tuple(f"{name}{size}.npz" for size in ("_224", "_128", "_64", ""))),
        labels={str(number): label for number, label in enumerate(labels)},
        task=_TASKS.get(title, "multiclass"),
        patients="not published",
        splits="those of the data set",
        published=tuple(Published(split=split, images=count) for split, count in zip(SPLITS, counts, strict=True)),
    )


MEDMNIST = tuple(_recipe(*row) for row in _SETS)
"""One row per set."""
