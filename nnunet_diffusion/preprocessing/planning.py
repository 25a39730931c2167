"""Plans a data set with a planner's class, and finds the plans that there are; the library itself knows no planner."""

import contextlib
import inspect
import io
import os
import shutil
import tempfile

import numpy as np
from nnunetv2.paths import nnUNet_preprocessed, nnUNet_raw
from nnunetv2.utilities.dataset_name_id_conversion import maybe_convert_to_dataset_name

from nnunet_diffusion.errors import UserError
from nnunet_diffusion.files import atomic, naming_full_disk, read_json
from nnunet_diffusion.installation import environment
from nnunet_diffusion.names import safe_name
from nnunet_diffusion.plans import check_plans, read_plans_file

DEFAULT_CONFIGURATIONS = ("2d", "3d_fullres", "3d_lowres")


def dataset_name(name_or_id: str) -> str:
    """Finds the name of a data set in any of nnU-Net's folders; errors as `find_dataset`'s."""
    try:
        return safe_name(str(maybe_convert_to_dataset_name(name_or_id)), "-d", "give the id or the name of a data set")
    except (RuntimeError, ValueError) as error:
        raise UserError(f"-d {name_or_id}: {error}") from error


def find_dataset(name_or_id: str) -> str:
    """Returns the name of a data set in nnUNet_raw.

    Raises:
        UserError: If there is none, or more than one with that id.
    """
    name = dataset_name(name_or_id)
    if not os.path.isfile(os.path.join(nnUNet_raw, name, "dataset.json")):
        raise UserError(f"{os.path.join(nnUNet_raw, name)}: no dataset.json: make it with `nnunet_diffusion convert`")
    return name


def default_plans_name(planner_class: type) -> str:
    """Returns the name that a planner gives its plans."""
    default = inspect.signature(planner_class.__init__).parameters["plans_name"].default
    return default or planner_class.default_plans_name  # of DiffusionPlanner and its kin


def plans_file_of(name: str, planner_class: type) -> str:
    """Says where a planner's plans for a data set are, or will be."""
    return os.path.join(nnUNet_preprocessed, name, default_plans_name(planner_class) + ".json")


def existing_plan(path: str) -> dict:
    """Reads plans that were made before.

    Raises:
        UserError: If there are none, or they cannot be worked with.
    """
    if not os.path.isfile(path):
        raise UserError(f"{path}: no plan yet: run the command with --no_pool first, then the parts")
    return read_plans_file(path)


def plan(name: str, planner_class: type, replan: bool) -> str:
    """Plans unless there is a plan; returns the path of the plans file.

    Raises:
        UserError: If there are plans that cannot be worked with, unless they are to be replaced.
    """
    planner = planner_class(name)
    folder = os.path.join(nnUNet_preprocessed, name)
    plans_file = os.path.join(folder, planner.plans_identifier + ".json")
    if replan or not os.path.isfile(plans_file):
        with naming_full_disk(plans_file):
            make_plan(planner, plans_file)
        print(f"planned: {plans_file}")
    elif is_outdated(existing_plan(plans_file), planner):
        print(f"{plans_file}: kept, but the data have changed since it was made: --replan replaces it")
    else:
        print(f"{plans_file}: kept")
    copy_description(name)
    return plans_file


def copy_description(name: str) -> None:
    """Puts dataset.json beside the plans, where trainings read it."""
    with atomic(os.path.join(nnUNet_preprocessed, name, "dataset.json")) as temporary:
        shutil.copyfile(os.path.join(nnUNet_raw, name, "dataset.json"), temporary)


def make_plan(planner, plans_file: str) -> None:
    """Lets nnU-Net plan in a folder of its own, for it writes in place; only a whole plan replaces an earlier one."""
    with tempfile.TemporaryDirectory(prefix=".tmp_plan_", dir=os.path.dirname(plans_file)) as temporary:
        made = os.path.join(temporary, planner.dataset_name, os.path.basename(plans_file))
        os.mkdir(os.path.dirname(made))
        if has_configurations(plans_file):
            shutil.copyfile(plans_file, made)  # nnU-Net takes over the configurations that a user added
        variables = {"nnUNet_preprocessed": temporary}
        if os.environ.get("nnUNet_n_proc_DA") == "0":  # augment in this process: nnU-Net 2.8.1 takes it for torch's
            variables["nnUNet_n_proc_DA"] = "1"  # number of threads
        with contextlib.redirect_stdout(io.StringIO()), environment(variables):
            planner.plan_experiment()
        check_plans(read_json(made), plans_file)  # what a user added was taken over as it was
        os.replace(made, plans_file)


def has_configurations(plans_file: str) -> bool:
    """Says whether there are plans, and not what is left of a file that was being written."""
    try:
        plans = read_json(plans_file) if os.path.isfile(plans_file) else {}
    except UserError:
        return False
    return isinstance(plans, dict) and isinstance(plans.get("configurations"), dict)


def is_outdated(plans: dict, planner) -> bool:
    """Says whether the scans' geometry or intensities are no longer those that the plan was made from."""
    fingerprint, axes = planner.dataset_fingerprint, plans["transpose_forward"]
    spacing = [float(i) for i in np.median(fingerprint["spacings"], 0)[axes]]
    shape = [int(round(i)) for i in np.median(fingerprint["shapes_after_crop"], 0)[axes]]
    intensities = "foreground_intensity_properties_per_channel"
    return (
        spacing != plans.get("original_median_spacing_after_transp")
        or shape != plans.get("original_median_shape_after_transp")
        or fingerprint[intensities] != plans[intensities]
    )


def choose(wanted: list[str] | None, plans_manager) -> list[str]:
    """Chooses the configurations to preprocess.

    Raises:
        UserError: If one is not in the plan.
    """
    available = plans_manager.available_configurations
    if unknown := set(wanted or ()) - set(available):
        raise UserError(f"-c {' '.join(sorted(unknown))}: the plan has {', '.join(available)}")
    return wanted or [configuration for configuration in DEFAULT_CONFIGURATIONS if configuration in available]
