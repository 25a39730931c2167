"""Which labels differ by side, and which axis runs from left to right."""

import numpy as np
import pytest
import SimpleITK as sitk
from nnunetv2.imageio.nibabel_reader_writer import NibabelIO, NibabelIOWithReorient
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO

from nnunet_diffusion.partial.laterality import axes_not_to_mirror, lateral_pairs, left_right_axis


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ("left kidney", "right kidney"),
        ("LeftParotid", "RightParotid"),
        ("kidney_left", "kidney_right"),
        ("Lung-L", "Lung-R"),
        ("lung_upper_lobe_left", "lung_upper_lobe_right"),
        ("left adrenal gland", "right adrenal gland"),
        ("L femur", "R femur"),
    ],
)
def test_pairs_are_found_in_any_notation(left, right):
    assert lateral_pairs(["background", right, "liver", left]) == [(left, right)]


def test_half_pairs_and_letters_inside_words_are_no_pairs():
    assert lateral_pairs(["left kidney", "spleen", "right lung", "brightness", "leftover", "l", "larynx"]) == []


def image_with_axes(folder, letters):
    """An image whose x, y, z index axes point to e.g. L, P, S; its array holds the patient's left-right position."""
    world = {"L": (1, 0, 0), "R": (-1, 0, 0), "P": (0, 1, 0), "A": (0, -1, 0), "S": (0, 0, 1), "I": (0, 0, -1)}
    columns = np.array([world[letter] for letter in letters], float).T
    tilt = np.deg2rad(10)
    columns = np.array([[np.cos(tilt), -np.sin(tilt), 0], [np.sin(tilt), np.cos(tilt), 0], [0, 0, 1]]) @ columns
    image = sitk.Image((4, 5, 6), sitk.sitkFloat32)
    image.SetDirection(columns.flatten().tolist())
    array = np.zeros((6, 5, 4), np.float32)
    for index in np.ndindex(4, 5, 6):
        array[index[::-1]] = image.TransformIndexToPhysicalPoint(index)[0]
    filled = sitk.GetImageFromArray(array)
    filled.CopyInformation(image)
    path = str(folder / f"{letters}.nii.gz")
    sitk.WriteImage(filled, path)
    return path


@pytest.mark.parametrize("reader", [SimpleITKIO, NibabelIO, NibabelIOWithReorient])
@pytest.mark.parametrize("letters", ["LPS", "RAI", "PSL", "SLP", "ARS", "SPR"])
def test_the_axis_is_the_one_along_which_left_right_position_changes_most(tmp_path, reader, letters):
    array, properties = reader().read_images([image_with_axes(tmp_path, letters)])
    steps = [np.abs(np.diff(array[0], axis=axis)).mean() for axis in range(3)]
    assert left_right_axis(properties) == int(np.argmax(steps))


def test_patch_axes_follow_the_transpose_and_the_dimensions(tmp_path):
    _, properties = SimpleITKIO().read_images([image_with_axes(tmp_path, "LPS")])  # left-right is array axis 2
    assert axes_not_to_mirror([properties], [0, 1, 2], 3) == {2}
    assert axes_not_to_mirror([properties], [2, 0, 1], 3) == {0}
    assert axes_not_to_mirror([properties], [1, 0, 2], 2) == {1}
    assert axes_not_to_mirror([properties], [2, 0, 1], 2) == set(), "2-D slices perpendicular to left-right"


def test_images_that_lie_differently_exclude_both_axes_and_pictures_none(tmp_path):
    several = [SimpleITKIO().read_images([image_with_axes(tmp_path, a)])[1] for a in ("LPS", "PSL")]
    assert axes_not_to_mirror(several, [0, 1, 2], 3) == {2, 0}
    assert axes_not_to_mirror([{"spacing": (999, 1, 1)}], [0, 1, 2], 2) == set()
