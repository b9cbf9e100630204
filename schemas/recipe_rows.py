"""The recipes of published data sets: one row each. docs/recipes.md is generated from them."""

from __future__ import annotations

from typing import Any

from schemas.manifest import Split
from schemas.medmnist_recipes import MEDMNIST
from schemas.recipes import DicomSides, Groups, Paths, Published, Recipe, Sheet, Tables

DRAWN = "drawn by `fpt prepare`"
OFFICIAL = "those of the data set"


def _fpt(rate: float) -> dict[str, Any]:
    """Return the settings of the authors' configuration of FPT+ for a data set, with its learning rate."""
    return {"method": "fpt+", "features.normalisation": "dataset", "train.lr": rate}


_GRADES = {"0": "no DR", "1": "mild", "2": "moderate", "3": "severe", "4": "proliferative"}
_LESIONS = ("MEL", "NV", "BCC", "AKIEC", "BKL", "DF", "VASC")
_CHEST = (
    *("pleural_effusion", "nodule", "pneumonia", "cardiomegaly", "hilar_enlargement", "fracture_old", "fibrosis"),
    *("aortic_calcification", "tortuous_aorta", "thickened_pleura", "TB", "pneumothorax", "emphysema", "atelectasis"),
    *("calcification", "pulmonary_edema", "increased_lung_markings", "elevated_diaphragm", "consolidation"),
)
_ENDO = ("ulcer", "erosion", "polyp", "tumor")


def _isic_2018(part: str, split: Any) -> Sheet:
    stem = f"ISIC2018_Task3_{part}"
    return Sheet(file=f"{stem}_GroundTruth.csv", folder=f"{stem}_Input", split=split, labels=_LESIONS)


def _isic_2016(part: str, split: Any) -> Sheet:
    stem = f"ISBI2016_ISIC_Part3_{part}"
    columns = ("image", "label")
    return Sheet(file=f"{stem}_GroundTruth.csv", folder=f"{stem}_Data", split=split, columns=columns)


def _ddr(part: str, split: Any) -> Sheet:
    return Sheet(
        file=f"DR_grading/{part}.txt",
        folder=f"DR_grading/{part}",
        split=split,
        columns=("image", "label"),
        delimiter=" ",
    )


def _few_shot(part: str) -> dict[Split, str]:
    return {split: f"{part}_{{shots}}-shot_{split}_exp{{draw}}.txt" for split in ("train", "val")}


def _medfmc(part: str, labels: tuple[str, ...]) -> Tables:
    # Both spellings of the folder are in use, "image" and "images": the table is next to it.
    sheet = Sheet(file=f"{part}_train.csv", folder=f"{part}/image*", image="img_id", labels=labels, patient="study_id")
    return Tables(sheets=(sheet,))


