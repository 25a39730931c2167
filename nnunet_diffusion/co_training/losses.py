"""Losses of a student and a teacher that learn together, from labeled images and from images without labels.

    labeled      L_s = D(p1, y) + D(p2, y) + mean_j D(q_j, y) + mean_j E_j
    not labeled  L_u = lambda { D(p1, hard p2) + D(p2, hard p1) + mean_j D(q_j, hard p1) + mean_j E_j }

p1 is the student's mask, p2 the teacher's, q_1, ..., q_K the teacher's masks of K rounds, E_j the errors of restoring
the image in them, hard the most probable class, a constant, and lambda grows from 0 to 1. Ciampi et al. 2025 (arXiv
2504.01547), abstract: teacher and student learn together, from labels where there are some and from pseudo labels else,
in several rounds. The formula is that of the authors' earlier public prototype, where D is a Dice loss. Ours: D is
nnU-Net's cross-entropy and Dice, for labels and pseudo labels alike; the gate; and that a class which neither of them
finds in an image is unknown there, merged into the background: absent or missed, nobody knows.

Without rounds it is cross pseudo supervision (Chen et al. 2021, arXiv 2106.01226).
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from nnunet_diffusion.mean_teacher.pseudo_labels import without_absent
from nnunet_diffusion.partial.merged_softmax import merged_softmax
from nnunet_diffusion.partial.soft_dice import soft_dice

Output = Tensor | Sequence[Tensor]  # of a network, with deep supervision those of all stages


def labeled_loss(
    student: Output, masks: Sequence[Output], errors: Sequence[Tensor], supervised_loss: Callable[[Output], Tensor]
) -> Tensor:
    """Computes L_s.

    Args:
        student: Logits p1.
        masks: Logits p2, q_1, ..., q_K; empty for a teacher that does not learn by itself.
        errors: E_1, ..., E_K.
        supervised_loss: D(., y), of what was annotated.

    Returns:
        Scalar.
    """
    first, later = masks[:1], masks[1:]
    terms = [supervised_loss(student), *map(supervised_loss, first)]
    return sum(terms) + _mean([supervised_loss(mask) for mask in later]) + _mean(errors)


def unlabeled_loss(
    student: Tensor, masks: Sequence[Tensor], errors: Sequence[Tensor], gate: float, batch_dice: bool
) -> tuple[Tensor, Tensor]:
    """Computes L_u without lambda, for images whose masks pass the gate; the others teach through E alone.

    So does an image in which student and teacher find nothing.

    Args:
        student: (B, C, X, Y[, Z]) logits p1.
        masks: Logits p2, q_1, ..., q_K.
        errors: E_1, ..., E_K.
        gate: Least `agreement` of hard p1 and hard p2; 0 keeps all.
        batch_dice: As in the plan's configuration.

    Returns:
        Scalar, and the (B,) agreement.
    """
    teacher, *later = masks
    student_labels, teacher_labels = student.argmax(1, keepdim=True), teacher.argmax(1, keepdim=True)
    agreed = agreement(student_labels, teacher_labels, student.shape[1])
    complete = torch.arange(student.shape[1]).expand(student.shape[:2])
    group = without_absent(complete, torch.cat([student_labels, teacher_labels], 2))  # absent in both
    is_kept = (agreed >= gate) & group.any(1).to(agreed.device)

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        return pseudo_label_loss(logits, labels, group, is_kept, batch_dice)

    both = loss(student, teacher_labels) + loss(teacher, student_labels)
    refined = [loss(mask, student_labels) for mask in later]
    return both + _mean(refined) + _mean(errors), agreed


def pseudo_label_loss(
    logits: Tensor, labels: Tensor, group: Tensor, is_kept: Tensor, batch_dice: bool = False, smooth: float = 1e-5
) -> Tensor:
    """Computes nnU-Net's cross-entropy minus foreground Dice over the images that are kept; 0 if none is.

    Args:
        logits: (B, C, X, Y[, Z]).
        labels: (B, 1, X, Y[, Z]) integers.
        group: (B, C) int64 on the CPU: c itself for a class that is known in an image, 0 for one that is not.
        is_kept: (B,) bool.
        batch_dice: One Dice a class over the kept images, instead of one a class and image.
        smooth: As nnU-Net's trainer sets it.

    Returns:
        Scalar; with everything kept and known, what `DC_and_CE_loss` is.
    """
    merged = merged_softmax(logits, labels, group)
    is_counted = is_kept[:, None] & (merged.group > 0)[:, 1:]
    dice = soft_dice(
        merged.inside[:, 1:], merged.mass[:, 1:], merged.voxels[:, 1:].to(merged.mass.dtype),
        is_counted, batch_dice, smooth, ddp=False,
    )  # fmt: skip
    entropy = torch.where(is_kept, -merged.log_target.mean(1), 0).sum() / is_kept.sum().clamp_min(1)
    return entropy - dice


def agreement(first: Tensor, second: Tensor, classes: int) -> Tensor:
    """Computes how far two masks agree: mean Dice over the foreground classes that one of them has; 0 if none has any.

    Args:
        first: (B, ...) integer labels 0 ... classes - 1.
        second: The same.
        classes: Background included.

    Returns:
        (B,) float in [0, 1]; symmetric.
    """
    first, second = first.flatten(1), second.flatten(1)
    dice = []
    for label in range(1, classes):
        a, b = first == label, second == label
        dice.append(2 * (a & b).sum(1) / (a.sum(1) + b.sum(1)))  # 0 / 0: neither has it
    return torch.stack(dice, 1).nanmean(1).nan_to_num(0.0)


def _mean(terms: Sequence[Tensor]) -> Tensor | float:
    return sum(terms) / len(terms) if terms else 0.0
