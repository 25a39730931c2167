"""The model that a run starts from: whether it may predict for others, and whether the run can start as it is to."""

import os

from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_diffusion.errors import UserError
from nnunet_diffusion.files import read_json
from nnunet_diffusion.pretraining.start import DENOISER, SCRATCH, find_start
from nnunet_diffusion.rounds.cases import Cases
from nnunet_diffusion.rounds.places import Places
from nnunet_diffusion.schemas import Dataset, Plans

INTENSITIES = "foreground_intensity_properties_per_channel"
IN_DATASET = ("labels", "channel_names")
IN_CONFIGURATION = ("spacing", "patch_size", "normalization_schemes", "architecture")


def check_model(places: Places, cases: Cases, plans: dict) -> None:
    """Raises UserError unless the first model, which this run did not train, may predict for it."""
    folder, request = places.model(0), places.request
    refuse_other_data(folder, plans, request.configuration, cases.dataset_json)
    checkpoints = places.checkpoints(0)
    if not checkpoints or (missing := [path for path in checkpoints if not os.path.isfile(path)]):
        raise UserError(f"{folder}: has no {missing[0] if checkpoints else 'finished fold'}: finish that training")
    refuse_leak(folder, request.fold, cases)


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


def refuse_leak(folder: str, fold: str, cases: Cases) -> None:
    """Raises UserError unless a model was validated on all cases that are held out here, so that it never saw them."""
    validation = os.path.join(folder, f"fold_{fold}", "validation")
    files = os.listdir(validation) if os.path.isdir(validation) else []
    ending = cases.dataset_json["file_ending"]
    if seen := sorted(set(cases.split()[1]) - {name.removesuffix(ending) for name in files}):
        raise UserError(
            f"{folder}: fold {fold} was not validated on {', '.join(seen)} and may have learned from them: take a "
            "model with the same splits, whose validation folder is there"
        )


def refuse_unusable_start(places: Places, plans: dict) -> None:
    """Raises UserError if the rounds cannot start as they are to, before anything is trained."""
    request = places.request
    if request.model and os.path.realpath(places.model(0)) == os.path.realpath(places.outcome()):
        raise UserError(f"--from {places.model(0)}: is where the outcome goes: copy it to another place first")
    if request.start == "previous" and places.folds(0) != [request.fold]:
        raise UserError("--start previous: an ensemble has no weights to go on from: take denoiser or scratch")
    start = request.settings_of(plans, request.round_trainer).get("start", DENOISER)
    if request.start != DENOISER or start == SCRATCH:
        return
    try:
        find_start(start, PlansManager(plans), request.configuration, request.fold)
    except UserError as error:
        raise UserError(
            f"{error}\nor let the rounds start elsewhere with --start scratch or --start previous, and the first model "
            "with -tr PartialLabelTrainer"
        ) from error
