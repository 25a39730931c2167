"""Losses for region-based data sets of which each case was annotated for some regions only."""

import torch
from nnunetv2.training.loss.compound_losses import DC_and_BCE_loss
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from nnunet_diffusion.partial.losses import PartialLoss
from nnunet_diffusion.partial.soft_dice import SMOOTH, soft_dice


class PartialRegionLoss(PartialLoss):
    """nnU-Net's `DC_and_BCE_loss` over the (case, region) pairs that were annotated: regions are independent sigmoids.

    Args:
        batch_dice: As in the plan's configuration.
        ddp: Whether several processes train; only batch Dice talks to the others.
        use_ignore_label: Whether the last channel of the target is the ignore label.
    """

    def __init__(self, batch_dice: bool = False, ddp: bool = False, use_ignore_label=False):
        super().__init__()
        self.dice_options = {"batch_dice": batch_dice, "smooth": SMOOTH, "ddp": ddp}
        self.use_ignore_label = use_ignore_label
        self.complete = DC_and_BCE_loss(
            {}, {**self.dice_options, "do_bg": True}, 1, 1, use_ignore_label, MemoryEfficientSoftDiceLoss
        )
        self.may_be_complete = not (ddp and batch_dice)  # as in PartialLabelLoss

    def check(self, annotation: Tensor) -> None:
        """Refuses what is not a mask."""
        if annotation.dtype != torch.bool or annotation.ndim != 2:
            raise ValueError(f"the mask must be (B, R) bool, not {tuple(annotation.shape)} {annotation.dtype}")

    def forward(self, net_output: Tensor, target: Tensor) -> Tensor:
        """Maps, as nnU-Net's, (B, R, X, Y[, Z]) logits and (B, R [+ 1], X, Y[, Z]) bool regions to a scalar."""
        is_annotated = self.known()
        if self.may_be_complete and is_annotated.all():
            return self.complete(net_output, target)
        pairs = tuple(index.to(net_output.device) for index in is_annotated.nonzero(as_tuple=True))  # (P,), (P,)
        logits = net_output.flatten(2)[pairs]  # (P, V)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        labels = target.flatten(2)[pairs].to(logits.dtype)
        weight = torch.ones_like(labels)
        if self.use_ignore_label:
            weight = (~target[:, -1].bool()).flatten(1)[pairs[0]].to(logits.dtype)
        entropy = binary_cross_entropy_with_logits(logits, labels, weight, reduction="sum") / weight.sum().clamp_min(1)
        if self.use_ignore_label:
            entropy = entropy * net_output.shape[1]  # nnU-Net then sums over regions where else it takes the mean
        p = logits.sigmoid() * weight
        sums = ((p * labels).sum(1), p.sum(1), (labels * weight).sum(1))
        empty = logits.new_zeros(net_output.shape[:2])
        dice = soft_dice(
            *(empty.index_put(pairs, x) for x in sums), is_annotated.to(net_output.device), **self.dice_options
        )
        return entropy - dice
