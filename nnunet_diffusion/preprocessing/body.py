"""Where the body is in a scan: found when the scan is preprocessed, and kept with its properties."""

from contextlib import suppress

import numpy as np
from skimage.filters import threshold_triangle

from nnunet_diffusion.preprocessing.case_files import load_properties

KEY = "body_locations"  # among the properties of a preprocessed case, beside nnU-Net's class_locations


def in_body(image: np.ndarray) -> np.ndarray:
    """Returns what is brighter than air and padding, by the triangle threshold (Zack et al. 1977).

    Most voxels of a scan are as dark as air, which a histogram shows as one peak at its end. Otsu's threshold divides
    two equal classes, and finds the bones in a scan that the plan clips between fat and bone.

    Args:
        image: Of any shape.

    Returns:
        Booleans of its shape; none is true in a constant image.
    """
    return image > threshold_triangle(image) if image.min() < image.max() else np.zeros(image.shape, bool)


def body_locations(image: np.ndarray, most: int = 500) -> np.ndarray:
    """Returns some voxels of what `in_body` finds; always the same.

    Args:
        image: (1, X, Y, Z).
        most: How many.

    Returns:
        (N, 4) indices, as nnU-Net keeps the locations of classes; none if the image is constant.
    """
    where = np.flatnonzero(in_body(image))
    chosen = np.random.RandomState(1234).permutation(len(where))[:most]
    return np.stack(np.unravel_index(where[chosen], image.shape), 1)


def stored_body(case: str) -> np.ndarray | None:
    """Returns the `body_locations` of a preprocessed case that were kept; None if they were not.

    Args:
        case: Path of its files without their endings.

    Raises:
        UserError: If the properties are damaged, or hold more than plain values and arrays.
    """
    with suppress(FileNotFoundError):
        return load_properties(f"{case}.pkl").get(KEY)
    return None