_FPT = (
    Recipe(
        name="messidor-2",
        title="Messidor-2",
        kind="fundus",
        source="https://www.adcis.net/en/third-party/messidor2/ (images, pairs), "
        "https://www.kaggle.com/datasets/google-brain/messidor2-dr-grades (adjudicated grades)",
        licence="",
        layout=("messidor_data.csv", "messidor-2.csv", "IMAGES/"),
        reading=Tables(
            sheets=(
                Sheet(file="messidor_data.csv", folder="IMAGES", image="image_id", labels=("adjudicated_dr_grade",)),
            ),
            groups=Groups(file="messidor-2.csv", images=("left", "right")),
        ),
        labels=_GRADES,
        group="patient",
        patients="both eyes of an examination stay together",
        splits=DRAWN,
        published=(
            Published(
                images=1744, labels={"no DR": 1017, "mild": 270, "moderate": 347, "severe": 75, "proliferative": 35}
            ),
        ),
        settings=_fpt(2e-4),
    ),
    Recipe(
        name="ddr",
        title="DDR",
        kind="fundus",
        source="https://github.com/nkicsl/DDR-dataset",
        licence="",
        layout=tuple(f"DR_grading/{part}{end}" for part in ("train", "valid", "test") for end in (".txt", "/")),
        reading=Tables(sheets=(_ddr("train", "train"), _ddr("valid", "val"), _ddr("test", "test"))),
        labels={**_GRADES, "5": None},
        patients="not published",
        splits=f"{OFFICIAL}; images graded 5 (ungradable) are left out",
        published=(
            Published(
                images=12_522,
                labels={"no DR": 6266, "mild": 630, "moderate": 4477, "severe": 236, "proliferative": 913},
            ),
        ),
        settings=_fpt(5e-4),
    ),
    Recipe(
        name="isic-2016",
        title="ISIC 2016, task 3",
        kind="dermoscopy",
        source="https://challenge.isic-archive.com/data/#2016",
        licence="CC-0",
        layout=tuple(
            f"ISBI2016_ISIC_Part3_{part}_{end}" for part in ("Training", "Test") for end in ("GroundTruth.csv", "Data/")
        ),
        reading=Tables(sheets=(_isic_2016("Training", "train"), _isic_2016("Test", "test"))),
        labels={"benign": "benign", "malignant": "malignant", "0": "benign", "1": "malignant"},
        patients="not published",
        splits=f"{OFFICIAL}; validation images are drawn from train",
        published=(
            Published(split="train", images=900, labels={"benign": 727, "malignant": 173}),
            Published(split="test", images=379, labels={"benign": 304, "malignant": 75}),
        ),
        settings=_fpt(5e-3),
    ),
    Recipe(
        name="isic-2018",
        title="ISIC 2018, task 3",
        kind="dermoscopy",
        source="https://challenge.isic-archive.com/data/#2018",
        licence="CC BY-NC 4.0",
        layout=(
            *(
                f"ISIC2018_Task3_{part}_{end}"
                for part in ("Training", "Validation", "Test")
                for end in ("GroundTruth.csv", "Input/")
            ),
            "ISIC2018_Task3_Training_LesionGroupings.csv",
        ),
        reading=Tables(
            sheets=(_isic_2018("Training", "train"), _isic_2018("Validation", "val"), _isic_2018("Test", "test")),
            groups=Groups(file="ISIC2018_Task3_Training_LesionGroupings.csv", images=("image",), group="lesion_id"),
        ),
        labels={name: name for name in _LESIONS},
        group="lesion",
        patients="images of one lesion stay together; lesions are known for train only",
        splits=OFFICIAL,
        published=(
            Published(
                split="train",
                images=10_015,
                labels={"MEL": 1113, "NV": 6705, "BCC": 514, "AKIEC": 327, "BKL": 1099, "DF": 115, "VASC": 142},
            ),
            Published(split="val", images=193),
            Published(split="test", images=1512),
        ),
        settings=_fpt(1e-4),
    ),
    Recipe(
        name="mini-ddsm",
        title="Mini-DDSM",
        kind="mammography",
        source="https://ardisdataset.github.io/MiniDDSM/, https://www.kaggle.com/datasets/cheddad/miniddsm2",
        licence="",
        layout=tuple(f"{name}/CASE/*.jpg or *.png (one format only)" for name in ("Normal", "Benign", "Cancer")),
        reading=Paths(
            pattern=r"(?:.*/)?(?P<label>Normal|Benign|Cancer)/(?P<patient>[^/]+)/(?![^/]*_Mask)[^/]+\.(?:jpe?g|png)"
        ),
        labels={"Normal": "normal", "Benign": "benign", "Cancer": "cancer"},
        group="patient",
        patients="images of one case stay together",
        splits=DRAWN,
        settings=_fpt(1e-3),
    ),
    Recipe(
        name="cmmd",
        title="CMMD",
        kind="mammography",
        source="https://doi.org/10.7937/tcia.eqde-4b16",
        licence="CC BY 4.0",
        layout=("CMMD_clinicaldata_revision.xlsx or .csv", "*.dcm"),
        reading=DicomSides(file="CMMD_clinicaldata_revision", patient="ID1", side="LeftRight", label="classification"),
        labels={"Benign": "benign", "Malignant": "malignant"},
        group="patient",
        patients="images of one patient stay together; images of a breast without a label are left out",
        splits=DRAWN,
        settings=_fpt(5e-5),
    ),
    Recipe(
        name="covid-cxr",
        title="COVID-CXR",
        kind="chest X-ray",
        source="https://www.kaggle.com/datasets/sid321axn/covid-cxr-image-dataset-research",
        licence="",
        layout=("COVID_IEEE/covid/", "COVID_IEEE/normal/", "COVID_IEEE/virus/"),
        reading=Paths(pattern=r"(?:.*/)?(?P<label>covid|normal|virus)/[^/]+\.(?:jpe?g|png)"),
        labels={"covid": "COVID-19", "normal": "normal", "virus": "viral pneumonia"},
        patients="not published",
        splits=DRAWN,
        published=(Published(images=1823, labels={"COVID-19": 536, "normal": 668, "viral pneumonia": 619}),),
        settings=_fpt(1e-4),
    ),
    Recipe(
        name="chncxr",
        title="CHNCXR (Shenzhen)",
        kind="chest X-ray",
        source="http://archive.nlm.nih.gov/repos/chestImages.php, https://doi.org/10.3978/j.issn.2223-4292.2014.11.20",
        licence="",
        layout=("CHNCXR_NUMBER_0.png", "CHNCXR_NUMBER_1.png"),
        reading=Paths(pattern=r"(?:.*/)?CHNCXR_\d+_(?P<label>[01])\.png"),
        labels={"0": "normal", "1": "tuberculosis"},
        patients="one image per patient",
        splits=DRAWN,
        published=(Published(images=662, labels={"normal": 326, "tuberculosis": 336}),),
        settings=_fpt(5e-4),
    ),
)

