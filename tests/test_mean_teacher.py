"""Learning from a pool with an averaged teacher: views, copy-paste, pseudo labels."""

import pytest
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunet_diffusion.mean_teacher.copy_paste import random_boxes, random_labeled_parts
from nnunet_diffusion.mean_teacher.pseudo_labels import ClassThresholds, dice_of_counts, occurring, without_absent
from nnunet_diffusion.mean_teacher.strong_view import with_strong_view


def one_hot_probabilities(labels, confidence, classes):
    """(B, C, X, Y) probabilities with that confidence of the label at each voxel."""
    labels, confidence = torch.tensor(labels)[None], torch.tensor(confidence)[None]
    rest = (1 - confidence) / (classes - 1)
    return torch.where(
        torch.arange(classes)[None, :, None, None] == labels[:, None], confidence[:, None], rest[:, None]
    )


# ---------------------------------------------------------------- pseudo labels


def test_labels_are_ignored_below_the_threshold():
    probabilities = one_hot_probabilities([[0, 1], [2, 2]], [[0.9, 0.5], [0.7, 0.59]], 3)
    labels = ClassThresholds(3, 0.6).labels(probabilities, ignore_label=9)
    assert labels.tolist() == [[[[0, 9], [2, 9]]]]


def test_a_class_that_the_teacher_is_less_sure_of_has_a_lower_threshold():
    thresholds = ClassThresholds(3, 0.6, momentum=0.5)
    probabilities = one_hot_probabilities([[0, 0], [1, 1]], [[0.9, 0.9], [0.6, 0.4]], 3)
    thresholds.update(probabilities)
    # by hand: usual is 1 at first, then halfway to the mean: (1 + 0.9) / 2, (1 + 0.5) / 2, and 1 where none occurred
    assert torch.allclose(thresholds.usual, torch.tensor([0.95, 0.75, 1.0]))
    assert torch.allclose(thresholds.thresholds(), 0.6 * torch.tensor([0.95, 0.75, 1.0]))
    assert thresholds.labels(probabilities, 9).tolist() == [[[[0, 0], [1, 9]]]]
    fixed = ClassThresholds(3, 0.6, momentum=0.5, is_adaptive=False)
    fixed.update(probabilities)
    assert torch.equal(fixed.thresholds(), torch.full((3,), 0.6))


def test_running_means_survive_a_checkpoint():
    thresholds = ClassThresholds(3, 0.6)
    thresholds.update(one_hot_probabilities([[0, 1]], [[0.9, 0.5]], 3))
    again = ClassThresholds(3, 0.6)
    again.load_state_dict(thresholds.state_dict())
    assert torch.equal(again.usual, thresholds.usual) and again.usual[1] < 1


def test_what_occurs_and_what_its_dice_is():
    target = torch.tensor([[[[0, 1], [2, 7]]], [[[0, 0], [2, 2]]]])
    assert occurring(target, 3).tolist() == [[True, True, True], [True, False, True]]
    # 2 of 3 found and 1 too many; nothing there; there and not found
    assert dice_of_counts([2, 0, 0], [1, 0, 0], [1, 0, 5]) == pytest.approx([4 / 6, 0, 0])


def test_absent_classes_are_merged_into_the_background():
    labels = torch.tensor([[[[0, 1], [1, 0]]], [[[2, 2], [0, 9]]], [[[0, 0], [0, 0]]]])
    complete = torch.arange(4).expand(3, 4)
    assert without_absent(complete, labels).tolist() == [[0, 1, 0, 0], [0, 0, 2, 0], [0, 0, 0, 0]]
    # 2 and 3 are a union whose value is 2: there, it stays one, not there, both are background
    union = torch.tensor([[0, 1, 2, 2]] * 3)
    assert without_absent(union, labels).tolist() == [[0, 1, 0, 0], [0, 0, 2, 2], [0, 0, 0, 0]]
    partial = torch.tensor([[0, 0, 2, 3]] * 3)
    assert without_absent(partial, labels).tolist() == [[0, 0, 0, 0], [0, 0, 2, 0], [0, 0, 0, 0]]


