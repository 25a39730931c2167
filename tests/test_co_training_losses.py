"""Losses of student and teacher: by hand, as nnU-Net's own, against slow loops, their gradients."""

import math

import pytest
import torch
from nnunetv2.training.loss.compound_losses import DC_and_CE_loss
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss

from nnunet_diffusion.co_training.losses import (
    agreement,
    labeled_loss,
    pseudo_label_loss,
    unlabeled_loss,
)
from nnunet_diffusion.optimization import ramp_up

ALL = torch.tensor([True, True, True])


def complete(logits):
    """The group map of images in which every class is known."""
    return torch.arange(logits.shape[1]).expand(logits.shape[:2])


def random_case(classes=4, shape=(5, 6), batch=3, dtype=torch.float64):
    logits = 2 * torch.randn(batch, classes, *shape, dtype=dtype)
    return logits, torch.randint(0, classes, (batch, 1, *shape))


def slow_pseudo_label_loss(logits, labels, is_kept, batch_dice, smooth=1e-5, unknown=()):
    """From the equation, voxel by voxel: mean cross-entropy minus mean foreground Dice of the kept images.

    `unknown` (image, class) pairs are background.
    """
    p = logits.softmax(1)
    for b, c in unknown:
        is_class = torch.arange(p.shape[1])[:, None, None] == c
        whole = torch.where(torch.arange(p.shape[1])[:, None, None] == 0, p[b] + p[b, c], p[b])
        p = torch.cat([p[:b], torch.where(is_class, 0, whole)[None], p[b + 1 :]])
    kept = [b for b in range(len(p)) if is_kept[b]]
    if not kept:
        return torch.zeros((), dtype=p.dtype)
    entropy, dice = 0, []
    sums = {}
    for b in kept:
        flat, label = p[b].flatten(1), labels[b].flatten()
        entropy = entropy - sum(flat[label[v], v].log() for v in range(len(label))) / len(label)
        for c in range(1, p.shape[1]):
            if (b, c) in unknown:
                continue
            key = c if batch_dice else (b, c)
            inside, total = sums.get(key, (0, 0))
            sums[key] = inside + flat[c][label == c].sum(), total + flat[c].sum() + (label == c).sum()
    dice = [(2 * inside + smooth) / (total + smooth) for inside, total in sums.values()]
    return entropy / len(kept) - sum(dice) / len(dice)


# ---------------------------------------------------------------- pseudo labels


def test_pseudo_label_loss_by_hand():
    # Two voxels, two classes. Voxel 1: p = (3/4, 1/4), label 0; voxel 2: p = (1/5, 4/5), label 1.
    # Cross-entropy: -(ln 3/4 + ln 4/5) / 2. Dice of class 1: 2 * 4/5 / (1/4 + 4/5 + 1).
    logits = torch.tensor([[[0.75, 0.2], [0.25, 0.8]]]).log().reshape(1, 2, 1, 2)
    loss = pseudo_label_loss(logits, torch.tensor([[[[0, 1]]]]), complete(logits), torch.tensor([True]), smooth=0)
    expected = -(math.log(0.75) + math.log(0.8)) / 2 - 1.6 / 2.05
    assert loss.item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("batch_dice", [True, False])
@pytest.mark.parametrize("shape", [(5, 6), (3, 4, 5)])
def test_with_everything_kept_it_is_nnunets_own_loss(batch_dice, shape):
    logits, labels = random_case(shape=shape, dtype=torch.float32)
    options = {"batch_dice": batch_dice, "smooth": 1e-5, "do_bg": False, "ddp": False}
    nnunet = DC_and_CE_loss(options, {}, dice_class=MemoryEfficientSoftDiceLoss)
    torch.testing.assert_close(
        pseudo_label_loss(logits, labels, complete(logits), ALL, batch_dice), nnunet(logits, labels)
    )


