"""`nnunet_diffusion plan_and_preprocess`: nnU-Net's planning and preprocessing, for the unlabeled scans as well."""

import importlib
import json
import os
import sys
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from nnunet_diffusion.cli.arguments import add_status_arguments, add_worker_arguments, check_status_usage, workers_of
from nnunet_diffusion.errors import UserError

HELP = "plan the network, preprocess the labeled cases, then the pool of unlabeled scans"
NEEDS = ("nnUNet_raw", "nnUNet_preprocessed")
LOCK = "plan_and_preprocess.lock"
DEFAULT_PLANNER = "DiffusionPlanner"
EPILOG = """\
Only what is missing is done: killed at any point, the same command continues. An existing plan is kept as it is
(your edits too) unless --replan is given. A scan of the pool that cannot be used is skipped and listed at the
end, with exit code 1; a labeled case that cannot be used stops the command before anything is written.

--like plans like another data set, whose exported denoiser then fits: its spacing, normalization, patch and network.

example:
  nnunet_diffusion plan_and_preprocess -d 22 -c 2d 3d_fullres -pl DiffusionPlanner -np 8
  nnunet_diffusion plan_and_preprocess -d 502 --like openkbp_denoiser
"""


class Recipe(NamedTuple):
    """What is planned, and how.

    Attributes:
        plans_file: Where the plans are, or will be.
        make: Plans, anew if asked to.
        measures_pool: Whether the geometry of unlabeled scans counts.
        configurations: To preprocess, if none are asked for.
    """

    plans_file: str
    make: Callable[[bool], str]
    measures_pool: bool
    configurations: list[str] | None = None


def add_arguments(parser):
    """Declares the command's arguments."""
    parser.epilog = EPILOG
    parser.add_argument("-d", dest="dataset", metavar="ID", required=True, help="data set id or name")
    parser.add_argument(
        "-c",
        dest="configurations",
        metavar="CONFIG",
        nargs="+",
        help="configurations to preprocess; default: those of 2d, 3d_fullres, 3d_lowres that the plan has",
    )
    parser.add_argument(
        "-pl",
        dest="planner",
        metavar="PLANNER",
        help="DiffusionPlanner (default), DiffusionPlannerL, DiffusionPlannerXL, CompactPlanner or one of nnU-Net's "
        "(ExperimentPlanner, nnUNetPlannerResEncL, ...)",
    )
    parser.add_argument(
        "--like", metavar="FOLDER", help="plan like the data set of an exported denoiser (export --denoiser FOLDER)"
    )
    add_worker_arguments(parser, "measuring and preprocessing")
    parser.add_argument("--replan", action="store_true", help="replace an existing plan")
    parser.add_argument("--no_pool", action="store_true", help="leave out the unlabeled scans")
    parser.add_argument(
        "--num_parts", metavar="N", type=int, help="only preprocess a part of the pool, after --no_pool"
    )
    parser.add_argument("--part_id", metavar="I", type=int, help="which part, 0 to N-1; all may run at the same time")
    add_status_arguments(parser)


def run(args):
    """Runs the command."""
    from nnunetv2.paths import nnUNet_preprocessed

    from nnunet_diffusion.locks import locked
    from nnunet_diffusion.marks import WORK
    from nnunet_diffusion.preprocessing.planning import find_dataset

    check_status_usage(args)
    if (args.num_parts is None) != (args.part_id is None):
        raise UserError("--num_parts and --part_id: give both or none")
    if args.num_parts is not None and not 0 <= args.part_id < args.num_parts:
        raise UserError(f"--part_id {args.part_id}: must be from 0 to {args.num_parts - 1}")
    if args.num_parts is not None and (args.replan or args.no_pool):
        raise UserError("--replan and --no_pool: plan first with them, then do the parts without")
    if args.like and args.planner:
        raise UserError("--like and -pl: give one of them; the plan to be like is made already")
    name = find_dataset(args.dataset)
    recipe = recipe_like(name, args.like) if args.like else recipe_of(name, args.planner or DEFAULT_PLANNER)
    if args.status:
        return tell_status(args, name, recipe)
    folder = os.path.join(nnUNet_preprocessed, name)
    are_beside_each_other = (args.num_parts or 1) > 1
    with locked(os.path.join(folder, WORK, LOCK), f"the folder {folder}", are_beside_each_other):
        do = do_pool_part if args.num_parts else do_all
        failed = do(args, name, recipe, workers_of(args))
    for case in sorted(failed):
        print(f"skipped {case}: {failed[case]}", file=sys.stderr)
    if failed:
        print(f"{len(failed)} unlabeled scans were skipped, everything else is done", file=sys.stderr)
    return 1 if failed else 0


