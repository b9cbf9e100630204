"""Miniature copies of the original downloads that recipes read."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from schemas.recipe_rows import RECIPES


def picture(path: Path, grey: int = 90) -> None:
    """Write a small image."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (24, 24), (grey, grey, grey)).save(path)


def table(path: Path, rows: Sequence[Sequence[object]], delimiter: str = ",") -> None:
    """Write a table; its first row is the header, if it has one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter=delimiter).writerows(rows)


def messidor(root: Path) -> None:
    """Three examinations; tables have another capital suffix, one image has no grade, one is in no table."""
    for name in ("a_PP.png", "b_PP.png", "IM1.JPG", "IM2.JPG", "IM3.JPG", "IM4.JPG", "odd.png"):
        picture(root / "IMAGES" / name)
    grades = [("a_PP.png", 0), ("b_PP.png", 2.0), ("IM1.jpg", 4), ("IM2.jpg", ""), ("IM3.jpg", 1), ("IM4.jpg", 3)]
    header = ("image_id", "adjudicated_dr_grade", "adjudicated_dme", "adjudicated_gradable")
    table(root / "messidor_data.csv", [header, *((name, grade, 0, 1) for name, grade in grades)])
    table(
        root / "messidor-2.csv",
        [("left", "right"), ("a_PP.png", "b_PP.png"), ("IM1.jpg", "IM2.jpg"), ("IM3.jpg", "IM4.jpg")],
        ";",
    )


def ddr(root: Path) -> None:
    """An image per grade and split, one of them ungradable."""
    for part in ("train", "valid", "test"):
        rows = [(f"{part}-{grade}.jpg", grade) for grade in range(6)]
        table(root / "DDR-dataset/DR_grading" / f"{part}.txt", rows, " ")
        for name, _ in rows:
            picture(root / "DDR-dataset/DR_grading" / part / name)
        picture(root / "DDR-dataset/lesion_segmentation" / part / f"{part}-0.jpg")


def isic_2016(root: Path) -> None:
    """The two tables spell labels differently."""
    for part, labels in (("Training", ("benign", "malignant")), ("Test", ("0.0", "1.0"))):
        rows = [(f"ISIC_{part}_{number}", label) for number, label in enumerate(labels)]
        table(root / f"ISBI2016_ISIC_Part3_{part}_GroundTruth.csv", rows)
        for name, _ in rows:
            picture(root / f"ISBI2016_ISIC_Part3_{part}_Data" / f"{name}.jpg")


def isic_2018(root: Path) -> None:
    """An image per class and split; the first two training images show one lesion."""
    classes = ("MEL", "NV", "BCC", "AKIEC", "BKL", "DF", "VASC")
    for part in ("Training", "Validation", "Test"):
        names = [f"ISIC_{part}_{number}" for number in range(len(classes))]
        rows = [(name, *np.eye(len(classes))[number]) for number, name in enumerate(names)]
        folder = root / f"ISIC2018_Task3_{part}_GroundTruth"
        table(folder / f"ISIC2018_Task3_{part}_GroundTruth.csv", [("image", *classes), *rows])
        for name in names:
            picture(root / f"ISIC2018_Task3_{part}_Input" / f"{name}.jpg")
    lesions = [(f"ISIC_Training_{number}", f"HAM_{max(number, 1)}", "histopathology") for number in range(len(classes))]
    header = ("image", "lesion_id", "diagnosis_confirm_type")
    table(root / "ISIC2018_Task3_Training_LesionGroupings.csv", [header, *lesions])


def mini_ddsm(root: Path) -> None:
    """A case per class with two images and a mask."""
    for number, name in enumerate(("Normal", "Benign", "Cancer")):
        folder = root / "MINI-DDSM-Complete-JPEG-8" / name / f"{number:04d}"
        for view in ("LEFT_CC", "RIGHT_CC", "LEFT_CC_Mask"):
            picture(folder / f"C_{number:04d}_1.{view}.jpg")


def cmmd(root: Path) -> None:
    """Two patients with both sides; one side has no label."""
    from openpyxl import Workbook
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian

    book = Workbook()
    rows = [("D1-0001", "L", "Benign"), ("D1-0001", "R", "Malignant"), ("D2-0002", "R", "Malignant")]
    for row in [("ID1", "LeftRight", "classification"), *rows]:
        book.active.append(row)
    root.mkdir(parents=True, exist_ok=True)
    book.save(root / "CMMD_clinicaldata_revision.xlsx")
    for patient in ("D1-0001", "D2-0002"):
        for number, side in enumerate("LR"):
            path = root / "CMMD" / patient / "study" / "series" / f"1-{number + 1}.dcm"
            path.parent.mkdir(parents=True, exist_ok=True)
            meta = FileMetaDataset()
            meta.TransferSyntaxUID = ExplicitVRLittleEndian
            meta.MediaStorageSOPClassUID = meta.MediaStorageSOPInstanceUID = "1.2.3"
            header = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
            header.PatientID, header.ImageLaterality = patient, side
            header.save_as(path, enforce_file_format=True)


def folders(names: Sequence[str], parent: str) -> Callable[[Path], None]:
    """Return a builder of a folder per class with two images."""

    def build(root: Path) -> None:
        for name in names:
            for number in (1, 2):
                picture(root / parent / name / f"{name} ({number}).png")
                if parent == "Dataset_BUSI_with_GT":
                    picture(root / parent / name / f"{name} ({number})_mask.png")

    return build


def chncxr(root: Path) -> None:
    """Two images per class, and a reading."""
    for number in range(4):
        picture(root / "ChinaSet_AllFiles/CXR_png" / f"CHNCXR_{number:04d}_{number % 2}.png")
    (root / "ChinaSet_AllFiles/ClinicalReadings").mkdir()
    (root / "ChinaSet_AllFiles/ClinicalReadings/CHNCXR_0000_0.txt").write_text("male 40yrs\nnormal")


def medfmc(part: str) -> Callable[[Path], None]:
    """Return a builder of two studies with two images each; the first image has no label, the last one all."""

    def build(root: Path) -> None:
        recipe = RECIPES[f"medfmc-{part}"]
        labels = recipe.classes if recipe.task == "multilabel" else ("tumor",)
        rows = [(f"{number}.png", f"s{number // 2}", *[int(number > 1)] * len(labels)) for number in range(4)]
        folder = root / "MedFMC_train" / part
        table(folder / f"{part}_train.csv", [("img_id", "study_id", *labels), *rows])
        for name, *_ in rows:
            picture(folder / "images" / name)

    return build


def odir(root: Path) -> None:
    """A patient per class, both eyes; some keywords contain commas."""
    header = ("ID", "Left-Diagnostic Keywords", "filepath", "labels", "target", "filename")
    rows = []
    for number, letter in enumerate("NDGCAHMO"):
        for side in ("left", "right"):
            name = f"{number}_{side}.jpg"
            rows.append((number, "dry age-related, drusen", f"../input/{name}", f"['{letter}']", "[1, 0]", name))
            picture(root / "ODIR-5K/ODIR-5K/Training Images" / name)
            picture(root / "preprocessed_images" / name)
    table(root / "full_df.csv", [header, *rows])


def medmnist(name: str, columns: int = 1, colour: bool = False, sizes: Sequence[int] = (28,)) -> Callable[[Path], None]:
    """Return a builder of an archive with as many images per split as there are classes."""

    def build(root: Path) -> None:
        count = len(RECIPES[name].classes)
        for size in sizes:
            arrays = {}
            for split in ("train", "val", "test"):
                shape = (count, size, size, 3) if colour else (count, size, size)
                grey = np.arange(count, dtype=np.uint8).reshape(-1, *[1] * (len(shape) - 1))
                arrays[f"{split}_images"] = np.broadcast_to(grey, shape)
                labels = np.arange(count)[:, None] if columns == 1 else np.tri(count, columns, -1)
                labels[-1] = labels[-1] if columns == 1 else 1
                arrays[f"{split}_labels"] = labels.astype(np.uint8)
            root.mkdir(parents=True, exist_ok=True)
            np.savez_compressed(root / f"{name}{'' if size == 28 else f'_{size}'}.npz", **arrays)

    return build


BUILDERS: dict[str, Callable[[Path], None]] = {
    "messidor-2": messidor,
    "ddr": ddr,
    "isic-2016": isic_2016,
    "isic-2018": isic_2018,
    "mini-ddsm": mini_ddsm,
    "cmmd": cmmd,
    "covid-cxr": folders(("covid", "normal", "virus"), "COVID_IEEE"),
    "chncxr": chncxr,
    "medfmc-chest": medfmc("chest"),
    "medfmc-colon": medfmc("colon"),
    "medfmc-endo": medfmc("endo"),
    "busi": folders(("normal", "benign", "malignant"), "Dataset_BUSI_with_GT"),
    "odir": odir,
    **{name: medmnist(name) for name in RECIPES if name.endswith("mnist")},
    "chestmnist": medmnist("chestmnist", columns=14),
    "pathmnist": medmnist("pathmnist", colour=True, sizes=(28, 64)),
}
"""Recipe -> builder of a miniature download."""