@pytest.mark.parametrize("batch_dice", [True, False])
@pytest.mark.parametrize("kept", [[1, 1, 1], [1, 0, 1], [0, 1, 0], [0, 0, 0]])
def test_pseudo_label_loss_against_loops(batch_dice, kept):
    logits, labels = random_case()
    is_kept = torch.tensor(kept, dtype=torch.bool)
    loss = pseudo_label_loss(logits, labels, complete(logits), is_kept, batch_dice)
    torch.testing.assert_close(loss, slow_pseudo_label_loss(logits, labels, is_kept, batch_dice))


def test_a_dropped_image_has_no_gradient_at_all():
    logits, labels = random_case()
    logits.requires_grad_()
    pseudo_label_loss(logits, labels, complete(logits), torch.tensor([True, False, True])).backward()
    assert logits.grad[1].eq(0).all() and all(logits.grad[b].ne(0).any() for b in (0, 2))


@pytest.mark.parametrize("batch_dice", [True, False])
def test_pseudo_label_gradients(batch_dice):
    logits, labels = random_case(classes=3, shape=(2, 2), batch=2)
    is_kept = torch.tensor([True, False])
    assert torch.autograd.gradcheck(
        lambda z: pseudo_label_loss(z, labels, complete(z), is_kept, batch_dice), logits.requires_grad_()
    )


# ---------------------------------------------------------------- the gate


def test_agreement_by_hand():
    first = torch.tensor([[0, 1, 1, 2], [0, 1, 1, 0], [0, 0, 0, 0], [1, 1, 0, 0]])
    second = torch.tensor([[0, 1, 2, 2], [0, 0, 0, 2], [0, 0, 0, 0], [1, 1, 0, 0]])
    # image 0: class 1 has 2 and 1, 1 in common: 2/3, class 2 has 1 and 2, 1 in common: 2/3; image 1: nothing in common;
    # image 2: nobody has foreground; image 3: the same, class 2 does not count
    expected = torch.tensor([2 / 3, 0, 0, 1])
    torch.testing.assert_close(agreement(first, second, 3), expected)
    torch.testing.assert_close(agreement(second, first, 3), expected)


def test_agreement_does_not_depend_on_where_classes_and_voxels_are():
    first, second = torch.randint(0, 4, (2, 3, 1, 5, 6))
    order, names = torch.randperm(30), torch.tensor([0, 3, 1, 2])
    permuted = [names[mask.flatten(1)[:, order]] for mask in (first, second)]
    torch.testing.assert_close(agreement(*permuted, 4), agreement(first, second, 4))


def test_the_gate_keeps_what_agrees_at_least_so_far():
    student, _ = random_case()
    teacher = student.clone()
    teacher[1] = teacher[1].roll(1, 0)  # other classes everywhere
    loss, agreed = unlabeled_loss(student, [teacher], [], 0.5, True)
    assert agreed[0] == agreed[2] == 1 and agreed[1] < 0.5
    hard_student, hard_teacher = student.argmax(1, True), teacher.argmax(1, True)
    is_kept = torch.tensor([True, False, True])
    expected = slow_pseudo_label_loss(student, hard_teacher, is_kept, True)
    expected = expected + slow_pseudo_label_loss(teacher, hard_student, is_kept, True)
    torch.testing.assert_close(loss, expected)
    assert unlabeled_loss(student, [teacher], [], 0.0, True)[0] != loss


def test_with_nothing_kept_only_the_errors_teach():
    student, _ = random_case()
    teacher = student.roll(1, 1).requires_grad_()
    error = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    loss, _ = unlabeled_loss(student.requires_grad_(), [teacher, teacher], [error], 1.1, False)
    loss.backward()
    assert loss.item() == pytest.approx(0.7) and error.grad == 1
    assert student.grad.eq(0).all() and teacher.grad.eq(0).all()


# ---------------------------------------------------------------- the whole losses


