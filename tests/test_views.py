"""Which views a training shows: rotations and mirroring that fit the data, sides that stay where they are."""

import numpy as np
import pytest
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunet_diffusion.views import Views, choose_views, lie_the_same_way, orientation, rotated_patch_size

UPRIGHT = {"sitk_stuff": {"direction": (1, 0, 0, 0, 1, 0, 0, 0, 1)}}
NNUNET = Views(180.0, (0, 1))


def test_orientation_is_the_nearest_axis_and_its_sign():
    assert orientation(UPRIGHT) == ((0, False), (1, False), (2, False))
    c, s = np.cos(0.3), np.sin(0.3)  # tilted by 17 degrees, the second image axis against y
    assert orientation({"sitk_stuff": {"direction": (c, s, 0, s, -c, 0, 0, 0, 1)}}) == (
        (0, False), (1, True), (2, False),
    )  # fmt: skip
    affine = np.array([[0, -2, 0, 9], [0, 0, 3, 9], [1, 0, 0, 9], [0, 0, 0, 1.0]])
    assert orientation({"nibabel_stuff": {"original_affine": affine}}) == ((2, False), (0, True), (1, False))
    assert orientation({"spacing": (999, 1, 1)}) is None, "a picture"
    assert orientation({"sitk_stuff": {"direction": (1, 0, 0, 1)}}) is None, "a 2-D image"


def test_scans_lie_the_same_way_only_if_that_is_known_of_all():
    flipped = {"sitk_stuff": {"direction": (-1, 0, 0, 0, -1, 0, 0, 0, 1)}}
    assert lie_the_same_way([UPRIGHT, UPRIGHT])
    assert not lie_the_same_way([UPRIGHT, flipped])
    assert not lie_the_same_way([UPRIGHT, {"spacing": (999, 1, 1)}])
    assert not lie_the_same_way([{"spacing": (999, 1, 1)}])
    assert not lie_the_same_way([])


@pytest.mark.parametrize(
    ("mirroring", "degrees", "is_oriented", "lateral", "expected"),
    [
        ("auto", -1, True, (), Views(15, ())),
        ("auto", -1, True, (1,), Views(15, ())),
        ("auto", -1, False, (), NNUNET),
        ("auto", -1, False, (1,), Views(45, (0,))),
        ("all", -1, True, (), Views(15, (0, 1))),
        ("all", 180, True, (1,), Views(45, (0,))),
        ("none", -1, False, (), Views(180, ())),
        ("auto", 0, False, (), Views(0, (0, 1))),
        ("auto", 30, True, (), Views(30, ())),
    ],
)
def test_views_follow_the_settings_then_the_data(mirroring, degrees, is_oriented, lateral, expected):
    assert choose_views(NNUNET, mirroring, degrees, is_oriented, lateral) == expected


def test_mild_views_are_never_wilder_than_nnunets():
    assert choose_views(Views(10, (0,)), "auto", -1, True, ()).degrees == 10
    with pytest.raises(ValueError, match="mirroring is 'some'"):
        choose_views(NNUNET, "some", -1, True, ())


def test_the_patch_that_is_read_is_nnunets():
    # nnU-Net for 180 degrees, capped at 90: each side is as long as the other, divided by the least scale
    assert rotated_patch_size([96, 96], 180, False).tolist() == [112, 112]
    assert rotated_patch_size([20, 64, 64], 180, True).tolist()[0] == 20
    assert rotated_patch_size([96, 96], 0, False).tolist() == [112, 112]


@pytest.mark.parametrize(
    ("patch_size", "dummy_2d", "lateral"),
    [([24, 24], False, 0), ([24, 24], False, 1), ([8, 24, 24], True, 2), ([16, 16, 16], False, 0)],
)
def test_sides_never_swap_whatever_the_settings(patch_size, dummy_2d, lateral):
    """A phantom with 1 on its left and 2 on its right, transformed 1,000 times by nnU-Net's own augmentation."""
    nnunet = Views(180.0, tuple(range(len(patch_size))))
    views = choose_views(nnunet, "all", 180, True, {lateral})
    angle = np.deg2rad(views.degrees)
    transforms = nnUNetTrainer.get_training_transforms(patch_size, (-angle, angle), None, views.mirror_axes, dummy_2d)
    spatial = [t for t in transforms.transforms if type(t).__name__ in SPATIAL]
    for transform in spatial:
        if hasattr(transform, "p_rotation"):
            transform.p_rotation = 1.0
    size = rotated_patch_size(patch_size, views.degrees, dummy_2d)
    position = np.indices(size)[lateral] - (size[lateral] - 1) / 2
    near = np.all([abs(x - (n - 1) / 2) < n / 6 for x, n in zip(np.indices(size), size, strict=True)], 0)
    labels = torch.from_numpy(np.where(near, np.where(position < 0, 1, 2), 0)[None].astype(np.int16))
    np.random.seed(0)
    torch.manual_seed(0)
    swapped = 0
    for _ in range(1000):
        sample = {"image": labels.float(), "segmentation": labels.clone()}
        for transform in spatial:
            sample = transform(**sample)
        places = [np.argwhere(sample["segmentation"][0].numpy() == side)[:, lateral].mean() for side in (1, 2)]
        swapped += places[0] >= places[1]
    assert swapped == 0


SPATIAL = ("SpatialTransform", "MirrorTransform", "Convert3DTo2DTransform", "Convert2DTo3DTransform")
