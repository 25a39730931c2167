"""The outcome of a run: a trained fold where `nnUNetv2_predict` looks for it; the models of all rounds stay."""

import os
import shutil

from nnunet_diffusion.files import atomic, naming_full_disk
from nnunet_diffusion.marks import WORK, mark, refuse_foreign, remove_marked
from nnunet_diffusion.records import sha256
from nnunet_diffusion.rounds.places import Places

OUTCOME = {"outcome": "of nnunet_diffusion rounds"}  # the mark


def refuse_foreign_outcome(places: Places) -> None:
    """Raises UserError if there is a model in the place of the outcome that no run of rounds put there."""
    model = places.outcome()
    for name in sorted(os.listdir(model)) if os.path.isdir(model) else ():
        if name.startswith(("fold_", ".tmp_fold_", ".old_fold_")):
            refuse_foreign(os.path.join(model, name), **OUTCOME)


def publish(places: Places, number: int | str) -> None:
    """Copies the model of a round to the place of the outcome, unless it is there.

    Raises:
        UserError: If that place is taken by a training of the user's.
        NotWritten: If the disk is full.
    """
    refuse_foreign_outcome(places)
    for fold, checkpoint in zip(places.folds(number), places.checkpoints(number), strict=True):
        target = os.path.join(places.outcome(), f"fold_{fold}", os.path.basename(checkpoint))
        if not os.path.isfile(target) or sha256(target) != sha256(checkpoint):
            with naming_full_disk(target):
                copy_fold(os.path.dirname(checkpoint), places.outcome(), fold)


def copy_fold(source: str, model: str, fold: str) -> None:
    """Copies a trained fold into a model folder: it is there whole or not at all."""
    os.makedirs(model, exist_ok=True)
    for name in ("plans.json", "dataset.json", "dataset_fingerprint.json"):
        file = os.path.join(os.path.dirname(source), name)
        if os.path.isfile(file):
            with atomic(os.path.join(model, name)) as temporary:
                shutil.copyfile(file, temporary)
    target, temporary, old = (os.path.join(model, f"{prefix}fold_{fold}") for prefix in ("", ".tmp_", ".old_"))
    for folder in (temporary, old):
        remove_marked(folder, **OUTCOME)
    mark(temporary, **OUTCOME)
    shutil.copytree(source, temporary, ignore=shutil.ignore_patterns(WORK), dirs_exist_ok=True)
    if os.path.isdir(target):
        os.rename(target, old)
    os.rename(temporary, target)
    remove_marked(old, **OUTCOME)
