"""Back from nnU-Net's normalization to intensities as they are stored, where the plan alone tells how."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

SMALLEST_DEVIATION = 1e-8  # nnU-Net's, in CTNormalization


class IntensityScale(NamedTuple):
    """intensity = normalized * factor + offset, in `unit`."""

    factor: float
    offset: float
    unit: str


def intensity_scale(scheme: str, properties: Mapping[str, float]) -> IntensityScale:
    """Says how one channel goes back.

    Normalizations that take their numbers from each scan (z-score, 0 to 1 by the scan's own range) cannot be inverted
    for an image that is no scan's: it stays normalized, and the unit says so.

    Args:
        scheme: Name of nnU-Net's normalization class, from the plan.
        properties: The channel's entry of the plan's `foreground_intensity_properties_per_channel`.
    """
    if scheme == "CTNormalization":
        return IntensityScale(max(properties["std"], SMALLEST_DEVIATION), properties["mean"], "HU")
    if scheme == "RGBTo01Normalization":
        return IntensityScale(255.0, 0.0, "8-bit intensity")
    if scheme == "NoNormalization":
        return IntensityScale(1.0, 0.0, "stored intensity")
    kept = "standard deviations of a scan" if scheme == "ZScoreNormalization" else "normalized units"
    return IntensityScale(1.0, 0.0, f"{kept} ({scheme} takes its numbers from each scan and cannot be inverted)")


def plan_scales(plan: Mapping) -> list[IntensityScale]:
    """Returns the scale of each channel of a plan's identity (`denoiser_file.plan_identity`)."""
    schemes, intensities = plan["normalization_schemes"], plan["intensities"]
    return [intensity_scale(scheme, intensities.get(str(i), {})) for i, scheme in enumerate(schemes)]


def to_intensities(image: np.ndarray, scales: Sequence[IntensityScale]) -> np.ndarray:
    """Maps (C, X, Y[, Z]) in the plan's normalization to intensities, float32."""
    factor, offset = _columns(image, scales)
    return (image * factor + offset).astype(np.float32)


def to_normalized(image: np.ndarray, scales: Sequence[IntensityScale]) -> np.ndarray:
    """Inverts `to_intensities`."""
    factor, offset = _columns(image, scales)
    return ((image - offset) / factor).astype(np.float32)


def _columns(image: np.ndarray, scales: Sequence[IntensityScale]) -> tuple[np.ndarray, np.ndarray]:
    shape = (-1, *[1] * (image.ndim - 1))
    return np.reshape([s.factor for s in scales], shape), np.reshape([s.offset for s in scales], shape)
