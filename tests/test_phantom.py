"""The synthetic torso: reproducible, anatomically sided, learnable but not by thresholds, and valid NIfTI."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from full_disk import no_file_longer_than

from nnunet_diffusion.demo.phantom import LABELS, main, phantom, write_phantom_dataset
from nnunet_diffusion.preprocessing.cases import unlabeled_cases
from nnunet_diffusion.preprocessing.scan_checks import check_labeled_case

SHAPE, SPACING = (32, 36, 48), (10.0, 8.0, 8.0)


@pytest.fixture(scope="module")
def patients():
    return [phantom(seed, SHAPE, SPACING) for seed in range(8)]


def center_mm(mask):
    """(z, y, x) of the mask's center, from the middle of the volume."""
    return (np.argwhere(mask).mean(0) - (np.array(mask.shape) - 1) / 2) * SPACING


def test_same_seed_same_patient_and_another_seed_another():
    image, labels = phantom(3, SHAPE, SPACING)
    again, labels_again = phantom(3, SHAPE, SPACING)
    other, _ = phantom(4, SHAPE, SPACING)
    assert image.tobytes() == again.tobytes() and labels.tobytes() == labels_again.tobytes()
    assert (image != other).mean() > 0.5
    assert image.dtype == np.int16 and labels.dtype == np.uint8


def test_every_organ_is_there_and_on_its_side(patients):
    for _, labels in patients:
        assert set(np.unique(labels)) == set(LABELS.values())
        x = {name: center_mm(labels == value)[2] for name, value in LABELS.items()}
        assert x["right_kidney"] < 0 < x["left_kidney"]  # LPS: +x is the patient's left
        assert x["liver"] < 0 < x["spleen"]


def test_the_kidneys_differ_in_side_only(patients):
    kidneys = [
        [float(np.median(image[labels == LABELS[f"{side}_kidney"]])) for image, labels in patients]
        for side in ("right", "left")
    ]
    assert np.abs(np.subtract(*kidneys)).mean() < np.std(kidneys[0])  # the phase decides their contrast, not the side


def test_hounsfield_units_are_those_of_a_ct(patients):
    for image, labels in patients:
        assert image.min() >= -1024 and -1010 < np.median(image[:, 0]) < -960  # air above the patient
        assert -900 < np.median(image[(image < -500) & (image > -950)]) < -750  # lung
        assert 0.0005 < (image > 300).mean() < 0.05  # bone
        assert 20 < np.median(image[labels == LABELS["liver"]]) < 150


def test_no_threshold_separates_organs_from_the_rest(patients):
    image = np.concatenate([image.ravel() for image, _ in patients])
    liver = np.concatenate([labels.ravel() for _, labels in patients]) == LABELS["liver"]
    low, high = np.percentile(image[liver], (5, 95))
    inside = (image > low) & (image < high)
    assert 2 * (inside & liver).sum() / (inside.sum() + liver.sum()) < 0.6


def test_patients_vary(patients):
    volumes = np.array([[(labels == v).sum() for v in range(1, 7)] for _, labels in patients])
    assert (volumes.std(0) / volumes.mean(0) > 0.1).all()


def test_dataset_is_what_the_other_parts_read(tmp_path):
    folder = tmp_path / "Dataset900_Phantom"
    write_phantom_dataset(folder, labeled=2, unlabeled=3, test=1, shape=(16, 36, 48), spacing_mm=(20, 8, 8))
    description = json.loads((folder / "dataset.json").read_text())
    pool = unlabeled_cases(str(folder), description)
    assert len(pool) == 3 and all(Path(image).is_file() for images in pool.values() for image in images)
    for kind, count in ("Tr", 2), ("Ts", 1):
        images, labels = sorted((folder / f"images{kind}").iterdir()), sorted((folder / f"labels{kind}").iterdir())
        assert [p.name.replace("_0000", "") for p in images] == [p.name for p in labels] and len(labels) == count
        for image, label in zip(images, labels, strict=True):
            check_labeled_case([str(image)], str(label), LABELS.values())
    image = sitk.ReadImage(str(images[0]))
    assert image.GetDirection() == (1, 0, 0, 0, 1, 0, 0, 0, 1)
    assert image.GetSpacing()[2] == pytest.approx(20, rel=0.05) and image.GetSpacing()[0] == image.GetSpacing()[1]
    assert not [p for p in folder.rglob(".tmp*")]


def test_dataset_files_are_the_same_bytes_and_cases_do_not_depend_on_their_number(tmp_path):
    for name, labeled in ("a", 1), ("b", 2):
        write_phantom_dataset(tmp_path / name, labeled, 0, 0, shape=(8, 18, 24), spacing_mm=(40, 16, 16))
    for file in ("imagesTr/phantom_tr_000_0000.nii.gz", "labelsTr/phantom_tr_000.nii.gz"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_full_disk_is_named_without_a_traceback(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["phantom", str(tmp_path), "--unlabeled", "0", "--test", "0"])
    with no_file_longer_than(4096), pytest.raises(SystemExit, match="1"):
        main()
    message = f"error: phantom_tr_000_0000.nii.gz was not written to {tmp_path / 'imagesTr'}, where "
    assert message in capsys.readouterr().err
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
