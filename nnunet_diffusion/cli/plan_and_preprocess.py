"""`nnunet_diffusion plan_and_preprocess`: nnU-Net's planning and preprocessing, for the unlabelled scans as well."""

import contextlib
import importlib
import inspect
import io
import os
import shutil
import sys
import tempfile

from nnunet_diffusion.errors import UserError
from nnunet_diffusion.files import atomic, naming_full_disk, read_json

HELP = "plan the network, preprocess the labelled cases, then the pool of unlabelled scans"
NEEDS = ("nnUNet_raw", "nnUNet_preprocessed")
DEFAULT_CONFIGURATIONS = ("2d", "3d_fullres", "3d_lowres")
REPLACE = "correct it, or replace it with --replan"
EPILOG = """\
Only what is missing is done: killed at any point, the same command continues. An existing plan is kept as it is
(your edits too) unless --replan is given. A scan of the pool that cannot be used is skipped and listed at the
end, with exit code 1; a labelled case that cannot be used stops the command before anything is written.

example:
  nnunet_diffusion plan_and_preprocess -d 22 -c 2d 3d_fullres -pl DiffusionPlanner -np 8
"""


def add_arguments(parser):
    """Declares the command's arguments."""
    parser.epilog = EPILOG
    parser.add_argument("-d", dest="dataset", metavar="ID", required=True, help="data set id or name")
    parser.add_argument(
        "-c",
        dest="configurations",
        metavar="CONFIG",
        nargs="+",
        help=f"configurations to preprocess; default: those of {', '.join(DEFAULT_CONFIGURATIONS)} that the plan has",
    )
    parser.add_argument(
        "-pl",
        dest="planner",
        metavar="PLANNER",
        default="DiffusionPlanner",
        help="DiffusionPlanner (default), DiffusionPlannerL, DiffusionPlannerXL, CompactPlanner or one of nnU-Net's "
        "(ExperimentPlanner, nnUNetPlannerResEncL, ...)",
    )
    parser.add_argument("-np", dest="num_processes", metavar="N", type=int, help="processes; default: nnU-Net's")
    parser.add_argument("--replan", action="store_true", help="replace an existing plan")
    parser.add_argument("--no_pool", action="store_true", help="leave out the unlabelled scans")
    parser.add_argument(
        "--num_parts", metavar="N", type=int, help="only preprocess a part of the pool, after --no_pool"
    )
    parser.add_argument("--part_id", metavar="I", type=int, help="which part, 0 to N-1; all may run at the same time")


def run(args):
    """Runs the command."""
    from nnunetv2.configuration import default_num_processes
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    from nnunet_diffusion.preprocessing.fingerprint import fingerprint_labeled, fingerprint_unlabeled
    from nnunet_diffusion.preprocessing.preprocess import preprocess_labeled, preprocess_pool

    num_processes = args.num_processes or default_num_processes
    if (args.num_parts is None) != (args.part_id is None):
        raise UserError("--num_parts and --part_id: give both or none")
    if args.num_parts is not None and not 0 <= args.part_id < args.num_parts:
        raise UserError(f"--part_id {args.part_id}: must be from 0 to {args.num_parts - 1}")
    name = find_dataset(args.dataset)
    planner_class = find_planner(args.planner)
    if args.num_parts is not None:
        if args.replan or args.no_pool:
            raise UserError("--replan and --no_pool: plan first with them, then do the parts without")
        plans_manager = PlansManager(existing_plan(name, planner_class))
        failed = {}
        for configuration in choose(args.configurations, plans_manager):
            failed |= preprocess_pool(name, plans_manager, configuration, num_processes, args.num_parts, args.part_id)
        return report(failed)
    fingerprint_labeled(name, num_processes)
    check_annotations(name, num_processes)
    failed = {}
    if getattr(planner_class, "uses_unlabeled_geometry", False):
        failed |= fingerprint_unlabeled(name, num_processes)
    plans_manager = PlansManager(plan(name, planner_class, args.replan))
    for configuration in choose(args.configurations, plans_manager):
        preprocess_labeled(name, plans_manager, configuration, num_processes)
        if not args.no_pool:
            failed |= preprocess_pool(name, plans_manager, configuration, num_processes)
    copy_labels(name)
    return report(failed)


