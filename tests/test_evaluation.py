"""Dice by hand, the rule for what is absent, means, tables, and pictures that show what they should."""

import math

import numpy as np
import pytest
import SimpleITK as sitk

from nnunet_diffusion.evaluation.folders import evaluate_folders
from nnunet_diffusion.evaluation.overlays import bounding_box, draw_overlay, read_axial, slices_to_show
from nnunet_diffusion.evaluation.rules import NNUNET
from nnunet_diffusion.evaluation.summary import dice_scores
from nnunet_diffusion.tables import deviation, figure, mean, mean_over_organs, organ_means, text_table

DATASET = {"labels": {"background": 0, "liver": 1, "spleen": 2}, "file_ending": ".nii.gz"}


def write(path, array, direction=(1, 0, 0, 0, 1, 0, 0, 0, 1)):
    path.parent.mkdir(exist_ok=True)
    image = sitk.GetImageFromArray(np.asarray(array))
    image.SetDirection(direction)
    sitk.WriteImage(image, str(path))
    return str(path)


def test_dice_and_its_means_by_hand(tmp_path):
    """Case a: liver 2 voxels against 4, 2 shared; spleen nowhere. Case b: liver missed, spleen exact."""
    reference, prediction = np.zeros((2, 3, 4), np.uint8), np.zeros((2, 3, 4), np.uint8)
    reference[0, 0, :2], prediction[0, 0, :] = 1, 1
    write(tmp_path / "labels" / "a.nii.gz", reference)
    write(tmp_path / "predicted" / "a.nii.gz", prediction)
    reference[:], prediction[:] = 0, 0
    reference[0, 0, :2], reference[1, 1], prediction[1, 1] = 1, 2, 2
    write(tmp_path / "labels" / "b.nii.gz", reference)
    write(tmp_path / "predicted" / "b.nii.gz", prediction)
    found = evaluate_folders(str(tmp_path / "predicted"), str(tmp_path / "labels"), DATASET, NNUNET)
    scores = dice_scores(found)
    assert scores["a"]["liver"] == pytest.approx(2 * 2 / (2 + 4)) and math.isnan(scores["a"]["spleen"])
    assert scores["b"] == {"liver": 0.0, "spleen": 1.0}
    assert organ_means(scores) == pytest.approx({"liver": 1 / 3, "spleen": 1.0})  # the spleen: case b alone
    assert mean_over_organs(scores) == pytest.approx((1 / 3 + 1) / 2)
    assert mean(scores["a"].values()) == pytest.approx(2 / 3)


def test_means_leave_out_what_is_not_defined():
    assert mean([0.2, None, math.nan, 0.4]) == pytest.approx(0.3) and math.isnan(mean([])) and math.isnan(mean([None]))
    assert deviation([1.0, 3.0, None]) == pytest.approx(math.sqrt(2)) and math.isnan(deviation([1.0, math.nan]))
    assert mean_over_organs({"a": {"x": 0.2}, "b": {"x": 0.4, "y": 1.0, "z": None}}) == pytest.approx((0.3 + 1) / 2)


def test_table_and_figures_by_hand():
    assert figure(0.25) == "0.250" and figure(0.25, 0.5, 1, "+") == "+0.2 ± 0.5"
    assert figure(None) == figure(math.nan, 1.0) == "-"
    columns = {"organ": ["a", "long", "mean"], "n": [1, 22, ""]}
    assert text_table(columns).splitlines() == ["organ   n", "-" * 9, "a       1", "long   22", "-" * 9, "mean"]
    assert text_table(columns, has_footer=False).splitlines()[1:] == ["-" * 9, "a       1", "long   22", "mean"]


def test_read_axial_turns_the_patient_upright(tmp_path):
    """A voxel at the patient's left, back and head must be last on every axis, however the file is stored."""
    array = np.zeros((3, 4, 5), np.int16)
    array[2, 0, 0] = 7  # x and y run to the right and the front: the first is at the left and the back
    stored = write(tmp_path / "images" / "a.nii.gz", array, direction=(-1, 0, 0, 0, -1, 0, 0, 0, 1))
    upright, spacing = read_axial(stored)
    assert upright[2, 3, 4] == 7 and spacing == (1.0, 1.0, 1.0)


def test_slices_with_most_organs_are_chosen():
    reference = np.zeros((20, 8, 8), np.uint8)
    reference[3:6, :2], reference[12:18, :4], reference[14, 5:] = 1, 2, 3
    assert slices_to_show(reference, 1) == [14]
    assert len(slices_to_show(reference, 2)) == 2 and slices_to_show(reference, 2)[0] == 14
    assert slices_to_show(np.zeros((3, 8, 8), np.uint8), 1) == [0]  # nothing to show: still a picture


def test_bounding_box_leaves_air_out():
    image = np.full((4, 40, 50), -1000)
    image[:, 10:20, 15:30] = 40
    assert bounding_box(image, True) == (7, 23, 12, 33)
    assert bounding_box(np.full((4, 40, 50), -1000), True) == (0, 40, 0, 50)


def test_overlay_draws_predictions_in_the_legends_colors(tmp_path):
    from matplotlib.image import imread

    image, labels = np.full((3, 40, 50), -1000, np.int16), np.zeros((3, 40, 50), np.uint8)
    image[:, 5:35, 5:45], labels[1, 10:30, 10:40] = 40, 1
    files = write(tmp_path / "i" / "a.nii.gz", image), write(tmp_path / "l" / "a.nii.gz", labels)
    empty = write(tmp_path / "p" / "a.nii.gz", labels * 0)
    names = {"background": 0, "$\\frac{": 1}  # no mathematics, and no error of matplotlib's
    draw_overlay(tmp_path / "full.png", *files, {"$arm^": files[1]}, names, "$case a_$", slices=1)
    draw_overlay(tmp_path / "empty.png", *files, {"$arm^": empty}, names, "$case a_$", slices=1)
    full, without = imread(tmp_path / "full.png")[..., :3], imread(tmp_path / "empty.png")[..., :3]
    assert full.shape == without.shape
    changed = np.abs(full - without).max(-1) > 0.1
    third = full.shape[1] // 3
    assert not changed[:, : 2 * third - 5].any() and changed[:, 2 * third :].mean() > 0.2  # the arm's column alone
    assert sorted(path.name for path in tmp_path.glob("*png")) == ["empty.png", "full.png"]
