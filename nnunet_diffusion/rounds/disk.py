"""The disk: how much a round takes, and what of it goes when nothing needs it any more."""

import os
import shutil

from nnunet_diffusion.marks import mark, remove_marked
from nnunet_diffusion.preprocessing.case_files import open_array
from nnunet_diffusion.rounds.cases import Cases
from nnunet_diffusion.rounds.places import Places
from nnunet_diffusion.rounds.prediction import confidence_folder
from nnunet_diffusion.rounds.pseudo_labels import pseudo_cases, remove_pseudo_labels

LABEL_BYTES, CONFIDENCE_BYTES, PSEUDO_BYTES = 2, 1, 2  # of a voxel, before compression
SAMPLE = 20  # scans that are looked at


def mark_predictions(places: Places, number: int) -> None:
    """Creates the folders of a round's predictions, marked as ours: so they can be removed."""
    for folder in prediction_folders(places, number):
        mark(folder, predictions=f"{places.name}, round {number}")


def prediction_folders(places: Places, number: int) -> tuple[str, str]:
    """Names the folders of a round's predictions, and of their confidence."""
    return places.predicted(number), confidence_folder(places.predicted(number))


def remove_confidence(places: Places, number: int) -> None:
    """Removes what only the filter needs; raises UserError if it is not ours."""
    remove_marked(confidence_folder(places.predicted(number)), predictions=f"{places.name}, round {number}")


def remove_rounds(places: Places, newest: int) -> None:
    """Removes the label maps of the rounds before the newest ones that are kept; verdicts, reports and models stay.

    Args:
        places: Of the run, with how many are kept; 0: all.
        newest: The last round that was trained.

    Raises:
        UserError: If something there is not ours; nothing of its folder is removed then.
    """
    keep = places.request.keep_rounds
    for number in range(1, newest - keep + 1) if keep else ():
        for folder in prediction_folders(places, number):
            remove_marked(folder, predictions=f"{places.name}, round {number}")
        remove_pseudo_labels(places.round(number), pseudo_cases(places.round(number)))


def told_estimate(places: Places, cases: Cases, rounds: int) -> str:
    """Says how much the label maps of a run take at most, by some scans of the pool, and what is free."""
    some = cases.pool[:: max(1, len(cases.pool) // SAMPLE)][:SAMPLE]
    shapes = [open_array(os.path.join(cases.unlabeled, case + ".b2nd")).shape for case in some]
    voxels = sum(x * y * z for _, x, y, z in shapes) / len(shapes) * len(cases.pool)
    kept = min(rounds, places.request.keep_rounds + 1) if places.request.keep_rounds else rounds
    most = voxels * (kept * (LABEL_BYTES + PSEUDO_BYTES) + CONFIDENCE_BYTES)
    free = shutil.disk_usage(cases.base).free
    told = (
        f"disk: label maps of {len(cases.pool)} scans in {kept} round(s) take at most {most / 1e9:.3g} GB, compressed "
    )
    told += f"often a tenth of that; {free / 1e9:.3g} GB are free"
    if most > free:
        told += ": --keep_rounds 1 keeps those of one round and of the one in work"
    return told
