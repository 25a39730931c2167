"""A raw data set of nnU-Net's that takes milliseconds: boxes in noise, some scans labeled, some not."""

import json
from pathlib import Path

import numpy as np
import SimpleITK as sitk

NAME = "Dataset009_Tiny"
LABELS = {"background": 0, "upper": 1, "lower": 2}


def scan(seed: int, shape=(24, 32, 32)) -> tuple[np.ndarray, np.ndarray]:
    """An image of air with a box of tissue that has two brighter boxes in it, and their labels; both (Z, Y, X)."""
    rng = np.random.default_rng(seed)
    image = rng.normal(-1000, 30, shape).astype(np.int16)
    image[4:20, 6:26, 6:26] += 1000
    label = np.zeros(shape, np.uint8)
    label[8:12, 10:16, 10 : 16 + seed % 3] = 1
    label[12:16, 16:22, 10:18] = 2
    image[label > 0] += 200
    return image, label


def write(path: Path, array: np.ndarray, spacing: tuple[float, ...]) -> str:
    """Writes (Z, Y, X) voxels with a spacing in mm, (z, y, x) as well; returns the path as text."""
    image = sitk.GetImageFromArray(array)
    image.SetSpacing([float(i) for i in spacing[::-1]])
    path.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(image, str(path))
    return str(path)


def make(raw: Path, labeled: int = 5, unlabeled: int = 4, spacing=(3, 2, 2), unlabeled_spacing=(2.5, 2, 2)) -> Path:
    """Writes the data set into the folder `raw`, scans `l0`, `l1`, ... and `u0`, `u1`, ...; returns its folder.

    Scan `u0` shows what `l0` shows.
    """
    folder = raw / NAME
    dataset, pool = {}, {}
    for i in range(labeled):
        image, label = scan(i)
        dataset[f"l{i}"] = {
            "images": [write(folder / "scans" / f"l{i}.nii.gz", image, spacing)],
            "label": write(folder / "labels" / f"l{i}.nii.gz", label, spacing),
        }
    for i in range(unlabeled):
        path = folder / "scans" / f"u{i}.nii.gz"
        pool[f"u{i}"] = {"images": [write(path, scan(i)[0], spacing if i == 0 else unlabeled_spacing)]}
    save_description(folder, dataset, pool)
    return folder


def save_description(folder: Path, dataset: dict, unlabeled: dict) -> None:
    """Writes dataset.json."""
    description = {
        "channel_names": {"0": "CT"},
        "labels": LABELS,
        "numTraining": len(dataset),
        "file_ending": ".nii.gz",
        "dataset": dataset,
        "unlabeled": unlabeled,
    }
    (folder / "dataset.json").write_text(json.dumps(description))
