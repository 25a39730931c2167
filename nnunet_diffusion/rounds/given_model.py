"""Whether a trained model folder may teach: of this data set and plan, and without having seen what is held out."""

import os
from collections.abc import Collection, Sequence

from nnunet_diffusion.errors import UserError
from nnunet_diffusion.files import read_json
from nnunet_diffusion.schemas import Dataset, Plans

INTENSITIES = "foreground_intensity_properties_per_channel"
IN_DATASET = ("labels", "channel_names")
IN_CONFIGURATION = ("spacing", "patch_size", "normalization_schemes", "architecture")


def refuse_other_data(folder: str, plans: dict, configuration: str, dataset_json: dict) -> None:
    """Compares a model folder with the data set and plan that it is to predict.

    Raises:
        UserError: If it is no model folder, or naming what differs.
    """
    files = [os.path.join(folder, name) for name in ("plans.json", "dataset.json")]
    if missing := [file for file in files if not os.path.isfile(file)]:
        raise UserError(f"{folder}: is no model folder, it has no {missing[0]}")
    remedy = "take another model folder"
    its_plans, its_dataset = read_json(files[0], Plans, remedy), read_json(files[1], Dataset, remedy)
    its, ours = (content["configurations"].get(configuration, {}) for content in (its_plans, plans))
    wrong = [key for key in IN_DATASET if its_dataset.get(key) != dataset_json.get(key)]
    wrong += [key for key in IN_CONFIGURATION if its.get(key) != ours.get(key)]
    wrong += [INTENSITIES] * (its_plans.get(INTENSITIES) != plans.get(INTENSITIES))
    if wrong:
        raise UserError(f"{folder}: is a model of another data set or plan, {', '.join(wrong)} differ from this run's")


def refuse_missing(checkpoints: Sequence[str], folder: str) -> None:
    """Raises UserError if there are no checkpoints, or one is not there."""
    if not checkpoints or (missing := [path for path in checkpoints if not os.path.isfile(path)]):
        raise UserError(f"{folder}: has no {missing[0] if checkpoints else 'finished fold'}: finish that training")


def refuse_leak(folder: str, fold: str, held_out: Collection[str], file_ending: str) -> None:
    """Raises UserError unless a model was validated on all cases that are held out here, so that it never saw them."""
    validation = os.path.join(folder, f"fold_{fold}", "validation")
    files = os.listdir(validation) if os.path.isdir(validation) else []
    if seen := sorted(set(held_out) - {name.removesuffix(file_ending) for name in files}):
        raise UserError(
            f"{folder}: fold {fold} was not validated on {', '.join(seen)} and may have learned from them: take a "
            "model with the same splits, whose validation folder is there"
        )
