"""The rules that decide what a segmentation scores: those of FLARE22, and nnU-Net's own."""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from nnunet_diffusion.evaluation.surface import hausdorff_distance, surface_dice, surface_distances
from nnunet_diffusion.sides import sided, sides_of


class Rules(NamedTuple):
    """The rules in which two evaluations differ."""

    name: str
    description: str
    absent: float  # DSC and NSD of an organ that neither reference nor prediction has
    least_dice: float  # below it NSD is 0
    digits: int | None  # that DSC and NSD are rounded to


class Target(NamedTuple):
    """What is compared in a case: an organ, a region, or the union of some."""

    name: str
    labels: tuple[int, ...]  # the values in label maps that are it
    tolerance_mm: float
    is_cut: bool = False  # only the reference's slices are compared


class Score(NamedTuple):
    """How well one target was segmented in one case; NaN where that is not defined."""

    dsc: float
    nsd: float
    hd95_mm: float


# As the organizers' scripts do (JunMa11/FLARE); the limit of 0.2 is FLARE24's, whose other rules are the same.
FLARE22 = Rules(
    "flare22",
    "an organ in neither reference nor prediction scores 1, in only one of them 0; aorta, inferior vena cava and "
    "esophagus are compared in the reference's slices without the last; NSD is 0 where DSC is below 0.2; DSC and NSD "
    "are rounded to 4 digits",
    absent=1.0,
    least_dice=0.2,
    digits=4,
)
NNUNET = Rules(
    "nnunet",
    "an organ in neither reference nor prediction is not counted, in only one of them it scores 0",
    absent=np.nan,
    least_dice=0.0,
    digits=None,
)
RULES = {rules.name: rules for rules in (FLARE22, NNUNET)}
NNUNET_TOLERANCE_MM = 2.0  # nnU-Net has no NSD: the smallest of FLARE22's

FLARE22_TOLERANCES_MM = {
    "liver": 5.0,
    "right kidney": 3.0,
    "spleen": 3.0,
    "pancreas": 5.0,
    "aorta": 2.0,
    "inferior vena cava": 2.0,
    "right adrenal gland": 2.0,
    "left adrenal gland": 2.0,
    "gallbladder": 2.0,
    "esophagus": 3.0,
    "stomach": 5.0,
    "duodenum": 7.0,
    "left kidney": 3.0,
}
FLARE22_CUT = ("aorta", "inferior vena cava", "esophagus")
# Names of these organs in other public data sets, without their side; the order of the words is free.
ALIASES = {
    "inferior vena cava": ("ivc", "postcava"),
    "adrenal gland": ("adrenal",),
    "gallbladder": ("gall bladder",),
    "esophagus": ("oesophagus",),
}


def flare22_organs(names: Iterable[str]) -> dict[str, str | None]:
    """Finds FLARE22's names for organs, however a data set writes them: `RightKidney`, `kidney_right`, `RK`.

    Args:
        names: All labels of the data set.

    Returns:
        {name: FLARE22's name, or None}.
    """
    known = {}
    for organ in FLARE22_TOLERANCES_MM:
        side, plain = sided(organ)
        known |= {(side, *sorted(alias.split())): organ for alias in (plain, *ALIASES.get(plain, ()))}
    return {name: known.get((side, *sorted(plain.split()))) for name, (side, plain) in sides_of(names).items()}


def score(
    reference: np.ndarray, prediction: np.ndarray, spacing_mm: tuple[float, ...], target: Target, rules: Rules
) -> Score:
    """Compares two masks by the rules.

    Args:
        reference: (Z, Y, X) bool.
        prediction: (Z, Y, X) bool.
        spacing_mm: Of the voxels along Z, Y, X.
        target: What the masks show.
        rules: FLARE22 or NNUNET.
    """
    if not reference.any():
        return Score(0.0, 0.0, np.nan) if prediction.any() else Score(rules.absent, rules.absent, np.nan)
    if target.is_cut:
        reference, prediction = in_reference_slices(reference, prediction)
    if not prediction.any():
        return Score(0.0, 0.0, np.nan)
    dsc = 2 * np.count_nonzero(reference & prediction) / (np.count_nonzero(reference) + np.count_nonzero(prediction))
    distances = surface_distances(reference, prediction, spacing_mm)
    nsd = surface_dice(distances, target.tolerance_mm) if dsc >= rules.least_dice else 0.0
    if rules.digits is not None:
        dsc, nsd = round(dsc, rules.digits), round(nsd, rules.digits)
    return Score(dsc, nsd, hausdorff_distance(distances))


def in_reference_slices(reference: np.ndarray, prediction: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cuts both masks to the reference's slices, from its first to its last, without the last, as FLARE's scripts do.

    An organ in a single slice, where those scripts fail, is compared in that slice.
    """
    slices = np.flatnonzero(reference.any((1, 2)))
    kept = slice(slices[0], max(slices[-1], slices[0] + 1))
    return reference[kept], prediction[kept]
