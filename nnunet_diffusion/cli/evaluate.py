"""`nnunet_diffusion evaluate`: how good predictions are, by FLARE22's rules or nnU-Net's."""

import argparse
import os
import sys

from nnunet_diffusion.cli.arguments import add_worker_arguments, workers_of
from nnunet_diffusion.errors import UserError
from nnunet_diffusion.files import read_json
from nnunet_diffusion.installation import require_folders

HELP = "Compare predictions with references: DSC, NSD and HD95 per case and organ, where the reference is annotated."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    parser.add_argument("predictions", metavar="PREDICTIONS", help="folder, as nnUNetv2_predict leaves it")
    parser.add_argument("references", metavar="REFERENCES", help="folder of labels: labelsTr, gt_segmentations, ...")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("-d", dest="dataset", metavar="ID", help="id or name of the data set whose labels they are")
    source.add_argument(
        "--dataset_json", metavar="FILE", help="its dataset.json [beside REFERENCES, or in PREDICTIONS]"
    )
    parser.add_argument("--rules", choices=("flare22", "nnunet"), default="nnunet", help="[%(default)s]")
    parser.add_argument(
        "--tolerance",
        type=float,
        metavar="MM",
        help="of NSD: of every label [2] with nnunet; with flare22, of labels that are none of its 13 organs",
    )
    parser.add_argument("-o", dest="output", metavar="OUT", help="folder for the CSV and JSON file [PREDICTIONS]")
    add_worker_arguments(parser, "the comparison", 4)
    parser.add_argument("--chill", action="store_true", help="references without a prediction are no error")
    parser.epilog = (
        "What counts, partial annotations, ignored voxels: docs/evaluation.md. Every reference needs a prediction;\n"
        "what is missing or cannot be compared is named, the rest is done, and the exit code is 1.\n\n"
        "example:\n"
        "  nnunet_diffusion evaluate segmentations labelsTs --dataset_json dataset.json --rules flare22\n"
        "  nnunet_diffusion evaluate MODEL/fold_0/validation PREPROCESSED/gt_segmentations -d 22 --chill"
    )


def run(args: argparse.Namespace) -> int:
    """Prints the table, writes CSV and JSON; returns 1 if a reference was not compared."""
    from nnunet_diffusion.evaluation.folders import evaluate_folders
    from nnunet_diffusion.evaluation.rules import RULES
    from nnunet_diffusion.evaluation.summary import problems, remarks, summary_table, write_results

    if args.tolerance is not None and not 0 <= args.tolerance < float("inf"):
        raise UserError(f"--tolerance {args.tolerance}: a distance in mm is 0 or more")
    path, folders = find_dataset_json(args), (args.predictions, args.references)
    dataset_json, rules = read_dataset_json(path), RULES[args.rules]
    evaluation = evaluate_folders(*folders, dataset_json, rules, args.tolerance, workers_of(args))
    if args.chill:
        evaluation.missing.clear()
    for problem in problems(evaluation):
        print(problem, file=sys.stderr, flush=True)
    if not evaluation.scores:
        raise UserError(f"{args.predictions}: nothing could be compared with {args.references}")
    print("\n".join([summary_table(evaluation), *remarks(evaluation), f"Labels: {path}"]))
    for file in write_results(args.output or args.predictions, evaluation):
        print(f"Wrote {file}")
    return 1 if evaluation.missing or evaluation.failed else 0


def find_dataset_json(args: argparse.Namespace) -> str:
    """Finds the dataset.json that was asked for, else that beside the references, else that in the predictions.

    Raises:
        UserError: If there is none.
    """
    if args.dataset_json:
        return args.dataset_json
    if args.dataset:
        from nnunet_diffusion.preprocessing.planning import find_dataset

        require_folders(("nnUNet_raw",))
        return os.path.join(os.environ["nnUNet_raw"], find_dataset(args.dataset), "dataset.json")
    candidates = [os.path.join(os.path.dirname(os.path.abspath(args.references)), "dataset.json")]
    candidates.append(os.path.join(args.predictions, "dataset.json"))
    for path in candidates:
        if os.path.isfile(path):
            return path
    raise UserError(f"no dataset.json, which names the labels, at {' or '.join(candidates)}: give -d or --dataset_json")


def read_dataset_json(path: str) -> dict:
    """Reads a dataset.json as far as evaluation needs it.

    Raises:
        UserError: If it is not one.
    """
    from nnunetv2.utilities.label_handling.label_handling import LabelManager

    from nnunet_diffusion.schemas import EvaluatedDataset

    content = read_json(path, EvaluatedDataset, "give the dataset.json of an nnU-Net data set")
    try:
        LabelManager(content["labels"], content.get("regions_class_order"))
    except (RuntimeError, AssertionError, TypeError, ValueError) as error:
        raise UserError(f"{path}: nnU-Net cannot use its labels ({error}): give them as nnU-Net wants them") from error
    return content
