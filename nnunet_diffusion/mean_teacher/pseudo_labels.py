"""Pseudo labels of a teacher, where it is sure enough; each class has a threshold of its own."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class ClassThresholds(nn.Module):
    """Thresholds of confidence that follow how sure the teacher usually is of a class.

    A class that it is less sure of, as of small organs, would be shut out by one threshold for all. That of class c is
    tau m_c / max m, where m_c is the running mean of the probability of c where c is the most probable: the
    self-adaptive threshold of FreeMatch (Wang et al. 2023, arXiv 2205.07246), relative to a fixed one.

    Args:
        classes: Background included.
        confidence: tau.
        momentum: Of the running means, a step.
        is_adaptive: False: tau for every class.
    """

    def __init__(self, classes: int, confidence: float, momentum: float = 0.99, is_adaptive: bool = True):
        super().__init__()
        self.confidence, self.momentum, self.is_adaptive = confidence, momentum, is_adaptive
        self.register_buffer("usual", torch.ones(classes))

    def thresholds(self) -> Tensor:
        """Returns the (C,) thresholds."""
        return self.confidence * (self.usual / self.usual.max() if self.is_adaptive else torch.ones_like(self.usual))

    @torch.no_grad()
    def update(self, probabilities: Tensor) -> None:
        """Moves the running means of the classes that occur in (B, C, X, Y[, Z]) probabilities."""
        confidence, labels = (x.flatten() for x in probabilities.max(1))
        count = torch.bincount(labels, minlength=len(self.usual))
        mean = torch.bincount(labels, confidence, minlength=len(self.usual)) / count.clamp_min(1)
        moved = torch.lerp(mean.to(self.usual), self.usual, self.momentum)
        self.usual.copy_(torch.where(count > 0, moved, self.usual))

    def labels(self, probabilities: Tensor, ignore_label: int) -> Tensor:
        """Returns the most probable class of (B, C, X, Y[, Z]) where it reaches its threshold; else the ignore label.

        Returns:
            (B, 1, X, Y[, Z]) int64.
        """
        confidence, labels = probabilities.max(1, keepdim=True)
        return torch.where(confidence >= self.thresholds()[labels], labels, ignore_label)


def occurring(labels: Tensor, classes: int) -> Tensor:
    """Tells which classes occur in each case of labels (B, 1, X, Y[, Z]); other values count nowhere.

    Returns:
        (B, C) bool, on the labels' device.
    """
    return torch.stack([(labels == c).flatten(1).any(1) for c in range(classes)], 1)


def dice_of_counts(tp: Sequence[float], fp: Sequence[float], fn: Sequence[float]) -> list[float]:
    """Computes the Dice of each class from counts of voxels; 0 where a class neither is nor is predicted."""
    return [2 * t / (2 * t + p + n) if t else 0.0 for t, p, n in zip(tp, fp, fn, strict=True)]


def without_absent(group: Tensor, labels: Tensor) -> Tensor:
    """Merges classes that a teacher did not find in a case into the background: absent or missed, nobody knows.

    Args:
        group: (B, C) group map of what was annotated, see `partial.merged_softmax`.
        labels: (B, 1, X, Y[, Z]) labels and pseudo labels.

    Returns:
        (B, C) group map on the CPU.
    """
    is_there = occurring(labels, group.shape[1]).cpu()
    is_there[:, 0] = True
    stands = is_there.gather(1, group)  # a union is there if its first class is
    return torch.where(stands, group, 0)
