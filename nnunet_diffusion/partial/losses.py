"""Losses for cases of which each was annotated for some classes only: nobody is punished where nobody looked.

Marginal and exclusion loss of Shi et al. 2021 (arXiv 2007.03868), for nnU-Net's cross-entropy and Dice. Deviation: the
merge adds probabilities, where the authors' code adds logits.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from nnunetv2.training.loss.compound_losses import DC_and_CE_loss
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss
from torch import Tensor, nn

from nnunet_diffusion.partial.merged_softmax import MergedSoftmax, check_group, merged_softmax
from nnunet_diffusion.partial.soft_dice import SMOOTH, soft_dice


def merged_into_background(is_annotated: Tensor) -> Tensor:
    """Returns the group map (B, C) int64 of a mask (B, C) bool: an annotated class is itself, another is background.

    Raises:
        ValueError: If the background, channel 0, is not annotated in each case.
    """
    if not is_annotated[:, 0].all():
        raise ValueError(f"background is always annotated, but the mask is {is_annotated}")
    return torch.where(is_annotated, torch.arange(is_annotated.shape[1], device=is_annotated.device), 0)


def marginal_cross_entropy(merged: MergedSoftmax) -> Tensor:
    """Averages the cross-entropy of merged probabilities over voxels that are not ignored, in nats; 0 if all are."""
    return -merged.log_target.sum() / counted_voxels(merged).clamp_min(1)


def marginal_dice(
    merged: MergedSoftmax, batch_dice: bool = False, smooth: float = SMOOTH, do_bg: bool = False, ddp: bool = False
) -> Tensor:
    """Minus the mean soft Dice of the merged probabilities over annotated (case, class) pairs; 0 if there is none.

    A union has a Dice of its own: batch Dice does not add two kidneys here to the left one there. Those whose first
    class is the same share it.

    Args:
        merged: See `merged_softmax`.
        batch_dice: One Dice per class over the cases that annotate it, instead of one per case and class.
        smooth: As in nnU-Net.
        do_bg: Count the background, with what is merged into it.
        ddp: With `batch_dice`, over the cases of all processes.
    """
    group = merged.group
    members = torch.zeros_like(group).scatter_add_(1, group, torch.ones_like(group))
    sums = [torch.zeros_like(x).scatter_add(1, group, x)[:, 1 - do_bg :] for x in (merged.inside, merged.mass)]
    sums.append(merged.voxels[:, 1 - do_bg :].to(merged.mass.dtype))
    is_class, is_union = (members == 1)[:, 1 - do_bg :], (members > 1)[:, 1 - do_bg :]
    is_counted = torch.cat([is_class, is_union], 1)
    return -soft_dice(*(torch.cat([x, x], 1) for x in sums), is_counted, batch_dice, smooth, ddp)


def exclusion_loss(merged: MergedSoftmax) -> Tensor:
    """Measures the soft Dice overlap of each class that a case does not annotate with the foreground that it does.

    Organs do not overlap: one cannot be where another's true label is. Shi et al. 2021, exclusion Dice, as the mean
    over (case, class) pairs that are not annotated; 0 if there is none. Deviation: annotated classes are left out, the
    marginal losses forbid them elsewhere already; so is the exclusion cross-entropy, for the marginal one is the same.
    """
    is_unannotated = merged.group == 0
    is_unannotated[:, 0] = False
    overlap = 2 * (merged.mass - merged.inside) / (merged.mass + labeled_voxels(merged)[:, None]).clamp_min(1)
    return torch.where(is_unannotated, overlap, 0).sum() / is_unannotated.sum().clamp_min(1)


def counted_voxels(merged: MergedSoftmax) -> Tensor:
    """Counts the voxels that are not ignored; scalar."""
    return _stands_for_itself(merged.voxels, merged.group).sum()


def labeled_voxels(merged: MergedSoftmax) -> Tensor:
    """Counts the voxels with an annotated label; (B,)."""
    return _stands_for_itself(merged.voxels, merged.group)[:, 1:].sum(1)


def _stands_for_itself(values: Tensor, group: Tensor) -> Tensor:
    """Sets values (B, C) to 0 for the classes that are merged into another."""
    return torch.where(group == torch.arange(group.shape[1], device=group.device), values, 0)


class PartialLoss(nn.Module):
    """A loss that must be told, for each batch, what was annotated; see `annotated`."""

    annotation: Tensor | None = None

    def check(self, annotation: Tensor) -> None:
        """Raises ValueError if `annotation` is not what this loss needs."""
        raise NotImplementedError

    def known(self) -> Tensor:
        """Returns what was annotated in the batch."""
        if self.annotation is None:
            raise RuntimeError("what was annotated in this batch is not known: call the loss inside `with annotated`")
        return self.annotation


@contextmanager
def annotated(loss: nn.Module, annotation: Tensor) -> Iterator[None]:
    """Tells every `PartialLoss` that `loss` is or holds what was annotated in the batch, within the context.

    It reaches through nnU-Net's deep supervision, which has room for outputs and targets only, and forgets at the end,
    so that no batch is ever judged by the annotation of another.

    Args:
        loss: The loss of a trainer.
        annotation: On the CPU: (B, C) int64 group map for `PartialLabelLoss`, (B, R) bool mask for `PartialRegionLoss`.
    """
    losses = [module for module in loss.modules() if isinstance(module, PartialLoss)]
    for module in losses:
        module.check(annotation)
        module.annotation = annotation
    try:
        yield
    finally:
        for module in losses:
            module.annotation = None


class PartialLabelLoss(PartialLoss):
    """Marginal cross-entropy, marginal Dice and exclusion; nnU-Net's own `DC_and_CE_loss` when all is annotated.

    Args:
        batch_dice: As in the plan's configuration.
        ddp: Whether several processes train; only batch Dice talks to the others.
        ignore_label: The label manager's.
        exclusion_weight: Shi et al. 2021: 2.
        do_bg: As nnU-Net's trainer sets it.
    """

    def __init__(
        self,
        batch_dice: bool = False,
        ddp: bool = False,
        ignore_label: int | None = None,
        exclusion_weight: float = 2.0,
        do_bg: bool = False,
    ):
        super().__init__()
        self.dice_options = {"batch_dice": batch_dice, "smooth": SMOOTH, "do_bg": do_bg, "ddp": ddp}
        self.ignore_label, self.exclusion_weight = ignore_label, exclusion_weight
        self.complete = DC_and_CE_loss(
            dict(self.dice_options), {}, ignore_label=ignore_label, dice_class=MemoryEfficientSoftDiceLoss
        )
        # Another process's batch may be partial, and all must gather the same.
        self.may_be_complete = not (ddp and batch_dice)

    def check(self, annotation: Tensor) -> None:
        """Refuses what is not a group map."""
        check_group(annotation)

    def forward(self, net_output: Tensor, target: Tensor) -> Tensor:
        """Maps, as nnU-Net's, (B, C, X, Y[, Z]) logits and (B, 1, X, Y[, Z]) labels to a scalar."""
        group = self.known()
        if self.may_be_complete and (group == torch.arange(group.shape[1])).all():
            return self.complete(net_output, target)
        merged = merged_softmax(net_output, target, group, self.ignore_label)
        loss = marginal_cross_entropy(merged) + marginal_dice(merged, **self.dice_options)
        return loss + self.exclusion_weight * exclusion_loss(merged)
