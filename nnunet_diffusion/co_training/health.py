"""Whether masks that were learned without labels mean anything: measured on held-out images, and drawn."""

from collections.abc import Sequence

import torch
from torch import Tensor

from nnunet_diffusion.co_training.mask_diffusion import Draw, MaskDiffusion, draw_mask, one_class
from nnunet_diffusion.pretraining.diffusion import Diffusion

MASK_SEED = 10**6  # the noise of held-out masks is not that of their images, whose seeds count from 0


def held_out_figures(
    pair: MaskDiffusion, images: Tensor, classes: int, draw: Draw, number: int, diffusion: Diffusion
) -> dict[str, Tensor]:
    """Measures masks on a held-out batch, always with the same noise.

    Args:
        pair: The averaged pathways.
        images: (B, C, X, Y[, Z]).
        classes: Background included.
        draw: Timesteps, and the noise of the images.
        number: Of the batch.
        diffusion: The process.

    Returns:
        `loss`, the error of restoring the images with their masks, of one class a voxel; `blank_loss`, that with masks
        that say nothing, the better of the mean share of every class and of the commonest class everywhere; and
        `shares`, of the voxels that each class has.
    """
    masks = draw_mask(images, classes, draw.timestep, torch.Generator().manual_seed(MASK_SEED + number))
    logits, loss = pair(images, masks, draw, diffusion)
    mask = one_class(logits.float())  # what becomes labels
    shares = mask.mean((0, *range(2, mask.ndim)))
    commonest = torch.nn.functional.one_hot(shares.argmax(), classes).to(shares)
    blank = [share.reshape(1, -1, *[1] * (mask.ndim - 2)).expand_as(mask) for share in (shares, commonest)]
    blank_loss = torch.stack([pair.restore(images, each, draw, diffusion)[1] for each in blank]).min()
    return {"loss": loss, "blank_loss": blank_loss, "shares": shares}


@torch.no_grad()
def gray_masks(
    pair: MaskDiffusion, images: Tensor, classes: int, diffusion: Diffusion, low: float, high: float
) -> Tensor:
    """Draws the masks of images at the first timestep, always with the same noise.

    Returns:
        (B, 1, X, Y[, Z]) gray levels, from `low` of the first class to `high` of the last.
    """
    timestep = torch.zeros(len(images), dtype=torch.int64, device=images.device)
    draw = draw_mask(images, classes, timestep, torch.Generator().manual_seed(1234))
    labels = pair.segment(images, draw, diffusion).argmax(1, keepdim=True)
    return low + (high - low) * labels / (classes - 1)


def mask_health(loss: float, blank_loss: float, shares: Sequence[float], least: float = 0.01) -> str:
    """Says in words whether masks that were learned without labels may mean anything.

    Masks of diffusion models have been seen to be noise where there were no labels, so nobody should have to guess.

    Args:
        loss: Mean squared error of restoring held-out images with their masks.
        blank_loss: The same with masks that say nothing: the mean share of every class, everywhere.
        shares: Of the voxels that each class has, argmax.
        least: A class with a smaller share counts as not used.

    Returns:
        One line; it begins with WARNING if they mean nothing.
    """
    used = sum(share >= least for share in shares)
    figures = (
        f"{used} of {len(shares)} classes used, the largest for {max(shares):.0%} of the voxels; held-out error "
        f"{loss:.4f} with the masks, {blank_loss:.4f} with blank ones"
    )
    if used < 2:
        return f"WARNING: the masks are all of one class, they say nothing about the images: {figures}"
    if not loss < blank_loss:
        return f"WARNING: the masks do not help to restore the images, they may be noise: {figures}"
    return f"The masks help to restore the images (which class is what, only labels can tell): {figures}"
