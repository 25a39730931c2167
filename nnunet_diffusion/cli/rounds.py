"""`nnunet_diffusion rounds`: pseudo-label rounds from few annotations to a model trained on every scan."""

import argparse
import math

from nnunet_diffusion.cli.arguments import (
    add_run_arguments,
    add_status_arguments,
    add_worker_arguments,
    check_status_usage,
    check_usage,
    request_of,
)
from nnunet_diffusion.errors import UserError
from nnunet_diffusion.names import safe_name

HELP = "train on what is annotated, predict the pool, filter the pseudo labels, train on both, repeat"
ROUND_TRAINERS = ("PseudoLabelTrainer", "PseudoLabelMeanTeacherTrainer")
NEEDS = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")
EPILOG = """\
The data set must be preprocessed with its pool (nnunet_diffusion plan_and_preprocess). Killed at any moment, the same
command continues; with more --rounds, or with new scans or annotations preprocessed meanwhile, it goes on from there.
What changed behind its back is named, and nothing is mixed. The outcome lies where nnUNetv2_predict looks for
-tr ROUND_TRAINER; each round's report (report.md, pictures) lies in nnUNet_results/DATASET/rounds__PLANS__CONFIG.

Many machines: --stop_after train, then --num_parts N --part_id 0 ... N-1 anywhere at the same time, then again without.

example:
  nnunet_diffusion rounds -d 22 -c 3d_fullres -f 0 -p nnUNetDiffusionPlans
  nnunet_diffusion rounds -d 22 -c 3d_fullres -f 0 -p nnUNetDiffusionPlans --status
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    add_run_arguments(parser)
    add_worker_arguments(parser, "predicting and filtering")
    parser.add_argument(
        "-tr", dest="trainer", default="DiffusionPretrainedTrainer", metavar="TRAINER",
        help="of the first model; default: %(default)s",
    )  # fmt: skip
    parser.add_argument(
        "--from", dest="model", default="", metavar="MODEL", help="model folder instead of a first training"
    )
    parser.add_argument(
        "--round_trainer", choices=ROUND_TRAINERS, default=ROUND_TRAINERS[0], help="of each round; default: %(default)s"
    )
    parser.add_argument("--rounds", type=int, default=1, metavar="N", help="default: %(default)s")
    parser.add_argument(
        "--start", choices=("denoiser", "previous", "scratch"), default="denoiser",
        help="weights that each round starts from; default: %(default)s",
    )  # fmt: skip
    parser.add_argument("--finetune", action="store_true", help="at the end train on annotated cases only")
    parser.add_argument(
        "--disable_tta", action="store_true",
        help="predict the pool without mirroring, as nnUNetv2_predict's option: up to 2, 4 or 8 times faster",
    )  # fmt: skip
    parser.add_argument(
        "--tolerance", type=float, default=0.01, metavar="DICE",
        help="stop when the validation Dice is lower than the best before by more; default: %(default)s",
    )  # fmt: skip
    parser.add_argument("--stop_after", choices=("train", "predict", "gate"), default="", help="end after that stage")
    parser.add_argument(
        "--num_parts", type=int, metavar="N", help="predict a part of the pool for the round that is due"
    )
    parser.add_argument("--part_id", type=int, metavar="I", help="which part, 0 to N-1")
    parser.add_argument(
        "--keep_rounds", type=int, default=0, metavar="N",
        help="remove predictions and pseudo labels of all but the last N rounds that were trained; default: keep all",
    )  # fmt: skip
    parser.add_argument("--dry_run", action="store_true", help="say what would be done")
    add_status_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Runs the rounds, a part of a prediction, or only looks."""
    check_rounds_usage(args)

    import os
    from functools import partial

    from nnunet_diffusion.installation import EXT_TRAINER, ext_trainer_folders, usable_device, with_our_trainers
    from nnunet_diffusion.locks import locked
    from nnunet_diffusion.preprocessing.planning import find_dataset
    from nnunet_diffusion.rounds.loop import Rounds
    from nnunet_diffusion.rounds.overview import plan_of_work, status

    os.environ[EXT_TRAINER] = with_our_trainers(ext_trainer_folders())
    request = request_of(
        args, find_dataset(args.dataset), trainer=args.trainer, round_trainer=args.round_trainer, model=args.model,
        start=args.start, finetune=args.finetune, tolerance=args.tolerance, mirroring=not args.disable_tta,
        keep_rounds=args.keep_rounds,
    )  # fmt: skip
    if args.status or args.dry_run:
        rounds = Rounds(request, is_looking=args.status)
        look = partial(status, as_json=args.json) if args.status else plan_of_work
        print(look(rounds, args.rounds))
        return 0
    if not args.scheduler:  # whose workers have GPUs, which the machine that asks them may lack
        usable_device(args.device)
    if args.num_parts:
        Rounds(request).predict_part(args.rounds, args.num_parts, args.part_id)
    else:
        with locked(os.path.join(request.reports, "lock"), f"the run in {request.reports}") as lock:
            Rounds(request, lock).run(args.rounds, args.stop_after)
    return 0


def check_rounds_usage(args: argparse.Namespace) -> None:
    """Raises UserError for arguments that contradict each other."""
    check_usage(args)
    check_status_usage(args)
    if args.rounds < 1:
        raise UserError(f"--rounds {args.rounds}: at least 1")
    if args.keep_rounds < 0:
        raise UserError(f"--keep_rounds {args.keep_rounds}: at least 1, or 0 to keep all")
    if not math.isfinite(args.tolerance) or args.tolerance < 0:
        raise UserError(f"--tolerance {args.tolerance}: must be a number from 0")
    safe_name(args.trainer, "-tr", "give the name of a trainer")
    if (args.num_parts is None) != (args.part_id is None):
        raise UserError("--num_parts and --part_id: give both or none")
    if args.num_parts is not None and not 0 <= args.part_id < args.num_parts:
        raise UserError(f"--part_id {args.part_id}: must be from 0 to {args.num_parts - 1}")