# ---------------------------------------------------------------- copy-paste


@pytest.mark.parametrize("size", [(30, 60), (12, 30, 33)])
def test_boxes_are_a_third_to_two_thirds_of_each_side_and_come_everywhere(size):
    torch.manual_seed(0)
    boxes = random_boxes((400, 2, *size))
    assert boxes.shape == (400, 1, *size) and boxes.dtype == torch.bool
    for axis, length in enumerate(size):
        along = boxes.flatten(1, 1).any(dim=[i + 2 for i in range(len(size)) if i != axis])[:, 0]
        sides = along.sum(1)
        assert sides.min() == round(length / 3) and sides.max() == round(2 * length / 3)
        assert along.any(0).all(), "some box covers each place"
        steps = along.int().diff(dim=1).abs().sum(1)
        assert steps.max() <= 2, "in one piece"
    volumes = boxes.flatten(1).sum(1)
    extents = torch.ones(400, dtype=torch.long)
    for axis in range(len(size)):
        extents *= boxes.any(dim=[i + 2 for i in range(len(size)) if i != axis])[:, 0].sum(1)
    assert torch.equal(volumes, extents), "a box, and nothing but a box"


def test_parts_of_both_kinds_come_equally_often():
    torch.manual_seed(0)
    parts = random_labeled_parts((400, 1, 30, 30), "both")
    is_box_of_pool = parts[:, 0, 0, 0] | parts[:, 0, -1, -1]  # a corner may lie in a box, two opposite ones cannot
    assert 0.4 < is_box_of_pool.float().mean() < 0.65
    assert not random_labeled_parts((4, 1, 30, 30), "none").any()
    into_pool = random_labeled_parts((400, 1, 30, 30), "into_pool").float().mean((1, 2, 3))
    assert into_pool.max() <= 4 / 9 + 0.02 and into_pool.min() > 0.1
    with pytest.raises(ValueError, match="paste is 'all'"):
        random_labeled_parts((4, 1, 30, 30), "all")


# ---------------------------------------------------------------- views


def views_of(image, segmentation, masked=None, probability=1.0):
    transforms = nnUNetTrainer.get_training_transforms(
        image.shape[1:], (-0.2, 0.2), None, (0,), False, use_mask_for_norm=masked
    )
    both = with_strong_view(transforms, len(image), probability)
    return both(image=image.clone(), segmentation=segmentation.clone())["image"]


def test_the_weak_view_keeps_intensities_and_the_strong_one_the_place():
    torch.manual_seed(0)
    image = torch.zeros(2, 32, 32)
    image[:, 10:20, 14:20] = torch.tensor([1.0, 3.0])[:, None, None]
    nothing = torch.zeros(1, 32, 32, dtype=torch.int16)
    for _ in range(20):
        weak, strong = views_of(image, nothing).chunk(2)
        assert weak.shape == strong.shape == image.shape
        assert weak.min() >= 0 and weak[1].max() < 3.001, "geometry only"
        assert not torch.allclose(weak, strong)
        for a, b in zip(weak, strong, strict=True):  # the same place: what is bright is bright in both
            where = a > a.max() / 2
            assert b[where].mean() > b[~where].mean()
    weak, strong = views_of(image, nothing, probability=0.0).chunk(2)
    assert torch.equal(weak, strong)


def test_outside_of_a_mask_both_views_stay_zero():
    image, outside = torch.ones(1, 32, 32), torch.zeros(1, 32, 32, dtype=torch.int16)
    image[:, :16], outside[:, :16] = 0, -1
    both = views_of(image, outside, masked=[True])
    at_zero = (both == 0).float().mean((1, 2))
    assert (at_zero > 0.3).all(), "noise does not come outside of the mask, in neither view"


def test_nnunets_own_transforms_are_left_as_they_are():
    transforms = nnUNetTrainer.get_training_transforms((8, 8), (-0.2, 0.2), None, (0,), False)
    before = repr(transforms.transforms)
    with_strong_view(transforms, 1, 0.9)
    assert repr(transforms.transforms) == before