def report(failed: dict[str, str]) -> int:
    """Names the scans that were skipped; returns the exit code."""
    for case in sorted(failed):
        print(f"skipped {case}: {failed[case]}", file=sys.stderr)
    if failed:
        print(f"{len(failed)} unlabelled scans were skipped, everything else is done", file=sys.stderr)
    return 1 if failed else 0


def existing_plan(name: str, planner_class: type) -> dict:
    """The plans that a planner has made.

    Raises:
        UserError: If there are none, or they are no JSON.
    """
    from nnunetv2.paths import nnUNet_preprocessed

    from nnunet_diffusion.schemas import Plans

    path = os.path.join(nnUNet_preprocessed, name, default_plans_name(planner_class) + ".json")
    if not os.path.isfile(path):
        raise UserError(f"{path}: no plan yet: run the command with --no_pool first, then the parts")
    return read_json(path, Plans, REPLACE)


def default_plans_name(planner_class: type) -> str:
    """The name that a planner gives its plans."""
    default = inspect.signature(planner_class.__init__).parameters["plans_name"].default
    return default or planner_class.default_plans_name  # of DiffusionPlanner and its kin


def find_dataset(name_or_id: str) -> str:
    """The name of a data set in nnUNet_raw.

    Raises:
        UserError: If there is none, or more than one with that id.
    """
    from nnunetv2.paths import nnUNet_raw
    from nnunetv2.utilities.dataset_name_id_conversion import maybe_convert_to_dataset_name

    try:
        name = maybe_convert_to_dataset_name(name_or_id)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"-d {name_or_id}: {error}") from error
    if not os.path.isfile(os.path.join(nnUNet_raw, name, "dataset.json")):
        raise UserError(f"{os.path.join(nnUNet_raw, name)}: no dataset.json: make it with `nnunet_diffusion convert`")
    return name


def check_annotations(name: str, num_processes: int) -> None:
    """Shows what each label is annotated in, and compares it with the label files; nothing where all is annotated.

    Raises:
        UserError: If dataset.json's tables are wrong, or a label file contradicts them.
    """
    from nnunetv2.utilities.label_handling.label_handling import LabelManager

    from nnunet_diffusion.partial.annotations import output_channels, read_annotations
    from nnunet_diffusion.preprocessing import supervision as annotated_files
    from nnunet_diffusion.preprocessing.fingerprint import labeled_cases

    dataset_json, dataset = labeled_cases(name)
    if not dataset_json.get("annotated_labels") and not dataset_json.get("union_labels"):
        return
    manager = LabelManager(dataset_json["labels"], dataset_json.get("regions_class_order"))
    channels = output_channels(manager)
    annotations = read_annotations(dataset_json, dataset, channels)
    counts = annotated_files.count_labels(
        dataset_json, {case: files["label"] for case, files in dataset.items()}, num_processes
    )
    annotated_files.check_counts(counts, annotations, channels, manager.ignore_label)
    print(annotated_files.table(annotated_files.summarize(counts, annotations, channels)))


def find_planner(name: str) -> type:
    """A planner of ours, else of nnU-Net, by the name of its class.

    Raises:
        UserError: If there is none.
    """
    import nnunetv2
    from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner
    from nnunetv2.utilities.find_class_by_name import recursive_find_python_class

    ours = os.path.dirname(importlib.import_module("nnunet_diffusion.planners").__file__)
    if name.isidentifier() and os.path.isfile(os.path.join(ours, name + ".py")):
        return getattr(importlib.import_module(f"nnunet_diffusion.planners.{name}"), name)
    folder = os.path.join(nnunetv2.__path__[0], "experiment_planning")
    found = recursive_find_python_class(folder, name, current_module="nnunetv2.experiment_planning")
    if not (isinstance(found, type) and issubclass(found, ExperimentPlanner)):
        known = sorted(file[:-3] for file in os.listdir(ours) if file[0].isupper() and file.endswith(".py"))
        raise UserError(f"-pl {name}: no such planner: take one of {', '.join(known)}, or one of nnU-Net's")
    return found


