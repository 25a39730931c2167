"""Dice by hand, the rule for what is absent, the table, and pictures that show what they should."""

import math

import numpy as np
import pytest
import SimpleITK as sitk

from nnunet_diffusion.errors import UserError
from nnunet_diffusion.evaluation.dice import case_mean, dice_scores, dice_table, mean_dice, organ_means
from nnunet_diffusion.evaluation.overlays import bounding_box, draw_overlay, read_axial, slices_to_show

DATASET = {"labels": {"background": 0, "liver": 1, "spleen": 2}, "file_ending": ".nii.gz"}


def write(path, array, direction=(1, 0, 0, 0, 1, 0, 0, 0, 1)):
    path.parent.mkdir(exist_ok=True)
    image = sitk.GetImageFromArray(np.asarray(array))
    image.SetDirection(direction)
    sitk.WriteImage(image, str(path))
    return str(path)


@pytest.fixture
def two_cases(tmp_path):
    """Case a: liver 2 voxels against 4, 2 shared; spleen nowhere. Case b: liver missed, spleen exact."""
    reference, prediction = np.zeros((2, 3, 4), np.uint8), np.zeros((2, 3, 4), np.uint8)
    reference[0, 0, :2], prediction[0, 0, :] = 1, 1
    a = write(tmp_path / "labels" / "a.nii.gz", reference)
    write(tmp_path / "predicted" / "a.nii.gz", prediction)
    reference[:], prediction[:] = 0, 0
    reference[0, 0, :2], reference[1, 1], prediction[1, 1] = 1, 2, 2
    b = write(tmp_path / "labels" / "b.nii.gz", reference)
    write(tmp_path / "predicted" / "b.nii.gz", prediction)
    return str(tmp_path / "predicted"), {"a": a, "b": b}


def test_dice_by_hand(two_cases):
    scores = dice_scores(*two_cases, DATASET)
    assert scores["a"]["liver"] == pytest.approx(2 * 2 / (2 + 4)) and math.isnan(scores["a"]["spleen"])
    assert scores["b"] == {"liver": 0.0, "spleen": 1.0}
    assert organ_means(scores) == pytest.approx({"liver": 1 / 3, "spleen": 1.0})  # the spleen: case b alone
    assert mean_dice(scores) == pytest.approx((1 / 3 + 1) / 2)
    assert case_mean(scores, "a") == pytest.approx(2 / 3)


def test_regions_and_ignored_voxels_by_hand(tmp_path):
    reference = write(tmp_path / "labels" / "a.nii.gz", np.array([[[1, 2, 3, 0]]], np.uint8))
    write(tmp_path / "predicted" / "a.nii.gz", np.array([[[1, 1, 1, 0]]], np.uint8))
    labels = {"background": 0, "whole": [1, 2], "core": 2, "ignore": 3}
    scores = dice_scores(str(tmp_path / "predicted"), {"a": reference}, DATASET | {"labels": labels})
    assert scores == {"a": {"whole": 1.0, "core": 0.0}}


def test_missing_prediction_and_other_shape_are_named(two_cases, tmp_path):
    folder, references = two_cases
    with pytest.raises(UserError, match=r"c\.nii\.gz: no prediction for case c"):
        dice_scores(folder, references | {"c": references["a"]}, DATASET)
    write(tmp_path / "predicted" / "a.nii.gz", np.zeros((1, 3, 4), np.uint8))
    with pytest.raises(UserError, match=r"predicted/a\.nii\.gz.*voxels"):
        dice_scores(folder, references, DATASET)


def test_table_shows_arms_beside_each_other_and_their_difference():
    scratch = {"a": {"liver": 0.5, "spleen": math.nan}}
    ours = {"a": {"liver": 0.75, "spleen": math.nan}}
    lines = dice_table({"from scratch": scratch, "pre-trained": ours}).splitlines()
    assert lines[0].split() == ["Dice", "from", "scratch", "pre-trained", "difference"]
    assert lines[2].split() == ["liver", "0.500", "0.750", "+0.250"]
    assert lines[3].split() == ["spleen", "-", "-", "-"]
    assert lines[-1].split() == ["mean", "0.500", "0.750", "+0.250"]
    assert len({len(line) for line in lines}) == 1
    assert "difference" not in dice_table({"one": scratch, "two": ours, "three": ours})


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


def test_overlay_draws_predictions_in_the_legends_colours(tmp_path):
    from matplotlib.image import imread

    image, labels = np.full((3, 40, 50), -1000, np.int16), np.zeros((3, 40, 50), np.uint8)
    image[:, 5:35, 5:45], labels[1, 10:30, 10:40] = 40, 1
    files = write(tmp_path / "i" / "a.nii.gz", image), write(tmp_path / "l" / "a.nii.gz", labels)
    empty = write(tmp_path / "p" / "a.nii.gz", labels * 0)
    draw_overlay(tmp_path / "full.png", *files, {"arm": files[1]}, DATASET["labels"], "case a", slices=1)
    draw_overlay(tmp_path / "empty.png", *files, {"arm": empty}, DATASET["labels"], "case a", slices=1)
    full, without = imread(tmp_path / "full.png")[..., :3], imread(tmp_path / "empty.png")[..., :3]
    assert full.shape == without.shape
    changed = np.abs(full - without).max(-1) > 0.1
    third = full.shape[1] // 3
    assert not changed[:, : 2 * third - 5].any() and changed[:, 2 * third :].mean() > 0.2  # the arm's column alone
    assert sorted(path.name for path in tmp_path.glob("*png")) == ["empty.png", "full.png"]
