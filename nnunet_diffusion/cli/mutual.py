"""`nnunet_diffusion mutual`: both stages of mutual learning between partially labeled data sets."""

import argparse
from collections.abc import Sequence

from nnunet_diffusion.cli.arguments import add_run_arguments, add_worker_arguments, check_usage, request_of
from nnunet_diffusion.errors import UserError

HELP = "Mutual learning between groups of cases that each annotate other labels: both stages and what is in between."
NEEDS = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")
EPILOG = """\
1. trains a network for each group, of the labels that it annotates (MutualDifferenceTrainer);
2. completes the training cases of the fold: true labels win, what is uncertain is ignored;
3. trains a network of all labels for each group (MutualSimilarityTrainer), whose mean predicts.
Killed at any point, the same command continues. What is finished is never trained anew. Settings of both trainers
are in plans.json; limits of the gate: docs/mutual_learning.md.

example:
  nnunet_diffusion mutual -d 601 -c 3d_fullres -f 0 -p nnUNetDiffusionPlans
  nnUNetv2_predict -d 601 -c 3d_fullres -f 0 -p nnUNetDiffusionPlans -tr MutualSimilarityTrainer -i IMAGES -o OUT
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    add_run_arguments(parser)
    add_worker_arguments(parser, "predicting and completing")


def run(args: argparse.Namespace) -> int:
    """Runs what is not finished; returns 0."""
    check_usage(args)

    from nnunet_diffusion.installation import dataset_name, usable_device
    from nnunet_diffusion.mutual.stages import STAGES, MutualLearning

    if not args.scheduler:  # whose workers have GPUs, which the machine that asks them may lack
        usable_device(args.device)
    request = request_of(args, dataset_name(args.dataset))
    learning = MutualLearning(request)
    check_settings(learning.content, STAGES)
    learning.run()
    print(f"{request.model_folder(STAGES[1])}: predict with -tr {STAGES[1]}")
    return 0


def check_settings(plans: dict, trainers: Sequence[str]) -> None:
    """Raises UserError for settings that a later stage would refuse, before the first one is trained."""
    from nnunet_diffusion.settings import chosen
    from nnunet_diffusion.trainers import our_trainer

    classes = [our_trainer(name) for name in trainers]
    groups = [chosen(plans, trainer).get("groups") for trainer in classes]
    if groups[0] != groups[1]:
        given = " and ".join(f"{value} for {name}" for name, value in zip(trainers, groups, strict=True))
        raise UserError(f"setting groups is {given}: give both the same")
