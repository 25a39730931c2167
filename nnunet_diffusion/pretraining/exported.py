"""A denoiser's folder for others: what a data set of theirs can be planned like, and fine-tuned from.

Written whole by `export_denoiser`. Whoever reads one got it from somebody else: JSON goes through schemas, the denoiser
holds tensors and plain values, and nothing that the plan names is looked up before it has been compared with it.
"""

import os
import shutil
from collections.abc import Mapping
from typing import Any, NamedTuple

from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_diffusion.errors import UserError
from nnunet_diffusion.files import atomic_folder, read_json, write_json
from nnunet_diffusion.installation import trainer_names
from nnunet_diffusion.plans import check_plans, inherited
from nnunet_diffusion.pretraining.denoiser_file import build, load_denoiser, plan_identity
from nnunet_diffusion.pretraining.model_card import model_card
from nnunet_diffusion.pretraining.schemas import PlanIdentity
from nnunet_diffusion.pretraining.start import DENOISER, SCRATCH
from nnunet_diffusion.schemas import Fingerprint
from nnunet_diffusion.settings import BLOCK

DENOISER_FILE, PLANS_FILE, FINGERPRINT_FILE = "denoiser.pth", "plans.json", "dataset_fingerprint.json"
CARD, CURVES = "README.md", "progress.png"
COPY_AGAIN = "copy the folder again, or ask for what `nnunet_diffusion export --denoiser` writes"
PLAN_KEYS = (  # those of nnU-Net that say nothing of whoever planned
    "dataset_name", "plans_name", "original_median_spacing_after_transp", "original_median_shape_after_transp",
    "image_reader_writer", "transpose_forward", "transpose_backward", "experiment_planner_used", "label_manager",
    "foreground_intensity_properties_per_channel",
)  # fmt: skip


class Exported(NamedTuple):
    """What an exported folder holds, as far as a plan is made from it.

    Attributes:
        denoiser: Its absolute path.
        configuration: The one that the denoiser was trained for.
        channel_names: Of its images.
        plans: With that configuration alone, and the settings of our trainers.
    """

    denoiser: str
    configuration: str
    channel_names: dict[str, str]
    plans: dict[str, Any]


def export_denoiser(model_folder: str, fold: str | None, destination: str) -> str:
    """Writes the folder that somebody else needs: denoiser, plan, fingerprint, model card, curves of the losses.

    No image goes with it, and no case's name: the sheets of samples in the model folder show real scans as well.

    Args:
        model_folder: `.../DatasetXXX/DenoisingDiffusionTrainer__PLANS__CONFIGURATION`.
        fold: Such as "0"; None takes "all", else the first that has a denoiser.
        destination: Folder to create; it appears when everything is written, or not at all.

    Returns:
        The exported fold.

    Raises:
        UserError: If `destination` exists, or something is missing, damaged, or of another training.
    """
    fold = fold or find_fold(model_folder)
    source = os.path.join(model_folder, f"fold_{fold}", DENOISER_FILE)
    if not os.path.isfile(source):
        raise UserError(f"there is no {source}: check -d, -p, -c and -f, or finish pre-training")
    content = load_denoiser(source)
    plans, fingerprint = read_descriptions(model_folder, content["plan"], "take the model folder as it was trained")
    with atomic_folder(destination) as temporary:
        shutil.copyfile(source, os.path.join(temporary, DENOISER_FILE))
        write_json(os.path.join(temporary, PLANS_FILE), plans)
        write_json(os.path.join(temporary, FINGERPRINT_FILE), fingerprint)
        curves = os.path.join(os.path.dirname(source), CURVES)
        if os.path.isfile(curves):
            shutil.copyfile(curves, os.path.join(temporary, CURVES))
        card = model_card(os.path.join(temporary, DENOISER_FILE), content, fingerprint, os.path.isfile(curves))
        with open(os.path.join(temporary, CARD), "w", encoding="utf-8") as f:
            f.write(card)
    return fold