def test_unlabeled_loss_against_the_formula():
    student, teacher, first, second = (random_case()[0] for _ in range(4))
    errors = [torch.tensor(0.3), torch.tensor(0.5)]
    loss, _ = unlabeled_loss(student, [teacher, first, second], errors, 0.0, False)
    hard_student, hard_teacher = student.argmax(1, True), teacher.argmax(1, True)
    d = [
        slow_pseudo_label_loss(logits, hard, ALL, False)
        for logits, hard in (
            (student, hard_teacher), (teacher, hard_student), (first, hard_student), (second, hard_student),
        )
    ]  # fmt: skip
    torch.testing.assert_close(loss, d[0] + d[1] + (d[2] + d[3]) / 2 + 0.4)


def test_labeled_loss_against_the_formula():
    judge = {"p1": 1.0, "p2": 10.0, "q1": 100.0, "q2": 300.0}.__getitem__
    errors = [torch.tensor(1000.0), torch.tensor(3000.0)]
    assert labeled_loss("p1", ["p2", "q1", "q2"], errors, judge) == 1 + 10 + 200 + 2000
    assert labeled_loss("p1", ["p2"], [], judge) == 11
    assert labeled_loss("p1", [], [], judge) == 1


def test_pseudo_labels_are_constants_and_both_learn():
    """The gradient of each mask's logits is that of its own terms alone."""
    student, teacher = (random_case()[0].requires_grad_() for _ in range(2))
    unlabeled_loss(student, [teacher], [], 0.0, False)[0].backward()
    for logits, other in ((student, teacher), (teacher, student)):
        alone = logits.detach().clone().requires_grad_()
        pseudo_label_loss(alone, other.detach().argmax(1, True), complete(alone), ALL).backward()
        torch.testing.assert_close(logits.grad, alone.grad)


def test_what_neither_finds_is_unknown_and_two_empty_masks_teach_nothing():
    """Image 0: the teacher alone finds class 3, so it is known; neither finds class 2. Image 1: both are empty."""
    student, _ = random_case(batch=2)
    student[0, [2, 3]], student[1, 1:] = -9, -9
    teacher = student.clone()
    teacher[0, 3, 0, 0] = 9
    loss, agreed = unlabeled_loss(student.requires_grad_(), [teacher], [], 0.0, False)
    assert agreed[1] == 0 and 0 < agreed[0] < 1
    is_kept, unknown = torch.tensor([True, False]), [(0, 2)]
    expected = slow_pseudo_label_loss(student, teacher.argmax(1, True), is_kept, False, unknown=unknown)
    expected = expected + slow_pseudo_label_loss(teacher, student.detach().argmax(1, True), is_kept, False,
                                                 unknown=unknown)  # fmt: skip
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert student.grad[1].eq(0).all(), "not even with the gate open"
    lowered = student.detach().clone()
    lowered[0, 2] += 3
    lowered[0, 0] = (lowered[0, 0].exp() - lowered[0, 2].exp() + student.detach()[0, 2].exp()).log()
    again, _ = unlabeled_loss(lowered, [teacher], [], 0.0, False)
    first = pseudo_label_loss(student, teacher.argmax(1, True), torch.tensor([[0, 1, 0, 3], [0] * 4]), is_kept)
    second = pseudo_label_loss(lowered, teacher.argmax(1, True), torch.tensor([[0, 1, 0, 3], [0] * 4]), is_kept)
    torch.testing.assert_close(first, second), "nor does it cost to move background to what is unknown"
    assert again.isfinite()


def test_weight_of_the_pool_grows_linearly():
    assert [ramp_up(epoch, 8, 0.5) for epoch in (0, 1, 2, 4, 7)] == [0, 0.25, 0.5, 1, 1]
    assert ramp_up(0, 8, 0.0) == 1


def test_half_precision_stays_finite():
    student, teacher = (30 * random_case(dtype=torch.float32)[0].bfloat16() for _ in range(2))
    loss, _ = unlabeled_loss(student.requires_grad_(), [teacher], [], 0.0, True)
    loss.backward()
    assert loss.isfinite() and student.grad.isfinite().all()
