"""Plans files, which people edit: which there are, and what is in them."""

import glob
import os
import re
from typing import Any

from nnunet_diffusion.errors import UserError
from nnunet_diffusion.files import check_shape, read_json
from nnunet_diffusion.names import safe_name
from nnunet_diffusion.schemas import Plans, ResolvedConfiguration

REMEDY = "correct it, or replace it with nnunet_diffusion plan_and_preprocess --replan"
RESOLVED = dict[str, dict[str, ResolvedConfiguration]]  # plans' configurations with what they inherit
NOT_FOR_CASES = ("gt_segmentations",)  # nnU-Net's own folder beside those of preprocessed cases
NOT_FOR_LABELED = ("_unlabeled", "_pseudo")  # endings of our own folders beside those


def plans_in(folder: str) -> list[str]:
    """Lists the plans in a data set's folder in nnUNet_preprocessed."""
    names = (os.path.basename(path)[:-5] for path in glob.glob(os.path.join(glob.escape(folder), "*Plans*.json")))
    return sorted(name for name in names if without_round(name) == name)


def without_round(name: str) -> str:
    """Returns the name of the plans to which those of a round only add its settings; any other name as it is."""
    return re.sub(r"_round\w+$", "", name)


def read_plans(folder: str, name: str, configuration: str | None = None) -> dict:
    """Reads a plans file.

    Args:
        folder: The data set's, in nnUNet_preprocessed.
        name: Of the plans.
        configuration: That must be in it.

    Raises:
        UserError: If there is no such file, it cannot be read, or it has no such configuration; with those there are.
    """
    path = os.path.join(folder, name + ".json")
    if not os.path.isfile(path):
        there = plans_in(folder)
        remedy = f"give -p {' or '.join(there)}" if there else "run nnunet_diffusion plan_and_preprocess first"
        raise UserError(f"-p {name}: there is no {path}: {remedy}")
    plans = read_plans_file(path)
    if configuration is not None and configuration not in plans["configurations"]:
        raise UserError(f"-c {configuration}: {path} has {', '.join(plans['configurations'])}")
    return plans


def read_plans_file(path: str) -> dict:
    """Reads a plans file in nnUNet_preprocessed.

    Raises:
        UserError: If it cannot be worked with, or is of another data set: trainings would read and write there.
    """
    plans = read_json(path, remedy=REMEDY)
    check_plans(plans, path)
    dataset = os.path.basename(os.path.dirname(os.path.abspath(path)))
    if plans["dataset_name"] != dataset:
        raise UserError(f"{path}: dataset_name: is {plans['dataset_name']!r}, not {dataset!r}: {REMEDY}")
    return plans


def check_plans(plans: Any, where: str) -> None:
    """Refuses plans that cannot be worked with, or whose names would lead out of the data set's folders.

    Args:
        plans: The content of a plans file.
        where: The file, for the message.

    Raises:
        UserError: Naming the key, what it is, and what it must be.
    """
    check_shape(plans, Plans, where, REMEDY)
    safe_name(plans["dataset_name"], f"{where}: dataset_name", REMEDY)
    safe_name(plans["plans_name"], f"{where}: plans_name", REMEDY)
    for key in ("transpose_forward", "transpose_backward"):
        if sorted(plans[key]) != [0, 1, 2]:
            raise UserError(f"{where}: {key}: must have 0, 1 and 2 in some order, not {plans[key]}: {REMEDY}")
    configurations = plans["configurations"]
    for name in configurations:
        key = f"{where}: configurations.{name}"
        safe_name(name, f"{where}: configurations", REMEDY)
        resolved = inherited(configurations, name, key)
        check_shape({"configurations": {name: resolved}}, RESOLVED, where, REMEDY)
        if not {"architecture", "UNet_class_name"} & resolved.keys():  # the second in plans of earlier nnU-Nets
            raise UserError(f"{key}: has no architecture: {REMEDY}")
        identifier = safe_name(resolved["data_identifier"], f"{key}.data_identifier", REMEDY)
        if identifier.lower() in NOT_FOR_CASES:  # of some file systems it is the same folder
            raise UserError(f"{key}.data_identifier: {identifier!r} is the folder of the ground truth: {REMEDY}")
        if identifier.endswith(NOT_FOR_LABELED):
            raise UserError(f"{key}.data_identifier: {identifier!r} ends as a folder of other cases does: {REMEDY}")
        if len(resolved["spacing"]) < len(resolved["patch_size"]):
            raise UserError(f"{key}: patch_size has more axes than spacing: {REMEDY}")
        if (previous := resolved.get("previous_stage")) is not None and previous not in configurations:
            raise UserError(f"{key}.previous_stage: there is no configuration {previous!r}: {REMEDY}")


def inherited(configurations: dict[str, dict], name: str, where: str) -> dict[str, Any]:
    """Resolves what a configuration inherits, as nnU-Net's `PlansManager` does.

    Raises:
        UserError: If it inherits from one that is not there, or in a circle.
    """
    chain: list[str] = []
    parent: Any = name
    while parent is not None:
        if parent in chain or parent not in configurations:
            raise UserError(f"{where}.inherits_from: {parent!r} is no other configuration of the plan: {REMEDY}")
        chain.append(parent)
        parent = configurations[parent].get("inherits_from")
    return {key: value for parent in reversed(chain) for key, value in configurations[parent].items()}
