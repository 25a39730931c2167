"""Distances between the surfaces of two masks, each element of surface weighted by its area.

The measures of Nikolov et al. 2018 (arXiv 1809.04430), equal to the implementation that they published (the package
surface-distance 0.1), which FLARE and the Medical Segmentation Decathlon use. That package is not kept up: with NumPy 2
it fails on an empty mask.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from scipy import ndimage
from skimage.measure import marching_cubes

WEIGHTS = 2 ** np.arange(7, -1, -1).reshape(2, 2, 2)  # of the eight voxels around a corner in the corner's code


class SurfaceDistances(NamedTuple):
    """The elements of both surfaces; an empty mask has none, and is infinitely far away from the other's."""

    reference_mm: np.ndarray  # (N,) from each element of the reference's surface to the prediction's
    reference_mm2: np.ndarray  # (N,) its area
    prediction_mm: np.ndarray  # (M,) from each element of the prediction's surface to the reference's
    prediction_mm2: np.ndarray  # (M,) its area


def surface_distances(reference: np.ndarray, prediction: np.ndarray, spacing_mm: Sequence[float]) -> SurfaceDistances:
    """Measures from every element of one surface to the nearest of the other.

    A surface runs between voxels: its elements sit at voxels' corners around which the mask changes. Outside of the
    image there is nothing, so that a mask that touches the border has a surface there.

    Args:
        reference: (X, Y, Z) bool.
        prediction: (X, Y, Z) bool.
        spacing_mm: Of the voxels, in the order of the axes.
    """
    box = ndimage.find_objects((reference | prediction).astype(np.uint8))
    if not box:
        return SurfaceDistances(*[np.zeros(0)] * 4)
    codes = [corner_codes(mask[box[0]]) for mask in (reference, prediction)]
    surfaces = [(code != 0) & (code != 255) for code in codes]
    distances = [_distance_to(surface, spacing_mm) for surface in surfaces]
    areas = [element_areas(spacing_mm)[code] for code in codes]
    (in_reference, in_prediction), (to_reference, to_prediction) = surfaces, distances
    return SurfaceDistances(
        to_prediction[in_reference], areas[0][in_reference], to_reference[in_prediction], areas[1][in_prediction]
    )


def surface_dice(distances: SurfaceDistances, tolerance_mm: float) -> float:
    """Returns the share of both surfaces within a tolerance of the other (NSD); NaN if there is no surface."""
    near = distances.reference_mm2[distances.reference_mm <= tolerance_mm].sum()
    near += distances.prediction_mm2[distances.prediction_mm <= tolerance_mm].sum()
    total = distances.reference_mm2.sum() + distances.prediction_mm2.sum()
    return float(near / total) if total else np.nan


def hausdorff_distance(distances: SurfaceDistances, share: float = 0.95) -> float:
    """Returns the distance in mm within which a share of each surface lies (HD95); infinite if a mask is empty."""
    return max(
        _quantile(distances.reference_mm, distances.reference_mm2, share),
        _quantile(distances.prediction_mm, distances.prediction_mm2, share),
    )


def corner_codes(mask: np.ndarray) -> np.ndarray:
    """Encodes, for (X+1, Y+1, Z+1) corners of voxels, which of the eight voxels around are in the mask: 0 to 255.

    Args:
        mask: (X, Y, Z) bool.
    """
    padded = np.pad(mask.astype(np.uint8), 1)
    return ndimage.correlate(padded, WEIGHTS)[1:, 1:, 1:]


def element_areas(spacing_mm: Sequence[float]) -> np.ndarray:
    """Returns the (256,) area in mm^2 of the element of surface at a corner, by the corner's code."""
    codes, normals = element_normals()
    x, y, z = spacing_mm
    return np.bincount(codes, np.linalg.norm(normals * (y * z, x * z, x * y), axis=1), minlength=256)


@lru_cache(maxsize=1)
def element_normals() -> tuple[np.ndarray, np.ndarray]:
    """Returns the triangles of surface among the eight voxels of each code, in units of voxels.

    They are those of marching cubes (Lorensen and Cline 1987), where a code and its complement have the same surface.

    Returns:
        (T,) code of each triangle, (T, 3) its normal, as long as its area.
    """
    codes, normals = [], []
    for code in range(1, 255):
        fewer = code if code.bit_count() <= 4 else 255 - code
        corners, faces, _, _ = marching_cubes((WEIGHTS & fewer > 0).astype(float), 0.5, method="lorensen")
        corners = np.round(2 * corners.astype(float)) / 2  # they are half-way between voxels
        sides = corners[faces[:, 1:]] - corners[faces[:, :1]]
        normals.append(np.cross(sides[:, 0], sides[:, 1]) / 2)
        codes += [code] * len(faces)
    return np.array(codes), np.concatenate(normals)


def _distance_to(surface: np.ndarray, spacing_mm: Sequence[float]) -> np.ndarray:
    if not surface.any():
        return np.full(surface.shape, np.inf)
    return ndimage.distance_transform_edt(~surface, sampling=spacing_mm)


def _quantile(distances_mm: np.ndarray, areas_mm2: np.ndarray, share: float) -> float:
    if not distances_mm.size:
        return np.inf
    order = np.argsort(distances_mm, kind="stable")
    shares = np.cumsum(areas_mm2[order]) / areas_mm2.sum()
    return float(distances_mm[order][min(np.searchsorted(shares, share), len(order) - 1)])
