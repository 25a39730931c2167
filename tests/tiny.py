"""A tiny data set with a tiny plan, made by nnU-Net's own planning and preprocessing: what trainer tests train on."""

import json
import os
import pickle
from pathlib import Path

import numpy as np
import SimpleITK as sitk

NAME, ID, PLANS = "Dataset990_Tiny", 990, "nnUNetTinyPlans"
LABELS = {"background": 0, "left ball": 1, "right ball": 2, "box": 3}


def write_scans(
    folder: Path, number: int, channels: int = 1, labels: Path | None = None, first: int = 0, is_masked: bool = False
) -> list[str]:
    """Noisy scans of two balls, left and right, and a box; 12 x 20 x 24 voxels of 3 x 2 x 2 mm.

    Masked ones are zero outside, as MR images of which the skull was taken off are.
    """
    folder.mkdir(parents=True, exist_ok=True)
    cases = [f"tiny_{i:03d}" for i in range(first, first + number)]
    z, y, x = np.mgrid[:12, :20, :24]
    for i, case in enumerate(cases):
        rng = np.random.default_rng(first + i)
        seg = np.zeros(z.shape, np.uint8)
        for label, center in ((1, 6), (2, 17)):
            c = np.array([6, 10, center]) + rng.integers(-1, 2, 3)
            seg[(z - c[0]) ** 2 + (y - c[1]) ** 2 + (x - c[2]) ** 2 < 10] = label
        seg[2:5, 3:6, 10:14] = 3
        for channel in range(channels):
            image = np.where(seg > 0, 100.0 + 40 * (seg == 3) - 30 * channel, 0.0) + rng.normal(0, 20, seg.shape)
            if is_masked:
                image = np.where((abs(z - 5.5) < 4) & (abs(y - 9.5) < 8) & (abs(x - 11.5) < 10), image + 200, 0)
            save(image.astype(np.float32), folder / f"{case}_{channel:04d}.nii.gz")
        if labels is not None:
            labels.mkdir(parents=True, exist_ok=True)
            save(seg, labels / f"{case}.nii.gz")
    return cases


def save(array: np.ndarray, path: Path) -> None:
    """Writes a NIfTI file with the data set's spacing."""
    image = sitk.GetImageFromArray(array)
    image.SetSpacing((2.0, 2.0, 3.0))
    sitk.WriteImage(image, str(path))


def write_raw(channels: int = 1, labeled: int = 5, unlabeled: int = 3, modality: str = "CT") -> Path:
    """Writes the raw data set; its first channel is of this modality, MR images are masked."""
    raw = Path(os.environ["nnUNet_raw"]) / NAME
    cases = write_scans(raw / "imagesTr", labeled, channels, raw / "labelsTr", is_masked=modality == "MR")
    pool = write_scans(raw / "imagesUn", unlabeled, channels, first=100, is_masked=modality == "MR")
    files = {c: [f"{{}}/{c}_{i:04d}.nii.gz" for i in range(channels)] for c in cases + pool}
    content = {
        "channel_names": {str(i): modality if i == 0 else "MR" for i in range(channels)},
        "labels": LABELS,
        "numTraining": len(cases),
        "file_ending": ".nii.gz",
        "dataset": {
            c: {"images": [f.format("imagesTr") for f in files[c]], "label": f"labelsTr/{c}.nii.gz"} for c in cases
        },
        "unlabeled": {c: {"images": [f.format("imagesUn") for f in files[c]]} for c in pool},
    }
    (raw / "dataset.json").write_text(json.dumps(content))
    return raw


def prepare(kind: str = "PlainConvUNet", norm: str = "InstanceNorm", channels: int = 1, modality: str = "CT") -> Path:
    """Plans, shrinks the plan, preprocesses 2d and 3d_fullres and the pool; returns the preprocessed folder."""
    from nnunet_diffusion.cli import main
    from nnunet_diffusion.planners.CompactPlanner import CompactPlanner  # noqa: F401

    write_raw(channels, modality=modality)
    assert (
        main(["plan_and_preprocess", "-d", str(ID), "-pl", "CompactPlanner", "-c", "2d", "3d_fullres", "-np", "1"]) == 0
    )
    folder = Path(os.environ["nnUNet_preprocessed"]) / NAME
    plans = json.loads((folder / "nnUNetCompactPlans.json").read_text())
    write_plans(shrunk(plans, kind, norm))
    splits = sorted(p.stem for p in (folder / "gt_segmentations").glob("*.nii.gz"))
    cases = [s.removesuffix(".nii") for s in splits]
    (folder / "splits_final.json").write_text(json.dumps([{"train": cases[:3], "val": cases[3:]}]))
    return folder