def recipe_of(name: str, planner: str) -> Recipe:
    """Plans a data set by the class of a planner; UserError if there is no such class."""
    from nnunet_diffusion.preprocessing.planning import plan, plans_file_of

    planner_class = find_planner(planner)
    measures_pool = getattr(planner_class, "uses_unlabeled_geometry", False)
    make = partial(plan, name, planner_class)
    return Recipe(plans_file_of(name, planner_class), make, measures_pool)


def recipe_like(name: str, folder: str) -> Recipe:
    """Plans a data set like that of an exported denoiser; UserError if the folder does not hold one."""
    from nnunet_diffusion.preprocessing.planning_like import plan_like, plans_file_like
    from nnunet_diffusion.pretraining.exported import read_exported

    exported = read_exported(folder)
    make = partial(plan_like, name, exported.plans, exported.channel_names, exported.denoiser)
    return Recipe(plans_file_like(name, exported.plans), make, False, [exported.configuration])


def tell_status(args, name: str, recipe: Recipe) -> int:
    """Says how far each configuration is; returns 1 if a case failed."""
    from nnunet_diffusion.preprocessing.status import status

    found = status(name, *chosen(args, recipe))
    if args.json:
        print(json.dumps([entry.as_dict() for entry in found], indent=2))
    else:
        print("\n".join(entry.told() for entry in found))
    return 1 if any(entry.failed for entry in found) else 0


def do_all(args, name: str, recipe: Recipe, workers) -> dict[str, str]:
    """Plans and preprocesses what is missing; returns what is wrong with the scans that were skipped."""
    from nnunetv2.paths import nnUNet_raw

    from nnunet_diffusion.preprocessing.cases import labeled_cases, unlabeled_cases
    from nnunet_diffusion.preprocessing.fingerprint import fingerprint_labeled, fingerprint_unlabeled
    from nnunet_diffusion.preprocessing.preprocess import copy_labels, preprocess_labeled, preprocess_pool
    from nnunet_diffusion.preprocessing.room import told_room
    from nnunet_diffusion.preprocessing.supervision import check_annotations

    unlabeled_cases(os.path.join(nnUNet_raw, name), labeled_cases(name)[0])  # all tables are sound before anything else
    if not args.replan and os.path.isfile(recipe.plans_file):
        chosen(args, recipe)  # a plan that cannot be worked with is told before hours of measuring
    fingerprint_labeled(name, workers)
    check_annotations(name, workers)
    failed = {}
    if recipe.measures_pool:
        failed |= fingerprint_unlabeled(name, workers)
    recipe.make(args.replan)
    plans_manager, configurations = chosen(args, recipe)
    for configuration in configurations:
        preprocess_labeled(name, plans_manager, configuration, workers)
        if not args.no_pool:
            if said := told_room(name, plans_manager, configuration):
                print(said, flush=True)
            failed |= preprocess_pool(name, plans_manager, configuration, workers)
    copy_labels(name)
    if args.like:
        print(f"fine-tune from the denoiser: nnUNetv2_train {name} {configurations[0]} FOLD "
              f"-tr DiffusionPretrainedTrainer -p {plans_manager.plans_name}")  # fmt: skip
    return failed


def do_pool_part(args, name: str, recipe: Recipe, workers) -> dict[str, str]:
    """Preprocesses one part of the pool; returns what is wrong with the scans that were skipped."""
    from nnunet_diffusion.preprocessing.preprocess import preprocess_pool

    plans_manager, configurations = chosen(args, recipe)
    failed = {}
    for configuration in configurations:
        parts = (args.num_parts, args.part_id)
        failed |= preprocess_pool(name, plans_manager, configuration, workers, *parts)
    return failed


def chosen(args, recipe: Recipe) -> tuple:
    """Reads the plan that there is, and chooses its configurations; UserError if either cannot be used."""
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    from nnunet_diffusion.preprocessing.planning import choose, existing_plan
    from nnunet_diffusion.preprocessing.preprocess import refuse_shared_folders

    plans_manager = PlansManager(existing_plan(recipe.plans_file))
    refuse_shared_folders(plans_manager)
    return plans_manager, choose(args.configurations or recipe.configurations, plans_manager)


def find_planner(name: str) -> type:
    """Finds a planner of ours, else of nnU-Net, by the name of its class.

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
