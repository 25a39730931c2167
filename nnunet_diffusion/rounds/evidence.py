"""What speaks for a prediction and against it, measured in the network's space without a reference."""

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np

from nnunet_diffusion.partial.annotations import Channels


class Evidence(NamedTuple):
    """Of one organ in one case, or of all its foreground together; None where there is nothing to measure."""

    volume_ml: float
    position: tuple[float, float, float] | None  # center of mass, as a share of the image's extent along each axis
    confidence: float | None  # mean probability of the organ's voxels
    agreement: float | None  # mean Dice of the single models of an ensemble
    disagreement: float | None  # u, with the round before


def disagreement(before: np.ndarray, now: np.ndarray) -> float:
    """Computes the cross-round disagreement u of a label map or mask: changed voxels over foreground voxels.

    The winner of FLARE22 (team blackbean) filters by its mean over two pairs of rounds. Ours: an empty foreground
    counts as one voxel, so u is 0 where both rounds are empty, and the number of voxels that vanished where nothing is
    left.

    Args:
        before: Label map or mask of the round before; labels above 0 are foreground.
        now: Of this round, the same shape.

    Returns:
        u, from 0 (the same) without an upper bound (2 if two structures of the same size do not touch).
    """
    before, now = np.maximum(before, 0), np.maximum(now, 0)
    return float(np.count_nonzero(before != now) / max(np.count_nonzero(now), 1))


def pairwise_dice(masks: Sequence[np.ndarray]) -> float | None:
    """Computes the mean Dice over all pairs of masks; 1 for a pair of empty ones; None if there are fewer than two."""
    sizes = [np.count_nonzero(mask) for mask in masks]
    dice = []
    for i, j in combinations(range(len(masks)), 2):
        shared, total = np.count_nonzero(masks[i] & masks[j]), sizes[i] + sizes[j]
        dice.append(2 * shared / total if total else 1.0)
    return float(np.mean(dice)) if dice else None


def center(mask: np.ndarray) -> tuple[float, float, float] | None:
    """Finds the center of mass as a share of the image's extent, from 0 to 1 along each axis; None of an empty mask."""
    size = np.count_nonzero(mask)
    if not size:
        return None
    shares = []
    for axis, extent in enumerate(mask.shape):
        profile = mask.sum(tuple(other for other in range(mask.ndim) if other != axis))
        shares.append(float(((np.arange(extent) + 0.5) * profile).sum() / size / extent))
    return tuple(shares)


def measure(
    labels: np.ndarray,
    channels: Channels,
    spacing_mm: Sequence[float],
    confidence: np.ndarray | None = None,
    members: Sequence[np.ndarray] = (),
    before: np.ndarray | None = None,
) -> dict[str, Evidence]:
    """Measures everything that the filter goes by.

    Args:
        labels: (X, Y, Z) label values; negative ones are outside the body.
        channels: The `output_channels`.
        spacing_mm: Of the voxels, three values.
        confidence: (X, Y, Z) probability of `labels`; without it there is no such evidence.
        members: (X, Y, Z) label values of each model of an ensemble.
        before: (X, Y, Z) label values of the round before.

    Returns:
        {organ or region: evidence}.
    """
    voxel_ml = float(np.prod(spacing_mm)) / 1000
    found = {}
    for name, values in channels.items():
        if values == {0}:
            continue
        mask = _mask(labels, values)
        size = int(np.count_nonzero(mask))
        found[name] = Evidence(
            volume_ml=size * voxel_ml,
            position=center(mask),
            confidence=float(confidence[mask].mean(dtype=np.float64)) if size and confidence is not None else None,
            agreement=pairwise_dice([_mask(member, values) for member in members]),
            disagreement=None if before is None else disagreement(_mask(before, values), mask),
        )
    return found


def _mask(labels: np.ndarray, values: frozenset[int]) -> np.ndarray:
    return labels == next(iter(values)) if len(values) == 1 else np.isin(labels, list(values))


class OrganPrior(NamedTuple):
    """Volumes and positions of one organ in the annotated cases."""

    annotated: int  # cases that annotate it
    volumes_ml: tuple[float, ...]  # of the cases that have it
    positions: tuple[tuple[float, float, float], ...]


def organ_priors(cases: Sequence[Mapping[str, Evidence]]) -> dict[str, OrganPrior]:
    """Collects the volumes and positions of organs in annotated cases.

    Args:
        cases: The evidence of the label map of each case, only of the organs that it annotates.

    Returns:
        {organ: prior} of the organs that any case annotates.
    """
    names = dict.fromkeys(name for case in cases for name in case)
    found = {name: [case[name] for case in cases if name in case] for name in names}
    return {
        name: OrganPrior(
            len(entries),
            tuple(entry.volume_ml for entry in entries if entry.volume_ml > 0),
            tuple(entry.position for entry in entries if entry.position is not None),
        )
        for name, entries in found.items()
    }