def plan(name: str, planner_class: type, replan: bool) -> str:
    """Plans unless there is a plan; returns the path of the plans file."""
    from nnunetv2.paths import nnUNet_preprocessed, nnUNet_raw

    from nnunet_diffusion.schemas import Plans

    planner = planner_class(name)
    folder = os.path.join(nnUNet_preprocessed, name)
    plans_file = os.path.join(folder, planner.plans_identifier + ".json")
    if replan or not os.path.isfile(plans_file):
        with naming_full_disk(plans_file):
            make_plan(planner, plans_file)
        print(f"planned: {plans_file}")
    elif is_outdated(read_json(plans_file, Plans, REPLACE), planner):
        print(f"{plans_file}: kept, but the data have changed since it was made: --replan replaces it")
    else:
        print(f"{plans_file}: kept")
    with atomic(os.path.join(folder, "dataset.json")) as temporary:
        shutil.copyfile(os.path.join(nnUNet_raw, name, "dataset.json"), temporary)
    return plans_file


def make_plan(planner, plans_file: str) -> None:
    """Lets nnU-Net plan in a folder of its own, for it writes in place; only a whole plan replaces an earlier one."""
    with tempfile.TemporaryDirectory(prefix=".tmp_plan_", dir=os.path.dirname(plans_file)) as temporary:
        made = os.path.join(temporary, planner.dataset_name, os.path.basename(plans_file))
        os.mkdir(os.path.dirname(made))
        if has_configurations(plans_file):
            shutil.copyfile(plans_file, made)  # nnU-Net takes over the configurations that a user added
        with contextlib.redirect_stdout(io.StringIO()), at_least_one_thread(), preprocessed_in(temporary):
            planner.plan_experiment()
        os.replace(made, plans_file)


def has_configurations(plans_file: str) -> bool:
    """Whether there are plans, and not what is left of a file that was being written."""
    try:
        plans = read_json(plans_file) if os.path.isfile(plans_file) else {}
    except UserError:
        return False
    return isinstance(plans, dict) and isinstance(plans.get("configurations"), dict)


@contextlib.contextmanager
def preprocessed_in(folder: str):
    """Lets nnU-Net write what belongs into nnUNet_preprocessed into another folder."""
    before = os.environ["nnUNet_preprocessed"]
    os.environ["nnUNet_preprocessed"] = folder
    try:
        yield
    finally:
        os.environ["nnUNet_preprocessed"] = before


@contextlib.contextmanager
def at_least_one_thread():
    """Lifts nnUNet_n_proc_DA=0 (augment in the main process), which nnU-Net 2.8.1 takes for torch's thread count."""
    if os.environ.get("nnUNet_n_proc_DA") != "0":
        yield
        return
    os.environ["nnUNet_n_proc_DA"] = "1"
    try:
        yield
    finally:
        os.environ["nnUNet_n_proc_DA"] = "0"


def is_outdated(plans: dict, planner) -> bool:
    """Whether the scans' geometry or intensities are no longer those that the plan was made from."""
    import numpy as np

    fingerprint, axes = planner.dataset_fingerprint, plans["transpose_forward"]
    spacing = [float(i) for i in np.median(fingerprint["spacings"], 0)[axes]]
    shape = [int(round(i)) for i in np.median(fingerprint["shapes_after_crop"], 0)[axes]]
    intensities = "foreground_intensity_properties_per_channel"
    return (
        spacing != plans["original_median_spacing_after_transp"]
        or shape != plans["original_median_shape_after_transp"]
        or fingerprint[intensities] != plans[intensities]
    )


def choose(wanted: list[str] | None, plans_manager) -> list[str]:
    """The configurations to preprocess.

    Raises:
        UserError: If one is not in the plan.
    """
    available = plans_manager.available_configurations
    if unknown := set(wanted or ()) - set(available):
        raise UserError(f"-c {' '.join(sorted(unknown))}: the plan has {', '.join(available)}")
    return wanted or [configuration for configuration in DEFAULT_CONFIGURATIONS if configuration in available]


def copy_labels(name: str) -> None:
    """Puts the labels where nnU-Net validates, as its own preprocessing does; only what is new or newer."""
    from nnunetv2.paths import nnUNet_preprocessed

    from nnunet_diffusion.preprocessing.fingerprint import labeled_cases

    dataset_json, dataset = labeled_cases(name)
    folder = os.path.join(nnUNet_preprocessed, name, "gt_segmentations")
    os.makedirs(folder, exist_ok=True)
    for case, files in dataset.items():
        target = os.path.join(folder, case + dataset_json["file_ending"])
        if not os.path.exists(target) or os.path.getmtime(files["label"]) > os.path.getmtime(target):
            with atomic(target) as temporary:
                shutil.copyfile(files["label"], temporary)
