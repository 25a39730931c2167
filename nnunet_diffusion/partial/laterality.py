"""Left and right: which array axes must not be mirrored, because labels differ by side only."""

from collections.abc import Iterable

import numpy as np

from nnunet_diffusion.sides import LEFT, RIGHT, sides_of
from nnunet_diffusion.views import axis_directions


def lateral_pairs(names: Iterable[str]) -> list[tuple[str, str]]:
    """Finds labels that differ in their side only: `left kidney` and `right kidney`, `LeftParotid`, `lung_l`, RK.

    Args:
        names: All labels of a data set, in any notation.

    Returns:
        (left, right) names.
    """
    pairs: dict[str, dict[str, str]] = {}
    for name, (side, organ) in sides_of(names).items():
        if side:
            pairs.setdefault(organ, {})[side] = name
    return [(pair[LEFT], pair[RIGHT]) for pair in pairs.values() if len(pair) == 2]


def left_right_axis(properties: dict) -> int | None:
    """Returns the axis of nnU-Net's image array (before the plan's transpose) that runs closest to left-right.

    Args:
        properties: What nnU-Net's reader says of an image, as kept in the preprocessed `.pkl`.

    Returns:
        0, 1 or 2, arrays are ordered (z, y, x) by nnU-Net's readers; None if the reader keeps no direction (of 2-D
        pictures there is none).
    """
    directions = axis_directions(properties)
    return None if directions is None else 2 - int(np.abs(directions[0]).argmax())


def axes_not_to_mirror(all_properties: Iterable[dict], transpose_forward: list[int], dimensions: int) -> set[int]:
    """Returns the spatial axes of a patch that run left-right in at least one image.

    Args:
        all_properties: Those of every image that is trained on.
        transpose_forward: The plan's.
        dimensions: 2 or 3; a 2-D patch lies in the last two axes of the transposed image.

    Returns:
        Axes of the patch, counted as nnU-Net counts mirror axes; empty for images without a direction.
    """
    axes = set()
    for properties in all_properties:
        left_right = left_right_axis(properties)
        if left_right is not None:
            axes.add(list(transpose_forward).index(left_right) - (3 - dimensions))
    return {axis for axis in axes if axis >= 0}
