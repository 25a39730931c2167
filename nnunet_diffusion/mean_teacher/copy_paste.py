"""Copy-paste between labeled patches and patches of the pool, each at its own place.

Bidirectional copy-paste (Bai et al. 2023, arXiv 2305.00673): labeled boxes come into patches of the pool and boxes of
the pool into labeled patches, so that what is learned of one must hold beside the other.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

SHORTEST, LONGEST = 1 / 3, 2 / 3  # of a box, relative to the patch


def random_boxes(shape: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
    """Returns a box in each patch: a third to two thirds of each side long, anywhere.

    Args:
        shape: (B, ..., X, Y[, Z]) of the images; what stands between B and the last two or three is left out.
        device: Of the result.

    Returns:
        (B, 1, X, Y[, Z]) bool.
    """
    batch, _, *size = shape
    boxes = torch.ones((batch, 1, *size), dtype=torch.bool, device=device)
    for axis, length in enumerate(size):
        sides = ((SHORTEST + (LONGEST - SHORTEST) * torch.rand(batch)) * length).round().clamp(min=1)
        starts = (torch.rand(batch) * (length - sides + 1)).floor()
        index = torch.arange(length)
        is_inside = (index >= starts[:, None]) & (index < (starts + sides)[:, None])
        boxes &= is_inside.reshape(batch, 1, *(length if i == axis else 1 for i in range(len(size)))).to(device)
    return boxes


def random_labeled_parts(shape: Sequence[int], paste: str, device: torch.device | str = "cpu") -> Tensor:
    """Returns where a mixed patch is taken from the labeled one.

    Args:
        shape: (B, C, X, Y[, Z]) of the images.
        paste: "both" (a labeled box in a patch of the pool or, as often, the other way round), "into_pool", or "none".
        device: Of the result.

    Returns:
        (B, 1, X, Y[, Z]) bool.

    Raises:
        ValueError: If `paste` is something else.
    """
    boxes = random_boxes(shape, device)
    if paste == "none":
        return torch.zeros_like(boxes)
    if paste == "into_pool":
        return boxes
    if paste == "both":
        is_box_of_pool = torch.rand((len(boxes), *[1] * (boxes.ndim - 1))) < 0.5
        return boxes ^ is_box_of_pool.to(device)
    raise ValueError(f"paste is {paste!r}: it must be both, into_pool or none")
