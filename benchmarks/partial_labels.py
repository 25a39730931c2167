"""Partial-label benchmark: what is kept of the Dice when each case is annotated for some labels only.

Of a completely annotated data set a few training cases stay complete, every other one keeps one or two labels. Compared
on held-out complete cases, with the same plan, steps, seeds and (but for `complete`) scans:

  naive      what was not annotated is called background, as in plain nnU-Net
  complete   only the complete cases
  marginal   PartialLabelTrainer without its exclusion term and balanced draws
  exclusion, exclusion_ramp  with it, at full weight from the first step or growing from 0
  balanced, balanced_ramp  the two before with balanced draws; the latter is PartialLabelTrainer as it comes
  upper      every case completely annotated: the upper bound

One JSON a run; finished runs are skipped, so the same command continues after a crash.

example, on a preprocessed data set without annotated_labels of its own:
  python benchmarks/partial_labels.py -d 501 -c 2d -p nnUNetCompactPlans --test_cases 20 --jobs 2 --device cpu
"""

import argparse
import json
from functools import partial
from itertools import product
from pathlib import Path

from regimes import keep_labels
from report import write_arms_figure
from runs import (
    VALIDATION_ITERATIONS,
    argument_parser,
    dataset_folder,
    output_folder,
    read_value,
    run_and_report,
    run_as_command,
    split_patients,
)

from nnunet_diffusion.errors import UserError

TRAINER, CONTROL = "PartialLabelTrainer", "upper"
ARMS = {
    "naive": {"is_told": False},
    "complete": {"is_told": False, "complete_only": True},
    "marginal": {"is_told": True, "settings": {"exclusion_weight": 0.0, "balanced": False}},
    "exclusion": {"is_told": True, "settings": {"balanced": False, "exclusion_ramp": 0.0}},
    "exclusion_ramp": {"is_told": True, "settings": {"balanced": False, "exclusion_ramp": 1.0}},
    "balanced": {"is_told": True, "settings": {"balanced": True, "exclusion_ramp": 0.0}},
    "balanced_ramp": {"is_told": True, "settings": {"balanced": True, "exclusion_ramp": 1.0}},
    "upper": {"is_told": False, "all_labels": True},
}
NAMES = {
    "naive": "plain nnU-Net, partial labels",
    "complete": "plain nnU-Net, complete cases alone",
    "balanced_ramp": "PartialLabelTrainer",
    "upper": "all labels",
}  # of figures, for those who do not know the arms


def describe_run(args: argparse.Namespace, base: Path, arm: str, seed: int, train: list[str], test: list[str]) -> dict:
    """Returns the job description of one arm and seed; all arms of a seed get the same draw of labels."""
    dataset_json = json.loads((base / "dataset.json").read_text())
    if dataset_json.get("annotated_labels") or dataset_json.get("union_labels"):
        raise UserError(f"{base / 'dataset.json'}: the benchmark simulates partial labels on complete cases only")
    labels = [name for name, value in dataset_json["labels"].items() if name != "ignore" and value != 0]
    kept = keep_labels(train, labels, args.complete, tuple(args.keep), seed)
    if ARMS[arm].get("all_labels"):
        kept = dict.fromkeys(kept, labels)
    if ARMS[arm].get("complete_only"):
        kept = {case: names for case, names in kept.items() if names == labels}
    settings = {
        "num_epochs": args.num_epochs,
        "num_iterations_per_epoch": args.num_iterations_per_epoch,
        "num_val_iterations_per_epoch": VALIDATION_ITERATIONS,
        **{key: read_value(value) for key, value in (pair.split("=", 1) for pair in args.setting)},
        **ARMS[arm].get("settings", {}),
    }
    protocol = {
        "dataset": base.name,
        "configuration": args.c,
        "plans": args.p,
        "settings": settings,
        "complete_cases": args.complete,
        "labels_kept_in_others": args.keep,
    }
    name = f"{arm}_seed{seed}"
    return {
        "arm": arm,
        "name": name,
        "budget": "partial",
        "seed": seed,
        "trainer": TRAINER,
        "settings": settings,
        "protocol": protocol,
        "cases": dict.fromkeys(kept),
        "kept_labels": kept,
        "is_told": ARMS[arm]["is_told"],
        "test_cases": test,
        "preprocessed": str(base),
        "configuration": args.c,
        "plans": args.p,
        "device": args.device,
        "result": str(args.out / "runs" / f"{name}.json"),
    }


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argument_parser(__doc__)
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--complete", type=int, default=4, help="cases that stay complete (default: %(default)s)")
    parser.add_argument(
        "--keep",
        nargs=2,
        type=int,
        default=[1, 2],
        metavar=("MIN", "MAX"),
        help="labels that each other case keeps (default: %(default)s)",
    )
    parser.add_argument("--setting", nargs="+", default=[], metavar="KEY=VALUE", help="of PartialLabelTrainer")
    return parser.parse_args()


def main() -> int:
    """Runs the benchmark; returns 1 if a run failed."""
    args = parse_arguments()
    base = dataset_folder(args, "nnUNet_preprocessed")
    args.out = output_folder(args, base, "partial_labels")
    test, rest = split_patients(args, base, args.out)
    train = [case for cases in rest.values() for case in cases]
    jobs = [describe_run(args, base, arm, seed, train, test) for seed, arm in product(args.seeds, args.arms)]
    draw = partial(write_arms_figure, control=CONTROL, names=NAMES)
    return run_and_report(jobs, args.out, args.jobs, "partial_labels", CONTROL, draw)


if __name__ == "__main__":
    run_as_command(main)
