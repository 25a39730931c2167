"""Few-label regimes: which patients are tested on, and which cases and slices a label budget may see.

Everything here is pure and decided by a seed, so every arm of a comparison gets exactly the same labels.
"""

import random
import re
from collections.abc import Mapping, Sequence

import numpy as np

from nnunet_diffusion.errors import UserError

Grouped = Mapping[str, Sequence[str]]  # patient -> that patient's cases


def group_by_patient(cases: Sequence[str], patient_of: Mapping[str, str] | None = None) -> dict[str, list[str]]:
    """Groups cases by patient, both sorted; without `patient_of` (case -> patient) every case is its own patient.

    Raises:
        UserError: If a case has no patient.
    """
    missing = sorted(set(cases) - set(patient_of or cases))
    if missing:
        raise UserError(f"the table of patients does not name the cases {missing[:5]}: add them")
    grouped: dict[str, list[str]] = {}
    for case in sorted(cases):
        grouped.setdefault(patient_of[case] if patient_of else case, []).append(case)
    return grouped


def hold_out(patients: Grouped, number: int, seed: int) -> list[str]:
    """Draws the cases of `number` patients for the test set.

    Raises:
        UserError: If that leaves nobody to test on or to train on.
    """
    if not 0 < number < len(patients):
        raise UserError(f"cannot hold out {number} of {len(patients)} patients: give 1 to {len(patients) - 1}")
    drawn = random.Random(f"test set {seed}").sample(sorted(patients), number)
    return sorted(case for patient in drawn for case in patients[patient])


def parse_budget(text: str) -> tuple[str, float]:
    """Reads `8` (cases), `10%` (of the training patients) or `4slices` (labeled axial slices).

    Raises:
        UserError: If it is none of these, or not positive, or more than 100 %.
    """
    match = re.fullmatch(r"(\d+)(slices)?|(\d+(?:\.\d+)?)%", text)
    if not match:
        raise UserError(f"budget {text!r} is not understood: write for example 8, 10% or 4slices")
    cases, slices, per_cent = match.groups()
    kind, amount = ("percent", float(per_cent)) if per_cent else ("slices" if slices else "cases", int(cases))
    if amount <= 0 or (kind == "percent" and amount > 100):
        raise UserError(f"budget {text!r} must be positive, and at most 100%")
    return kind, amount


def draw(budget: str, patients: Grouped, seed: int) -> dict[str, int | None]:
    """Draws the labels of a budget from the training patients: case -> number of labeled slices, None for all.

    With one seed, a smaller budget of the same kind is a part of every larger one. Slices come from as many different
    patients as there are.

    Raises:
        UserError: If the budget is more than there is.
    """
    kind, amount = parse_budget(budget)
    order = sorted(patients)
    random.Random(f"training cases {seed}").shuffle(order)
    if kind == "slices":
        each, rest = divmod(int(amount), len(order))
        return {patients[patient][0]: each + (i < rest) for i, patient in enumerate(order) if each + (i < rest)}
    if kind == "percent":
        order = order[: max(1, round(len(order) * amount / 100))]
    cases = [case for patient in order for case in patients[patient]]
    if kind == "cases" and amount > len(cases):
        raise UserError(f"budget {budget!r}: only {len(cases)} training cases are left beside the test set")
    return dict.fromkeys(cases[: int(amount)] if kind == "cases" else cases)


def keep_slices(label: np.ndarray, axis: int, number: int, ignore: int, seed: str) -> tuple[np.ndarray, list[int]]:
    """Keeps the annotation of a few slices and turns everything else into nnU-Net's ignore label.

    The slices are drawn among those that show any organ; a smaller number is a part of every larger one.

    Args:
        label: (X, Y, Z) integer labels.
        axis: The axis along which the slices lie.
        number: How many slices stay annotated.
        ignore: The value of the ignore label.
        seed: Decides the slices; any text.

    Returns:
        The masked label and the sorted indices of the annotated slices.

    Raises:
        UserError: If fewer slices than `number` show an organ.
    """
    candidates = np.flatnonzero(label.any(axis=tuple(i for i in range(label.ndim) if i != axis))).tolist()
    if number > len(candidates):
        raise UserError(f"{number} labeled slices of one case are asked for, only {len(candidates)} show an organ")
    random.Random(seed).shuffle(candidates)
    chosen = sorted(candidates[:number])
    masked = np.full_like(label, ignore)
    index = tuple(chosen if i == axis else slice(None) for i in range(label.ndim))
    masked[index] = label[index]
    return masked, chosen


def keep_labels(
    cases: Sequence[str], labels: Sequence[str], complete: int, keep: tuple[int, int], seed: int
) -> dict[str, list[str]]:
    """Draws which labels of each case somebody is said to have annotated.

    Args:
        cases: All training cases.
        labels: All labels but background.
        complete: How many cases keep all of them.
        keep: The smallest and the largest number of labels that any other case keeps.
        seed: Decides both.

    Returns:
        {case: labels it keeps, in the order of `labels`}.

    Raises:
        UserError: If that is more cases or labels than there are.
    """
    if not 0 <= complete <= len(cases) or not 1 <= keep[0] <= keep[1] <= len(labels):
        raise UserError(
            f"cannot keep {complete} of {len(cases)} cases complete and {keep[0]} to {keep[1]} of "
            f"{len(labels)} labels in the others"
        )
    generator = random.Random(f"partial labels {seed}")
    order = generator.sample(sorted(cases), len(cases))
    kept = {case: set(generator.sample(list(labels), generator.randint(*keep))) for case in order[complete:]}
    return {case: [name for name in labels if name in kept.get(case, labels)] for case in sorted(cases)}