def find_fold(model_folder: str) -> str:
    """Chooses the fold to export: "all", which saw every image, else the first with a denoiser.

    Raises:
        UserError: If there is none.
    """
    names = sorted(os.listdir(model_folder)) if os.path.isdir(model_folder) else []
    folds = [name.removeprefix("fold_") for name in names if name.startswith("fold_")]
    folds = [f for f in folds if os.path.isfile(os.path.join(model_folder, f"fold_{f}", DENOISER_FILE))]
    if not folds:
        raise UserError(
            f"{model_folder} has no {DENOISER_FILE} of any fold: check -d, -p and -c, or finish pre-training"
        )
    return "all" if "all" in folds else folds[0]


def read_exported(folder: str) -> Exported:
    """Reads a folder that `export_denoiser` wrote, on whatever machine.

    Raises:
        UserError: If it is no such folder, or a half of one, a file in it is damaged or holds code, names lead out of
            folders, or plan and denoiser are not of the same training.
    """
    needed = (DENOISER_FILE, PLANS_FILE, FINGERPRINT_FILE)
    missing = [name for name in needed if not os.path.isfile(os.path.join(folder, name))]
    if missing:
        raise UserError(f"{folder} has no {', '.join(missing)}: {COPY_AGAIN}")
    denoiser = os.path.abspath(os.path.join(folder, DENOISER_FILE))
    content = load_denoiser(denoiser)
    try:
        build(content)
    except UserError as error:
        raise UserError(f"{denoiser}: {error}") from error
    plans, _ = read_descriptions(folder, content["plan"], COPY_AGAIN)
    return Exported(denoiser, content["plan"]["configuration"], content["plan"]["channel_names"], plans)


def read_descriptions(folder: str, identity: Mapping[str, Any], remedy: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Reads the plan that a denoiser was trained with, and the fingerprint of its data set.

    Args:
        folder: With both files.
        identity: The `plan_identity` that the denoiser has kept.
        remedy: What the user can do about a file that cannot be used.

    Returns:
        The plans, with the denoiser's configuration alone and without paths; the fingerprint.

    Raises:
        UserError: If one is missing or damaged, or the plan is another one; names the key.
    """
    paths = [os.path.join(folder, name) for name in (PLANS_FILE, FINGERPRINT_FILE)]
    if missing := [path for path in paths if not os.path.isfile(path)]:
        raise UserError(f"there is no {missing[0]}: {remedy}")
    plans = read_json(paths[0], remedy=remedy)
    check_plans(plans, paths[0])
    plans = without_others(plans, identity["configuration"], paths[0], remedy)
    try:
        found = plan_identity(
            PlansManager(plans), identity["configuration"], {"channel_names": identity["channel_names"]}
        )
    except Exception as error:  # whatever a strange plan provokes
        raise UserError(f"{paths[0]}: describes no network ({error!r}): {remedy}") from error
    if other := [key for key in PlanIdentity.__annotations__ if found[key] != identity[key]]:
        raise UserError(
            f"{folder}: plans.json and the denoiser are not of the same training: {other[0]} is {found[other[0]]!r} in "
            f"the plan, {identity[other[0]]!r} in the denoiser: {remedy}"
        )
    return plans, read_json(paths[1], Fingerprint, remedy)


def without_others(plans: dict[str, Any], configuration: str, where: str, remedy: str) -> dict[str, Any]:
    """Returns plans with one configuration alone, with the settings of our trainers and without a path in them.

    Raises:
        UserError: If there is no such configuration.
    """
    if configuration not in plans["configurations"]:
        raise UserError(f"{where}: has no configuration {configuration!r}, which the denoiser is of: {remedy}")
    chosen = inherited(plans["configurations"], configuration, where)
    chosen = {key: value for key, value in chosen.items() if key not in ("inherits_from", "next_stage")}
    kept = {key: plans[key] for key in PLAN_KEYS if key in plans}
    return {**kept, "configurations": {configuration: chosen}, BLOCK: own_settings(plans)}


def own_settings(plans: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Returns the settings that plans give for our trainers, without the paths that they start from."""
    given = plans.get(BLOCK, {})
    blocks = {name: given.get(name) for name in trainer_names()} if isinstance(given, dict) else {}
    return {
        trainer: {key: value for key, value in block.items() if key != "start" or value in (DENOISER, SCRATCH)}
        for trainer, block in blocks.items()
        if isinstance(block, dict)
    }
