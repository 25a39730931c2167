"""Soft Dice of (case, class) pairs, of which only some count."""

import torch
from nnunetv2.utilities.ddp_allgather import AllGatherGrad
from torch import Tensor

SMOOTH = 1e-5  # as nnU-Net's trainer sets it


def soft_dice(
    inside: Tensor, mass: Tensor, voxels: Tensor, is_counted: Tensor, batch_dice: bool, smooth: float, ddp: bool
) -> Tensor:
    """Computes the mean Dice over the pairs that count, by the formula of nnU-Net's `MemoryEfficientSoftDiceLoss`.

    Args:
        inside: (B, C) sum of the probability of a class over the voxels that have it.
        mass: (B, C) sum of its probability over all voxels.
        voxels: (B, C) how many have it.
        is_counted: (B, C) bool. The other pairs' values are never read.
        batch_dice: First sum each class over the cases where it counts; a class that counts in none is left out.
        smooth: Added to nominator and denominator.
        ddp: Let a batch be that of all processes.

    Returns:
        Scalar in [0, 1]; 0, with a gradient of 0, if no pair counts.
    """
    sums = torch.stack([inside, mass, voxels, torch.ones_like(mass)])  # (4, B, C)
    sums = torch.where(is_counted, sums, 0)
    if batch_dice:
        sums = sums.sum(1)  # before it is gathered, as processes may differ in the number of cases
        if ddp:
            sums = AllGatherGrad.apply(sums).sum(0)
    inside, mass, voxels, counts = sums
    dice = (2 * inside + smooth) / (voxels + mass + smooth).clamp_min(1e-8)
    return torch.where(counts > 0, dice, 0).sum() / (counts > 0).sum().clamp_min(1)
