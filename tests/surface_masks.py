"""Pairs of masks, and what the published implementation of surface distances says of them.

It is google-deepmind/surface-distance, on PyPI as surface-distance 0.1, which needs NumPy 1 for empty masks:

    pip install surface-distance==0.1 "numpy==1.26.4" "scipy==1.12.0"
    python tests/surface_masks.py > tests/surface_published.json
"""

import json

import numpy as np

TOLERANCES_MM = (0.0, 1.0, 2.5)


def blob(rng: np.random.RandomState, shape: tuple[int, int, int], radius: float) -> np.ndarray:
    """A ball at a random place, frayed."""
    grid = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1)
    center = rng.randint(0, shape)
    return (np.square(grid - center).sum(-1) < radius**2) & (rng.rand(*shape) < 0.9)


def pairs() -> dict[str, tuple[np.ndarray, np.ndarray, tuple[float, float, float]]]:
    """Name -> reference, prediction, spacing in mm: every degenerate kind, then random ones."""
    empty, full = np.zeros((5, 6, 7), bool), np.ones((5, 6, 7), bool)
    voxel, other, corner, line = (empty.copy() for _ in range(4))
    voxel[2, 3, 3], other[3, 3, 5], corner[0, 0, 0], line[2, :, 3] = True, True, True, True
    isotropic, anisotropic = (1.0, 1.0, 1.0), (3.0, 0.7, 1.1)
    found = {
        "empty, empty": (empty, empty, isotropic),
        "empty, full": (empty, full, isotropic),
        "full, empty": (full, empty, anisotropic),
        "full, full": (full, full, anisotropic),
        "voxel, empty": (voxel, empty, anisotropic),
        "voxel, itself": (voxel, voxel, isotropic),
        "voxel, other voxel": (voxel, other, anisotropic),
        "voxel in the corner, voxel": (corner, voxel, isotropic),
        "voxel, full": (voxel, full, anisotropic),
        "line from border to border, voxel": (line, voxel, anisotropic),
        "single slice": (full[:1], voxel[2:3], anisotropic),
        "single voxel image": (full[:1, :1, :1], full[:1, :1, :1], isotropic),
    }
    rng = np.random.RandomState(0)
    for number in range(8):
        shape = tuple(rng.randint(6, 14, 3))
        spacing = tuple(np.round(rng.uniform(0.5, 4, 3), 2).tolist())
        found[f"random {number}"] = (blob(rng, shape, 4), blob(rng, shape, 5), spacing)
    return found


def published_values() -> dict[str, dict]:
    """Name -> {"nsd": one for each tolerance, "hd95_mm"}; null for NaN, and for infinity in hd95_mm."""
    from surface_distance import metrics

    values = {}
    for name, (reference, prediction, spacing_mm) in pairs().items():
        distances = metrics.compute_surface_distances(reference, prediction, spacing_mm)
        nsd = [float(metrics.compute_surface_dice_at_tolerance(distances, mm)) for mm in TOLERANCES_MM]
        hd95_mm = float(metrics.compute_robust_hausdorff(distances, 95))
        values[name] = {
            "nsd": [value if np.isfinite(value) else None for value in nsd],
            "hd95_mm": hd95_mm if np.isfinite(hd95_mm) else None,
        }
    return values


if __name__ == "__main__":
    print(json.dumps(published_values(), indent=1))
