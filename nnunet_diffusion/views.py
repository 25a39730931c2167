"""The geometric views of a training: how far patches are rotated, and which axes are mirrored, there and at test time.

nnU-Net shows every patch upside down as often as not. Scans of patients that all lie the same way never look like that,
and a short training with few labels has better things to learn (docs/views.md).
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from nnunetv2.training.data_augmentation.compute_initial_patch_size import get_patch_size

MILD_DEGREES = 15.0  # about as far as patients lie askew; nnU-Net's own choice for oblong 2-D patches
MOST_DEGREES_WITH_SIDES = 45.0  # below 90 no rotation, times any mirrored axis, puts the left where the right was
MIRRORING = ("auto", "all", "none")
Orientation = tuple[tuple[int, bool], ...]


class Views(NamedTuple):
    """How patches of a training may differ from the scan.

    Attributes:
        degrees: Largest angle of rotation, either way.
        mirror_axes: Spatial axes of the patch that are mirrored, as nnU-Net counts them.
    """

    degrees: float
    mirror_axes: tuple[int, ...]


def orientation(properties: dict) -> Orientation | None:
    """Returns which way the axes of an image point in the world, to the nearest axis.

    Args:
        properties: What nnU-Net's reader says of an image, as kept in the preprocessed `.pkl`.

    Returns:
        (world axis, whether against it) of each image axis; None if the reader keeps no direction of a 3-D image.
    """
    directions = axis_directions(properties)
    if directions is None:
        return None
    nearest = np.abs(directions).argmax(0)
    return tuple((int(axis), bool(column[axis] < 0)) for axis, column in zip(nearest, directions.T, strict=True))


def axis_directions(properties: dict) -> np.ndarray | None:
    """Returns the directions of an image's axes x, y, z as columns (3, 3), rows are world axes; None if not known."""
    if "sitk_stuff" in properties:
        direction = np.array(properties["sitk_stuff"]["direction"])
        return direction.reshape(3, 3) if direction.size == 9 else None
    if "nibabel_stuff" not in properties:
        return None
    stuff = properties["nibabel_stuff"]
    affine = np.array(stuff.get("reoriented_affine", stuff.get("original_affine")))
    return affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)


def lie_the_same_way(all_properties: Iterable[dict]) -> bool:
    """Tells whether the axes of all images point the same way; False if that is not known of one of them."""
    orientations = {orientation(properties) for properties in all_properties}
    return len(orientations) == 1 and None not in orientations


def choose_views(
    nnunet: Views, mirroring: str, rotation_degrees: float, is_oriented: bool, lateral_axes: Iterable[int]
) -> Views:
    """Chooses the views of a training.

    Args:
        nnunet: What nnU-Net would show.
        mirroring: "all" (nnU-Net's axes), "none", or "auto": none if the scans are oriented, else all.
        rotation_degrees: Largest angle; negative: at most 15 if the scans are oriented, else nnU-Net's.
        is_oriented: Whether all scans are known to lie the same way.
        lateral_axes: Of the patch that run left-right, if labels differ by side only. They are never mirrored, and no
            rotation is so large that with another axis mirrored it would swap the sides.
    """
    if mirroring not in MIRRORING:
        raise ValueError(f"mirroring is {mirroring!r}: it must be one of {MIRRORING}")
    is_mirrored = mirroring == "all" or (mirroring == "auto" and not is_oriented)
    mild = min(MILD_DEGREES, nnunet.degrees) if is_oriented else nnunet.degrees
    degrees = mild if rotation_degrees < 0 else rotation_degrees
    lateral_axes = set(lateral_axes)
    if lateral_axes:
        degrees = min(degrees, MOST_DEGREES_WITH_SIDES)
    return Views(degrees, tuple(axis for axis in nnunet.mirror_axes if is_mirrored and axis not in lateral_axes))


def rotated_patch_size(patch_size: list[int], degrees: float, is_2d: bool) -> np.ndarray:
    """Returns the size of the patch that is read to be rotated, as nnU-Net computes it.

    Args:
        patch_size: (X, Y[, Z]) voxels that come out.
        degrees: Largest angle.
        is_2d: Whether a 3-D patch is rotated about its first axis only (nnU-Net's dummy 2-D augmentation).
    """
    angle = np.deg2rad(degrees)
    size = get_patch_size(patch_size, *[(-angle, angle)] * 3, (0.85, 1.25))  # nnU-Net 2.8.1's range of scales
    if is_2d:
        size[0] = patch_size[0]
    return size
