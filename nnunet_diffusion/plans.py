"""Plans files, which people edit: which there are, and what is in them."""

import glob
import os
import re

from nnunet_diffusion.errors import UserError
from nnunet_diffusion.files import read_json


def plans_in(folder: str) -> list[str]:
    """The names of the plans in a data set's folder in nnUNet_preprocessed."""
    names = (os.path.basename(path)[:-5] for path in glob.glob(os.path.join(glob.escape(folder), "*Plans*.json")))
    return sorted(name for name in names if not re.search(r"_round\w+$", name))  # those only add a round's settings


def read_plans(folder: str, name: str, configuration: str | None = None) -> dict:
    """The content of a plans file.

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
    plans = read_json(path, "correct it, or replace it with plan_and_preprocess --replan")
    known = plans.get("configurations") if isinstance(plans, dict) else None
    if not isinstance(known, dict):
        raise UserError(f"{path}: has no configurations, it is no plans file: plan_and_preprocess --replan makes one")
    if configuration is not None and configuration not in known:
        raise UserError(f"-c {configuration}: {path} has {', '.join(known)}")
    return plans
