"""Plans a data set like another one, so that a denoiser of that one's fits: nnU-Net's way of moving plans."""

import contextlib
import io
import os
import re
import tempfile
from collections.abc import Mapping
from typing import Any

from nnunetv2.experiment_planning.plans_for_pretraining.move_plans_between_datasets import move_plans_between_datasets
from nnunetv2.paths import nnUNet_preprocessed, nnUNet_raw

from nnunet_diffusion.errors import UserError
from nnunet_diffusion.files import read_json, write_json
from nnunet_diffusion.installation import environment
from nnunet_diffusion.names import safe_name
from nnunet_diffusion.plans import check_plans, read_plans_file
from nnunet_diffusion.preprocessing.planning import copy_description
from nnunet_diffusion.schemas import Dataset, Fingerprint
from nnunet_diffusion.settings import BLOCK

INTENSITIES = "foreground_intensity_properties_per_channel"
ALIKE = ("transpose_forward", INTENSITIES)
ALIKE_IN_CONFIGURATION = ("spacing", "normalization_schemes", "use_mask_for_norm", "architecture")
BY_DATASET = "CTNormalization"  # the only one of nnU-Net's that takes its numbers from the whole data set
FROM_A_DENOISER = ("DiffusionPretrainedTrainer", "MeanTeacherTrainer")  # by default, and what derives from them
LONGEST = 60  # of each part of the plans' name


def name_like(theirs: dict[str, Any]) -> str:
    """Names the plans of a data set that is planned like another one: `nnUNetCompactPlansLikeOpenKBP_2d`.

    Args:
        theirs: Plans with one configuration.
    """
    dataset = theirs["dataset_name"].partition("_")[2] or theirs["dataset_name"]
    parts = (theirs["plans_name"], dataset, *theirs["configurations"])
    plans, dataset, configuration = (re.sub(r"[^A-Za-z0-9]", "", part)[:LONGEST] for part in parts)
    return safe_name(f"{plans}Like{dataset}_{configuration}", "plans_name")


def plans_file_like(name: str, theirs: dict[str, Any]) -> str:
    """Says where the plans of a data set that is planned like another one are, or will be."""
    return os.path.join(nnUNet_preprocessed, name, name_like(theirs) + ".json")


def plan_like(name: str, theirs: dict[str, Any], channel_names: Mapping[str, str], start: str, replan: bool) -> str:
    """Plans a data set like another one, unless there is such a plan; returns the path of the plans file.

    Spacing, normalization with its intensity statistics, patch and network are the other one's.

    Args:
        name: Of the data set, in nnUNet_raw, measured (`fingerprint_labeled`).
        theirs: Plans with one configuration.
        channel_names: Of the other data set, by number.
        start: Absolute path of the denoiser that fits; trainings that start from one by default start from this one.
        replan: Whether to replace a plan that is there.

    Raises:
        UserError: If the channels are others, or there is a plan of that name which is not like it.
    """
    plans_file = plans_file_like(name, theirs)
    made = moved(name, theirs)
    reader, their_reader = (plans["image_reader_writer"] for plans in (made, theirs))
    if reader != their_reader:
        both = f"{reader} reads the scans of {name}, {their_reader} those of {theirs['dataset_name']}"
        print(f"WARNING: {both}: they may lie otherwise in the arrays, mirrored or turned")
    adapt_channels(name, made, channel_names)
    check_plans(made, plans_file)
    for trainer in FROM_A_DENOISER:
        made[BLOCK].setdefault(trainer, {})["start"] = start
    if not replan and os.path.isfile(plans_file):
        refuse_unlike(plans_file, made)
        print(f"{plans_file}: kept")
    else:
        write_json(plans_file, made)
        print(f"planned: {plans_file}, like {theirs['dataset_name']}")
    copy_description(name)
    return plans_file


def moved(name: str, theirs: dict[str, Any]) -> dict[str, Any]:
    """Lets nnU-Net move plans to a data set, in a folder of its own; names of folders become the data set's.

    Raises:
        UserError: If nnU-Net cannot.
    """
    target, source = name_like(theirs), "Dataset000_Theirs"
    with tempfile.TemporaryDirectory(prefix="nnunet_diffusion_") as temporary:
        for dataset in (source, name):
            os.mkdir(os.path.join(temporary, dataset))
        write_json(os.path.join(temporary, source, "theirs.json"), {**theirs, "plans_name": "theirs"})
        try:
            with contextlib.redirect_stdout(io.StringIO()), environment({"nnUNet_preprocessed": temporary}):
                move_plans_between_datasets(source, name, "theirs", target)
        except (RuntimeError, KeyError) as error:
            raise UserError(f"nnU-Net cannot plan {name} like {theirs['dataset_name']}: {error}") from error
        made = read_json(os.path.join(temporary, name, target + ".json"))
    for configuration in made["configurations"].values():
        configuration["data_identifier"] = target  # it ends with the configuration's name
    return made


def adapt_channels(name: str, made: dict[str, Any], theirs: Mapping[str, str]) -> None:
    """Makes a moved plan fit the channels of its data set, where that can be done.

    Other names are told, for their intensities mean something else. Of other numbers, a normalization that takes its
    numbers from each scan is the same for every channel; the denoiser's first convolution is then shared among them.

    Args:
        name: Of the data set.
        made: The plan, changed in place.
        theirs: The channels that it was made for.

    Raises:
        UserError: If it normalizes CT and the data set's channels are not the same ones.
    """
    dataset_json = read_json(os.path.join(nnUNet_raw, name, "dataset.json"), Dataset)
    ours, others = ([names[key] for key in sorted(names)] for names in (dataset_json["channel_names"], theirs))
    if list(map(str.casefold, ours)) == list(map(str.casefold, others)):
        return
    (configuration,) = made["configurations"].values()
    schemes, masks = configuration["normalization_schemes"], configuration["use_mask_for_norm"]
    differ = f"channels {ours} of {name} are not {others}, which the other plan is for"
    if BY_DATASET in schemes or (len(ours) != len(others) and len({*zip(schemes, masks, strict=True)}) > 1):
        raise UserError(f"{differ}: {', '.join(schemes)} of it cannot be adapted to them: plan with -pl instead")
    print(f"WARNING: {differ}")
    if len(ours) != len(others):
        fingerprint = read_json(os.path.join(nnUNet_preprocessed, name, "dataset_fingerprint.json"), Fingerprint)
        configuration["normalization_schemes"] = schemes[:1] * len(ours)
        configuration["use_mask_for_norm"] = masks[:1] * len(ours)
        made[INTENSITIES] = fingerprint[INTENSITIES]


def refuse_unlike(plans_file: str, made: dict[str, Any]) -> None:
    """Raises UserError if plans that people may have edited are no longer like those that they should be like."""
    there = read_plans_file(plans_file)
    ((configuration, expected),) = made["configurations"].items()
    found = there["configurations"].get(configuration, {})
    other = [key for key in ALIKE if there.get(key) != made[key]]
    other += [f"{configuration}.{key}" for key in ALIKE_IN_CONFIGURATION if found.get(key) != expected[key]]
    if other:
        raise UserError(f"{plans_file}: {', '.join(other)}: not like the plan that --like gives: --replan replaces it")
