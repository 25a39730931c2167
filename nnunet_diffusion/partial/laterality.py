"""Left and right: which array axes must not be mirrored, because labels differ by side only."""

from collections.abc import Iterable

import numpy as np

from nnunet_diffusion.sides import LEFT, RIGHT, sides_of


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


def left_right_axis(properties: dict) -> int:
    """Returns the axis of nnU-Net's image array (before the plan's transpose) that runs closest to left-right.

    Args:
        properties: What nnU-Net's reader says of an image, as kept in the preprocessed `.pkl`.

    Returns:
        0, 1 or 2; arrays are ordered as nnU-Net's readers order them.

    Raises:
        KeyError: If the reader keeps no direction (2-D pictures have none).
    """
    if "sitk_stuff" in properties:
        direction = np.array(properties["sitk_stuff"]["direction"])
        size = int(round(len(direction) ** 0.5))
        first_world_axis = direction.reshape(size, size)[0]  # rows are world axes, columns are image axes x, y, z
        return 2 - int(np.abs(first_world_axis).argmax())  # arrays are (z, y, x)
    stuff = properties["nibabel_stuff"]
    affine = np.array(stuff.get("reoriented_affine", stuff.get("original_affine")))
    directions = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    return 2 - int(np.abs(directions[0]).argmax())


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
        try:
            axis = list(transpose_forward).index(left_right_axis(properties)) - (3 - dimensions)
        except KeyError:
            continue
        if axis >= 0:
            axes.add(axis)
    return axes
