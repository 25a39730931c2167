"""Few labels and a pool: what student and teacher gain over supervised training, mean teacher and cross pseudo labels.

A few training cases keep their labels; the others, and the data set's own pool, are the unlabeled images. Compared on
held-out cases, with the same code, plan, steps, labels and seeds; with a pool a step has a second batch:

  supervised, mean_teacher, cross_pseudo   the planned network; random weights, or from --denoiser
  co_training, co_training_gate            the planned network and a diffusion teacher, without and with the gate
  twin_supervised, twin, twin_gate         the same with the teacher's twin as student

One JSON a run; finished runs are skipped, so the same command continues after a crash.

example, from a preprocessed data set with a pool:
  python benchmarks/label_efficiency.py -d 501 -c 2d -p nnUNetCompactPlans --test_cases 20 --make_split
  nnUNetv2_train 501 2d 0 -tr DiffusionTeacherTrainer -p nnUNetCompactPlans -device cpu
  python benchmarks/co_training.py -d 501 -c 2d -p nnUNetCompactPlans --budgets 4 8 --jobs 2 --device cpu
An arm takes settings of its own after commas: --arms supervised co_training,rounds=3 co_training,rounds=3,chained=false
"""

import argparse
import hashlib
import os
from itertools import product
from pathlib import Path

import label_efficiency
from label_efficiency import find_pretrained
from regimes import draw
from report import write_figure
from runs import (
    VALIDATION_ITERATIONS,
    argument_parser,
    data_identifier,
    dataset_folder,
    output_folder,
    run_and_report,
    run_as_command,
    split_patients,
)

from nnunet_diffusion.errors import UserError
from nnunet_diffusion.preprocessing.cases import pool_folder, pool_identifiers

PLANNED, TWIN, CONTROL = "DiffusionCoTrainingTrainer", "DiffusionCoTrainingTwinTrainer", "supervised"
ARMS = {
    "supervised": ("DiffusionPretrainedTrainer", {}),
    "mean_teacher": ("MeanTeacherTrainer", {}),
    "cross_pseudo": (PLANNED, {"method": "cross_pseudo", "gate": 0.0}),
    "co_training": (PLANNED, {"method": "co_training", "gate": 0.0}),
    "co_training_gate": (PLANNED, {"method": "co_training"}),
    "twin_supervised": (TWIN, {"method": "supervised"}),
    "twin": (TWIN, {"method": "co_training", "gate": 0.0}),
    "twin_gate": (TWIN, {"method": "co_training"}),
}


def describe_arm(args: argparse.Namespace, arm: str, base: Path, test: list[str]) -> dict:
    """What all runs of an arm have in common; its `protocol` decides whether an earlier result may be kept."""
    trainer, settings = label_efficiency.read_arm(arm, args.setting, ARMS)
    settings = {
        "num_epochs": args.num_epochs,
        "num_iterations_per_epoch": args.num_iterations_per_epoch,
        "num_val_iterations_per_epoch": VALIDATION_ITERATIONS,
        "start": "denoiser" if args.denoiser and trainer != TWIN else "scratch",
        **settings,
    }
    protocol = {"dataset": base.name, "configuration": args.c, "plans": args.p, "settings": dict(settings)}
    files = {}
    if settings["start"] == "denoiser":
        files["start"] = find_pretrained(args, base, test, "DenoisingDiffusionTrainer", "denoiser.pth")
    if settings.get("method") == "co_training" and not args.no_teacher:
        files["teacher_file"] = find_pretrained(args, base, test, "DiffusionTeacherTrainer", "teacher.pth")
    for setting, file in files.items():
        settings[setting] = str(file)
        protocol[f"{setting}_sha256"] = hashlib.sha256(file.read_bytes()).hexdigest()
    return {
        "arm": arm,
        "trainer": trainer,
        "settings": settings,
        "protocol": protocol,
        "test_cases": test,
        "preprocessed": str(base),
        "configuration": args.c,
        "plans": args.p,
        "device": args.device,
    }


def describe_runs(args: argparse.Namespace, base: Path, out: Path) -> list[dict]:
    """One job description per arm, budget and seed, seeds outermost; the pool is every image that is not tested on."""
    test, rest = split_patients(args, base, out)
    data = data_identifier(args, base)
    pool = pool_folder(str(base), data)
    arms = [describe_arm(args, arm, base, test) for arm in args.arms]
    jobs = []
    for seed, budget, arm in product(args.seeds, args.budgets, arms):
        name, cases = f"{budget.replace('%', 'percent')}_{arm['arm']}_seed{seed}", draw(budget, rest, seed)
        unlabeled = sorted({case for group in rest.values() for case in group} - set(cases))
        arm = {**arm, "protocol": arm["protocol"] | {"pool": len(unlabeled) + len(pool_identifiers(pool))}}
        jobs.append(
            {
                **arm,
                "name": name,
                "budget": budget,
                "seed": seed,
                "cases": cases,
                "pool": {data: unlabeled, os.path.basename(pool): pool_identifiers(pool)},
                "result": str(out / "runs" / f"{name}.json"),
            }
        )
    return jobs


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argument_parser(__doc__, num_epochs=20)
    parser.add_argument("--budgets", nargs="+", default=["4", "8"], help="labeled cases: 8, or 10%%")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), help=f"of {', '.join(ARMS)}")
    parser.add_argument(
        "--setting", nargs="+", default=[], metavar="TRAINER.KEY=VALUE", help="for every arm of that trainer"
    )
    parser.add_argument("--denoiser", help="denoiser.pth that planned students start from (default: random weights)")
    parser.add_argument("--teacher", help="teacher.pth of co-training (default: fold 0 of this data set)")
    parser.add_argument("--no_teacher", action="store_true", help="let teachers start from random weights")
    return parser.parse_args()


def main() -> int:
    """Runs the benchmark; returns 1 if a run failed."""
    args = parse_arguments()
    if slices := [budget for budget in args.budgets if budget.endswith("slices")]:
        raise UserError(f"budget {slices[0]!r}: a case is in the pool or labeled, not in part: give cases or per cent")
    base = dataset_folder(args, "nnUNet_preprocessed")
    out = output_folder(args, base, "co_training")
    return run_and_report(describe_runs(args, base, out), out, args.jobs, "co_training", CONTROL, write_figure)


if __name__ == "__main__":
    run_as_command(main)