def annotate(folder: Path, annotated: dict[str, list[str]]) -> None:
    """Says which labels each case annotates, and erases the others from it: nobody looked for them."""
    from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2

    for identifier in {path.parent for path in folder.glob("*/tiny_000_seg.b2nd")}:
        dataset = nnUNetDatasetBlosc2(str(identifier), list(annotated))
        for case, names in annotated.items():
            values = [LABELS[name] for name in names]
            _, seg, _, properties = dataset.load_case(case)
            seg = np.where(np.isin(seg[:], [-1, *values]), seg[:], 0).astype(np.int8)
            locations = properties["class_locations"]
            properties["class_locations"] = {v: found for v, found in locations.items() if v in values}
            (identifier / f"{case}_seg.b2nd").unlink()
            nnUNetDatasetBlosc2.save_seg(seg, str(identifier / f"{case}_seg"), *[(1, *seg.shape[1:])] * 2)
            (identifier / f"{case}.pkl").write_bytes(pickle.dumps(properties))
    path = folder / "dataset.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "annotated_labels": annotated}))


def shrunk(plans: dict, kind: str, norm: str) -> dict:
    """The plan with two or three narrow stages."""
    plans["plans_name"] = PLANS
    for name, patch in (("2d", [16, 16]), ("3d_fullres", [8, 16, 16])):
        configuration = plans["configurations"][name]
        dim = len(patch)
        configuration.update(patch_size=patch, batch_size=2)
        architecture = configuration["architecture"]
        kwargs = architecture["arch_kwargs"]
        architecture["network_class_name"] = f"dynamic_network_architectures.architectures.unet.{kind}"
        for key in ("n_conv_per_stage", "n_blocks_per_stage"):
            kwargs.pop(key, None)
        kwargs["n_blocks_per_stage" if kind == "ResidualEncoderUNet" else "n_conv_per_stage"] = [1, 1, 1]
        kwargs.update(
            n_stages=3,
            features_per_stage=[4, 6, 8],
            kernel_sizes=[[3] * dim] * 3,
            strides=[[1] * dim, [2] * dim, [2] * dim],
            n_conv_per_stage_decoder=[1, 1],
            norm_op=f"torch.nn.{norm}{dim}d",
        )
    return plans


def write_plans(plans: dict, name: str = PLANS, **block: dict) -> None:
    """Saves plans under a name with a block of settings; every trainer runs two epochs of two steps."""
    short = {"num_epochs": 2, "num_iterations_per_epoch": 2, "num_val_iterations_per_epoch": 2}
    settings = {
        "ConfiguredTrainer": short,
        "DenoisingDiffusionTrainer": {"num_val_iterations_per_epoch": 2, "sample_every": 0, "sample_steps": 3},
    }
    for trainer, given in block.items():
        settings[trainer] = settings.get(trainer, {}) | given
    content = {**plans, "plans_name": name, "nnunet_diffusion": settings}
    path = Path(os.environ["nnUNet_preprocessed"]) / NAME / f"{name}.json"
    path.write_text(json.dumps(content))


def trainer(
    cls, configuration: str = "2d", fold: int | str = 0, plans: str = PLANS, resume: bool = False, device="cpu"
):
    """A trainer as nnUNetv2_train builds it."""
    import torch

    folder = Path(os.environ["nnUNet_preprocessed"]) / NAME
    content = json.loads((folder / f"{plans}.json").read_text())
    content["continue_training"] = resume
    dataset_json = json.loads((folder / "dataset.json").read_text())
    return cls(content, configuration, fold, dataset_json, torch.device(device))
