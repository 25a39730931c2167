"""The canvas of the synthetic CTs: signed distances in a patient's deformed coordinates, painted with a soft edge.

Axes: +x is the patient's left, +y posterior, +z superior (LPS, as in DICOM); arrays are (z, y, x) as in SimpleITK.
"""

import functools

import numpy as np

AIR = -1000.0
# Hounsfield units (mean, deviation between patients) in three contrast phases: without, arterial, portal venous
CONTRAST = {
    "liver": ((55, 9), (72, 10), (108, 14)),
    "spleen": ((48, 5), (110, 14), (112, 12)),
    "kidney": ((33, 4), (125, 18), (165, 20)),
    "aorta": ((42, 4), (260, 40), (150, 18)),
    "vein": ((40, 4), (75, 15), (140, 18)),
    "bowel": ((30, 8), (45, 10), (60, 14)),
}
PHASES = (0.3, 0.2, 0.5)


class Torso:
    """A patient under construction: Hounsfield units, labels, and where each voxel lies before the deformation."""

    def __init__(self, shape: tuple[int, int, int], spacing_mm: tuple[float, float, float], rng: np.random.Generator):
        """Starts with air.

        Args:
            shape: (z, y, x) voxels; the volume is centered on the upper abdomen.
            spacing_mm: (z, y, x).
            rng: Source of the patient's anatomy.
        """
        self.rng, self.spacing_mm = rng, spacing_mm
        self.hu = np.full(shape, AIR, np.float32)
        self.labels = np.zeros(shape, np.uint8)
        axes = [((np.arange(n) - (n - 1) / 2) * s).astype(np.float32) for n, s in zip(shape, spacing_mm, strict=True)]
        self.z, self.y, self.x = np.meshgrid(*axes, indexing="ij")
        phase = rng.choice(len(PHASES), p=PHASES)
        self.tissue = {name: float(rng.normal(*values[phase])) for name, values in CONTRAST.items()}
        self.texture = self.smooth(1, 14)

    def deform(self, deviation_mm: float, length_mm: float) -> None:
        """Bends the patient's coordinates: everything drawn from here on follows."""
        self.z, self.y, self.x = (a + self.smooth(deviation_mm, length_mm) for a in (self.z, self.y, self.x))

    def smooth(self, deviation: float, length_mm: float) -> np.ndarray:
        """Draws a smooth random field of the volume's shape: Gaussian bumps on a grid of `length_mm` / 2."""
        nodes = [int(n * s / length_mm * 2) + 4 for n, s in zip(self.hu.shape, self.spacing_mm, strict=True)]
        field = self.rng.standard_normal(nodes, dtype=np.float32)
        for size, spacing, count in zip(self.hu.shape, self.spacing_mm, nodes, strict=True):
            position = np.arange(size)[:, None] * spacing / length_mm * 2 + 1.5 - np.arange(count)
            weight = np.exp(-0.5 * position**2).astype(np.float32)
            # the axis just done goes last; einsum without BLAS: the same bits on any number of threads
            field = np.einsum("ij,jkl->kli", weight, field)
        return field * np.float32(deviation / field.std())

    def paint(self, distance, hu, label: int = 0, box=(), only: int | None = None) -> None:
        """Draws what lies inside `distance` < 0 over what was drawn before.

        Args:
            distance: Signed distance to the surface in millimeters, of the box's shape; the edge is one voxel soft.
            hu: Hounsfield units inside, a number or an array of the box's shape.
            label: What these voxels become; 0 takes labels away.
            box: The part of the volume that is touched; all of it by default.
            only: Draw on this label alone.
        """
        if only is not None:
            distance = np.where(self.labels[box] == only, distance, 99.0)
        weight = np.clip(0.5 - distance / min(self.spacing_mm), 0, 1)
        self.hu[box] += weight * (hu - self.hu[box])
        self.labels[box][distance < 0] = label

    def box(self, center, reach_mm: float) -> tuple[slice, ...]:
        """Finds the voxels within `reach_mm` of a point, with a margin for the deformation."""
        return tuple(
            slice(max(0, int((c - reach_mm - 25) / s + n / 2)), max(0, int((c + reach_mm + 25) / s + n / 2) + 1))
            for c, s, n in zip(center[::-1], self.spacing_mm, self.hu.shape, strict=True)
        )

    def ellipsoid(self, center, radii, tilt_deg=(0.0, 0.0), box=()) -> np.ndarray:
        """Computes the signed distance in millimeters (first order) to an ellipsoid.

        Args:
            center: (x, y, z) in millimeters.
            radii: Half axes (x, y, z) in millimeters.
            tilt_deg: Rotation in the axial plane (x towards y), then in the coronal plane (x towards z).
            box: Where to compute it.
        """
        x, y, z = (a[box] - np.float32(c) for a, c in zip((self.x, self.y, self.z), center, strict=True))
        x, y = turn(x, y, tilt_deg[0])
        x, z = turn(x, z, tilt_deg[1])
        u, v, w = (a / np.float32(r) for a, r in zip((x, y, z), radii, strict=True))
        near = np.sqrt(u * u + v * v + w * w)
        slope = np.sqrt(
            (u / np.float32(radii[0])) ** 2 + (v / np.float32(radii[1])) ** 2 + (w / np.float32(radii[2])) ** 2
        )
        return near * (near - 1) / np.maximum(slope, np.float32(1e-6))

    def blob(self, center, radii, hu, label=0, tilt_deg=(0.0, 0.0), inside=None, only: int | None = None) -> None:
        """Paints an ellipsoid, cut off at the surface `inside`, a signed distance of the whole volume."""
        box = self.box(center, max(radii))
        distance = self.ellipsoid(center, radii, tilt_deg, box)
        if inside is not None:
            distance = np.maximum(distance, inside[box])
        self.paint(distance, hu[box] if isinstance(hu, np.ndarray) else hu, label, box, only)

    def tube(self, x, y, radius_mm) -> np.ndarray:
        """Computes the signed distance to a tube along z with this center, which may depend on z, in the plane."""
        return np.hypot(self.x - x, self.y - y) - radius_mm

    def vary(self, values, deviation: float) -> list[float]:
        """Gives each value a relative deviation of its own."""
        return [float(v * np.exp(self.rng.normal(0, deviation))) for v in values]

    def move(self, center, deviation_mm: float) -> list[float]:
        """Moves a point at random."""
        return [float(c + self.rng.normal(0, deviation_mm)) for c in center]


def turn(a: np.ndarray, b: np.ndarray, degrees: float) -> tuple[np.ndarray, np.ndarray]:
    """Rotates the plane (a, b)."""
    c, s = np.float32(np.cos(np.deg2rad(degrees))), np.float32(np.sin(np.deg2rad(degrees)))
    return c * a + s * b, c * b - s * a


def all_of(*distances):
    """Intersects volumes given by their signed distances."""
    return functools.reduce(np.maximum, distances)
