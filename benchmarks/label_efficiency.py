"""Few-label benchmark: stock nnU-Net, ours from scratch, from a denoiser and with a pool, on the same few labels.

Patients are split before anything else: the test patients choose nothing (the final weights are tested), and a default
denoiser has not seen their images either. Every arm gets the same plan, number of steps, labels and seeds. The pool is
every image that is neither labeled nor tested on; with it a step has a second batch:

  stock, scratch, full, decoder, linear   labels alone: plain nnU-Net; ours from random weights; from the denoiser
  mean_teacher                            the pool, labeled by the average of the weights, with copy-paste
  diffusion_mean_teacher                  the same, averaged with masks that a diffusion model draws
  cross_pseudo                            the pool, labeled by a second network
  co_training, co_training_gate           the pool, labeled by a diffusion teacher, without and with the gate
  twin_supervised, twin, twin_gate        the same with the teacher's twin as student

One JSON a run; finished runs are skipped, so the same command continues after a crash.

example, from a preprocessed data set:
  python benchmarks/label_efficiency.py -d 501 -c 2d -p nnUNetCompactPlans --test_cases 20 --make_split
  nnUNetv2_train 501 2d 0 -tr DenoisingDiffusionTrainer -p nnUNetCompactPlans
  python benchmarks/label_efficiency.py -d 501 -c 2d -p nnUNetCompactPlans --budgets 2 8 10% 4slices --jobs 2
An arm takes settings of its own after commas: --arms scratch full full,timestep=150 mean_teacher,start=scratch
"""

import argparse
import hashlib
import json
import os
from itertools import product
from pathlib import Path

from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from regimes import draw
from report import write_figure
from runs import (
    VALIDATION_ITERATIONS,
    argument_parser,
    data_identifier,
    dataset_folder,
    output_folder,
    read_value,
    run_and_report,
    run_as_command,
    split_patients,
)

from nnunet_diffusion.errors import UserError
from nnunet_diffusion.files import write_json
from nnunet_diffusion.plans import read_plans
from nnunet_diffusion.preprocessing.cases import pool_folder, pool_identifiers
from nnunet_diffusion.pretraining.denoiser_file import load_denoiser
from nnunet_diffusion.settings import effective
from nnunet_diffusion.trainers import our_trainer

ARMS = {
    "stock": ("nnUNetTrainer", {}),
    "scratch": ("DiffusionPretrainedTrainer", {"start": "scratch"}),
    "full": ("DiffusionPretrainedTrainer", {}),
    "decoder": ("DiffusionPretrainedDecoderTrainer", {}),
    "linear": ("DiffusionPretrainedLinearTrainer", {}),
}
POOL_ARMS = {
    "mean_teacher": ("MeanTeacherTrainer", {}),
    "diffusion_mean_teacher": ("DiffusionMeanTeacherTrainer", {}),
    "cross_pseudo": ("DiffusionCoTrainingTrainer", {"method": "cross_pseudo", "gate": 0.0}),
    "co_training": ("DiffusionCoTrainingTrainer", {"gate": 0.0}),
    "co_training_gate": ("DiffusionCoTrainingTrainer", {}),
    "twin_supervised": ("DiffusionCoTrainingTwinTrainer", {"method": "supervised"}),
    "twin": ("DiffusionCoTrainingTwinTrainer", {"gate": 0.0}),
    "twin_gate": ("DiffusionCoTrainingTwinTrainer", {}),
}
CONTROL = "scratch"  # the arm that the others are paired with


def read_arm(text: str, settings: list[str]) -> tuple[str, dict]:
    """Reads `full,timestep=150` and adds the `TRAINER.key=value` settings: the trainer's name and its settings.

    Raises:
        UserError: If there is no such arm, or a setting is not written as above.
    """
    name, *own = text.split(",")
    arms = ARMS | POOL_ARMS
    if name not in arms:
        raise UserError(f"there is no arm {name!r}: choose from {', '.join(arms)}")
    trainer, fixed = arms[name]
    pairs = [s.removeprefix(f"{trainer}.") for s in settings if s.startswith(f"{trainer}.")] + own
    if not all("=" in pair for pair in pairs):
        raise UserError(f"the settings {pairs} of arm {text!r} must be written as key=value")
    return trainer, fixed | {key: read_value(value) for key, value in (pair.split("=", 1) for pair in pairs)}


def write_split(base: Path, train: list[str], test: list[str]) -> None:
    """Writes fold 0 so that pre-training on it does not see the test patients."""
    file, split = base / "splits_final.json", [{"train": train, "val": test}]
    if file.is_file() and json.loads(file.read_text()) != split:
        raise UserError(f"{file} holds another split: move it away first")
    write_json(file, split)


def find_pretrained(args: argparse.Namespace, base: Path, test: list[str], trainer: str, result: str) -> Path:
    """Finds the result of a pre-training, given by --denoiser or --teacher, or fold 0's, which saw no test case.

    Raises:
        UserError: If there is none, or fold 0 was trained on test cases.
    """
    kind = result.removesuffix(".pth")
    if given := getattr(args, kind):
        if not Path(given).is_file():
            raise UserError(f"--{kind} {given}: there is no such file")
        return Path(given).resolve()
    model = f"{trainer}__{args.p}__{args.c}"
    file = Path(os.environ.get("nnUNet_results", "."), base.name, model, "fold_0", result)
    split = base / "splits_final.json"
    if not file.is_file():
        raise UserError(
            f"there is no {file}: run label_efficiency.py with --make_split, then nnUNetv2_train {args.d} "
            f"{args.c} 0 -tr {trainer} -p {args.p}, or name one with --{kind}"
        )
    if not split.is_file() or set(test) - set(json.loads(split.read_text())[0]["val"]):
        raise UserError(
            f"fold 0 of {split} trains on test cases of this benchmark, so {file} may have seen them: "
            "pre-train on the split that --make_split writes"
        )
    return file


