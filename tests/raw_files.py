"""Tiny scans and label maps on disk, and what a conversion made of them, as nnU-Net reads it."""

import json
import os
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from nnunet_diffusion.preprocessing.cases import unlabeled_cases


def scan(path: Path, size=(8, 8, 6), spacing=(1.0, 1.0, 2.0), fill=None) -> Path:
    """A tiny noisy scan with the size and spacing in SimpleITK's order."""
    array = np.random.default_rng(0).normal(0, 100, size[::-1]).astype(np.float32)
    return write(path, array if fill is None else np.full_like(array, fill), spacing)


def label(path: Path, size=(8, 8, 6), spacing=(1.0, 1.0, 2.0), values=(0, 1, 2)) -> Path:
    return write(path, np.resize(np.array(values, np.uint8), size[::-1]), spacing)


def write(path, array, spacing):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = sitk.GetImageFromArray(array, isVector=False)
    image.SetSpacing(spacing)
    sitk.WriteImage(image, str(path))
    return path


def cut(path: Path) -> Path:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    return path


def refused(capsys, raw: Path, code: int) -> str:
    """The error of a conversion that failed cleanly: exit code 1, one message, nothing written."""
    captured = capsys.readouterr()
    assert code == 1
    assert captured.out == ""
    assert list(raw.iterdir()) == []
    assert captured.err.count("nnunet_diffusion: error: ") == 1
    return captured.err[captured.err.index("nnunet_diffusion: error: ") :]


def as_nnunet_reads(folder: Path) -> tuple[dict, dict, dict]:
    """dataset.json, and the labeled and unlabeled files, all of which exist."""
    from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets

    content = json.loads((folder / "dataset.json").read_text())
    unlabeled = unlabeled_cases(str(folder), content)
    labeled = get_filenames_of_train_images_and_targets(str(folder))
    paths = [path for entry in labeled.values() for path in (*entry["images"], entry["label"])]
    assert all(os.path.isfile(path) for path in [*paths, *(path for images in unlabeled.values() for path in images)])
    return content, labeled, unlabeled