_OTHERS = (
    Recipe(
        name="medfmc-chest",
        title="MedFMC ChestDR",
        kind="chest X-ray",
        source="https://doi.org/10.1038/s41597-023-02460-0",
        licence="",
        layout=("MedFMC_train/chest/chest_train.csv", "MedFMC_train/chest/images/"),
        reading=_medfmc("chest", _CHEST),
        labels={name: name for name in _CHEST},
        task="multilabel",
        group="study",
        patients="images of one study stay together",
        splits=f"{DRAWN} among the labelled images (MedFMC_train), or few-shot lists (`--shots`)",
        published=(Published(images=2140),),
        lists=_few_shot("chest"),
    ),
    Recipe(
        name="medfmc-colon",
        title="MedFMC ColonPath",
        kind="histology",
        source="https://doi.org/10.1038/s41597-023-02460-0",
        licence="",
        layout=("MedFMC_train/colon/colon_train.csv", "MedFMC_train/colon/images/"),
        reading=_medfmc("colon", ("tumor",)),
        labels={"0": "no tumour", "1": "tumour"},
        group="study",
        patients="patches of one study stay together",
        splits=f"{DRAWN} among the labelled images (MedFMC_train), or few-shot lists (`--shots`)",
        lists=_few_shot("colon"),
    ),
    Recipe(
        name="medfmc-endo",
        title="MedFMC Endo",
        kind="endoscopy",
        source="https://doi.org/10.1038/s41597-023-02460-0",
        licence="",
        layout=("MedFMC_train/endo/endo_train.csv", "MedFMC_train/endo/images/"),
        reading=_medfmc("endo", _ENDO),
        labels={name: name for name in _ENDO},
        task="multilabel",
        group="study",
        patients="images of one study stay together",
        splits=f"{DRAWN} among the labelled images (MedFMC_train), or few-shot lists (`--shots`)",
        published=(Published(images=1810),),
        lists=_few_shot("endo"),
    ),
    Recipe(
        name="busi",
        title="BUSI",
        kind="breast ultrasound",
        source="https://doi.org/10.1016/j.dib.2019.104863",
        licence="",
        layout=tuple(f"{name}/{name} (NUMBER).png" for name in ("normal", "benign", "malignant")),
        reading=Paths(pattern=r"(?:.*/)?(?P<label>normal|benign|malignant)/(?![^/]*_mask)[^/]+\.png"),
        labels={"normal": "normal", "benign": "benign", "malignant": "malignant"},
        patients="not published: images of one patient may be in several splits",
        splits=DRAWN,
        published=(Published(images=780, labels={"normal": 133, "benign": 437, "malignant": 210}),),
    ),
    Recipe(
        name="odir",
        title="ODIR-5K, labels per eye",
        kind="fundus",
        source="https://odir2019.grand-challenge.org/dataset/, "
        "https://www.kaggle.com/datasets/andrewmvd/ocular-disease-recognition-odir5k",
        licence="",
        layout=("full_df.csv", "Training Images/"),
        reading=Tables(
            sheets=(
                Sheet(file="full_df.csv", folder="Training Images", image="filename", labels=("labels",), patient="ID"),
            )
        ),
        labels={
            "['N']": "normal",
            "['D']": "diabetes",
            "['G']": "glaucoma",
            "['C']": "cataract",
            "['A']": "AMD",
            "['H']": "hypertension",
            "['M']": "myopia",
            "['O']": "other",
        },
        group="patient",
        patients="both eyes of a patient stay together",
        splits=DRAWN,
        published=(
            Published(
                images=6392,
                labels={
                    "normal": 2873,
                    "diabetes": 1608,
                    "glaucoma": 284,
                    "cataract": 293,
                    "AMD": 266,
                    "hypertension": 128,
                    "myopia": 232,
                    "other": 708,
                },
            ),
        ),
    ),
)

RECIPES: dict[str, Recipe] = {recipe.name: recipe for recipe in (*_FPT, *_OTHERS, *MEDMNIST)}
"""Name -> recipe."""