def describe_arm(args: argparse.Namespace, arm: str, base: Path, test: list[str]) -> dict:
    """Says what all runs of an arm have in common; its `protocol` decides whether an earlier result may be kept."""
    trainer, settings = read_arm(arm, args.setting)
    settings = {
        "num_epochs": args.num_epochs,
        "num_iterations_per_epoch": args.num_iterations_per_epoch,
        "num_val_iterations_per_epoch": VALIDATION_ITERATIONS,
        **settings,
    }
    protocol = {"dataset": base.name, "configuration": args.c, "plans": args.p, **planned(args, base, trainer)}
    protocol["settings"] |= settings
    everything = protocol["settings"]
    files = {}
    if everything.get("start") == "denoiser":
        files["start"] = find_pretrained(args, base, test, "DenoisingDiffusionTrainer", "denoiser.pth")
        training = load_denoiser(str(files["start"]))["training"]
        protocol["pretraining"] = {key: value for key, value in training.items() if key != "held_out_loss"}
    if everything.get("method") == "co_training" and not args.no_teacher:
        files["teacher_file"] = find_pretrained(args, base, test, "DiffusionTeacherTrainer", "teacher.pth")
    for setting, file in files.items():
        settings[setting] = str(file)
        protocol[f"{setting.removesuffix('_file')}_sha256"] = hashlib.sha256(file.read_bytes()).hexdigest()
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


def planned(args: argparse.Namespace, base: Path, trainer: str) -> dict:
    """Finds what else decides a result: the trainer's settings, from the plan or its class, patch and network."""
    plans = read_plans(str(base), args.p, args.c)
    configuration = PlansManager(plans).get_configuration(args.c).configuration
    settings = {} if trainer == "nnUNetTrainer" else effective(plans, our_trainer(trainer))
    return {
        "settings": settings,
        "patch_size": configuration.get("patch_size"),
        "architecture": configuration.get("architecture"),
    }


def describe_runs(args: argparse.Namespace, base: Path, out: Path) -> list[dict]:
    """Lists a job description per arm, budget and seed, seeds outermost: an interrupted benchmark has whole seeds."""
    test, rest = split_patients(args, base, out)
    unused = [s for s in args.setting if s.split(".")[0] not in {read_arm(arm, [])[0] for arm in args.arms}]
    if unused:
        raise UserError(f"--setting {' '.join(unused)} belongs to no trainer of the chosen arms")
    arms = [describe_arm(args, arm, base, test) for arm in args.arms]
    data = data_identifier(args, base)
    pool = pool_folder(str(base), data)
    raw = {budget: str(dataset_folder(args, "nnUNet_raw")) for budget in args.budgets if budget.endswith("slices")}
    jobs = []
    for seed, budget, arm in product(args.seeds, args.budgets, arms):
        name, cases = f"{budget.replace('%', 'percent')}_{arm['arm']}_seed{seed}", draw(budget, rest, seed)
        unlabeled = sorted({case for group in rest.values() for case in group} - set(cases))
        others = {data: unlabeled, os.path.basename(pool): pool_identifiers(pool)}
        if arm["arm"].split(",")[0] in POOL_ARMS:
            arm = {**arm, "protocol": arm["protocol"] | {"pool": sum(map(len, others.values()))}, "pool": others}
        jobs.append(
            {
                **arm,
                "name": name,
                "budget": budget,
                "seed": seed,
                "cases": cases,
                "raw": raw.get(budget),
                "result": str(out / "runs" / f"{name}.json"),
            }
        )
    return jobs


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argument_parser(__doc__)
    parser.add_argument("--budgets", nargs="+", default=["2", "8"], help="label budgets: 8, 10%% or 4slices")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), help=f"of {', '.join(ARMS | POOL_ARMS)}")
    parser.add_argument(
        "--setting", nargs="+", default=[], metavar="TRAINER.KEY=VALUE", help="for every arm of that trainer"
    )
    parser.add_argument("--make_split", action="store_true", help="only hold out the test patients, and write fold 0")
    parser.add_argument("--denoiser", help="denoiser.pth of the pretrained arms (default: fold 0 of this data set)")
    parser.add_argument("--teacher", help="teacher.pth of co-training (default: fold 0 of this data set)")
    parser.add_argument("--no_teacher", action="store_true", help="let teachers start from random weights")
    return parser.parse_args()


def main() -> int:
    """Runs the benchmark; returns 1 if a run failed."""
    args = parse_arguments()
    base = dataset_folder(args, "nnUNet_preprocessed")
    out = output_folder(args, base, "label_efficiency")
    if args.make_split:
        test, rest = split_patients(args, base, out)
        write_split(base, sorted(case for cases in rest.values() for case in cases), test)
        print(
            f"the test patients are the validation cases of fold 0 now; next:\n"
            f"nnUNetv2_train {args.d} {args.c} 0 -tr DenoisingDiffusionTrainer -p {args.p}"
        )
        return 0
    return run_and_report(describe_runs(args, base, out), out, args.jobs, "label_efficiency", CONTROL, write_figure)


if __name__ == "__main__":
    run_as_command(main)
