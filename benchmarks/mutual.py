r"""Mutual-learning benchmark: what each term buys, on a complete data set that is split into partly labeled groups.

The training patients are dealt to groups that each keep some labels. Stage 1 is scored by the Dice of the labels that
it completes training cases with, against what was erased there, stage 2 on held-out complete cases:

  stage 1  none, pd, fd, pd+fd: without mutual terms, with prediction difference, feature difference, both
  stage 2  none, ps, dfs, ps+dfs: completed labels alone, with prediction similarity and the other groups' true labels,
           dynamic feature similarity, both; the mean of the members, and one member (mean over them)
  beside   partial: PartialLabelTrainer on the same labels; upper: all labels of all training cases

Stage 2 starts from the labels that one arm of stage 1 completed (--teacher). One JSON a run; finished runs are skipped,
so the same command continues after a crash.

example, on a preprocessed data set without annotated_labels of its own:
  python benchmarks/mutual.py -d 501 -c 2d -p nnUNetCompactPlans --test_cases 20 --jobs 2 --device cpu \
      --groups Brainstem,SpinalCord RightParotid,LeftParotid Mandible
"""

import argparse
import json
import random

from regimes import draw
from report import rounded, summarize, write_arms_figure
from runs import (
    VALIDATION_ITERATIONS,
    argument_parser,
    dataset_folder,
    output_folder,
    read_value,
    results_of,
    run_all,
    run_as_command,
    split_patients,
    tell_failed,
)

from nnunet_diffusion.errors import UserError
from nnunet_diffusion.files import write_json
from nnunet_diffusion.tables import organ_means

STAGE_1 = {
    "none": {"prediction_weight": 0.0, "feature_weight": 0.0},
    "pd": {"feature_weight": 0.0},
    "fd": {"prediction_weight": 0.0},
    "pd+fd": {},
}
STAGE_2 = {"none": STAGE_1["none"], "ps": STAGE_1["pd"], "dfs": STAGE_1["fd"], "ps+dfs": {}}
BESIDE = {"partial": {"is_told": True}, "upper": {"is_told": False}}
TRAINERS = {1: "MutualDifferenceTrainer", 2: "MutualSimilarityTrainer", 0: "PartialLabelTrainer"}
CONTROLS = {1: "none", 2: "partial"}


def deal(cases: list[str], groups: list[list[str]], seed: int) -> dict[str, list[str]]:
    """Deals cases to groups of about equal size: {case: the labels that it keeps}."""
    order = random.Random(f"groups {seed}").sample(sorted(cases), len(cases))
    return {case: groups[place % len(groups)] for place, case in enumerate(order)}


def describe_run(args: argparse.Namespace, stage: int, arm: str, seed: int, train: list[str], test: list[str]) -> dict:
    """Returns the job description of one arm and seed; all arms of a seed get the same groups."""
    base, trainer = args.base, TRAINERS[stage]
    dataset_json = json.loads((base / "dataset.json").read_text())
    if dataset_json.get("annotated_labels") or dataset_json.get("union_labels"):
        raise UserError(f"{base / 'dataset.json'}: the benchmark simulates groups on complete cases only")
    labels = [name for name, value in dataset_json["labels"].items() if name != "ignore" and value != 0]
    groups = [text.split(",") for text in args.groups]
    if sorted(label for group in groups for label in group) != sorted(labels):
        raise UserError(f"--groups {' '.join(args.groups)}: each of {labels} must be in one group")
    kept = dict.fromkeys(train, labels) if arm == "upper" else deal(train, groups, seed)
    common = [pair.split("=", 1) for pair in args.setting]
    own = [(key.split(".")[1], value) for key, value in common if key.startswith(trainer + ".")]
    block = json.loads((base / f"{args.p}.json").read_text()).get("nnunet_diffusion", {})
    settings = {
        **block.get("PartialLabelTrainer", {}),
        **block.get(TRAINERS[0], {}),  # the same optimizer for all
        "num_epochs": args.num_epochs,
        "num_iterations_per_epoch": args.num_iterations_per_epoch,
        "num_val_iterations_per_epoch": VALIDATION_ITERATIONS,
        **{key: read_value(value) for key, value in [*(pair for pair in common if "." not in pair[0]), *own]},
        **{1: STAGE_1, 2: STAGE_2}.get(stage, {}).get(arm, {}),
    }
    gate = dict(pair.split("=", 1) for pair in args.gate)
    protocol = {"dataset": base.name, "configuration": args.c, "plans": args.p, "settings": settings, "groups": groups}
    if stage:
        protocol["gate"] = {key: read_value(value) for key, value in gate.items()}
    if stage == 2:
        protocol["teacher"] = args.teacher
    name = f"stage{stage}_{arm}_seed{seed}" if stage else f"{arm}_seed{seed}"
    teacher = arm if stage == 1 else args.teacher
    job = {
        "arm": arm,
        "name": name,
        "budget": f"stage {stage}" if stage == 1 else "test",
        "seed": seed,
        "stage": stage,
        "trainer": trainer,
        "settings": settings,
        "protocol": protocol,
        "cases": dict.fromkeys(kept),
        "kept_labels": kept,
        "is_told": arm != "upper",
        "test_cases": test,
        "preprocessed": str(base),
        "configuration": args.c,
        "plans": args.p,
        "device": args.device,
        "gate": protocol.get("gate", {}),
        "completed": str(args.out / "completed" / f"{teacher}_seed{seed}"),
        "result": str(args.out / "runs" / f"{name}.json"),
    }
    return {**job, "script": "mutual_stage.py"} if stage else job


def of_one_member(run: dict) -> dict:
    """Returns a run as if one member had been tested: its Dice per case and organ is the mean over the members."""
    members = run["members"]
    cases = {case: list(organs) for case, organs in members[0].items()}
    dice = {}
    for case, organs in cases.items():
        found = {organ: [m[case][organ] for m in members if m[case][organ] is not None] for organ in organs}
        dice[case] = {organ: sum(values) / len(values) if values else None for organ, values in found.items()}
    return {**run, "arm": f"{run['arm']}, one member", "dice": dice}


def share_of_claims(run: dict) -> dict[str, float]:
    """Computes the shares of the voxels added to the training cases by stage 1: right, another label, background."""
    total = {truth: sum(case[truth] for case in run["claims"].values()) for truth in ("right", "another", "background")}
    return {truth: round(voxels / max(1, sum(total.values())), 5) for truth, voxels in total.items()}


def report(args: argparse.Namespace, stage: int, runs: list[dict]) -> None:
    """Prints and writes table, JSON and figure of a stage."""
    if stage == 2:
        runs = [view for run in runs for view in ([of_one_member(run), run] if "members" in run else [run])]
    table, summary = summarize(runs, CONTROLS[stage])
    if stage == 1:
        summary["gated"] = [
            {"arm": run["arm"], "seed": run["seed"], "ignored": round(run["ignored"], 5),
             "dice_per_organ": {o: rounded(v) for o, v in organ_means(run["gated"]).items()}}
            for run in runs
        ]  # fmt: skip
        summary["claims"] = [{"arm": run["arm"], "seed": run["seed"], **share_of_claims(run)} for run in runs]
    write_json(args.out / f"mutual_stage{stage}.json", summary)
    scored = "labels that the training cases lack" if stage == 1 else ""
    write_arms_figure(summary, args.out / f"mutual_stage{stage}.png", CONTROLS[stage], scored)
    print(f"{table}\n{args.out / f'mutual_stage{stage}.json'}", flush=True)


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argument_parser(__doc__)
    parser.add_argument("--groups", nargs="+", required=True, metavar="LABEL,LABEL", help="what each group annotates")
    parser.add_argument("--budget", default="100%", help="training cases, drawn by seed: 30, or 50%% (default: all)")
    parser.add_argument("--stage_1", nargs="+", default=list(STAGE_1), choices=list(STAGE_1))
    parser.add_argument("--stage_2", nargs="*", default=list(STAGE_2), choices=list(STAGE_2))
    parser.add_argument("--beside", nargs="*", default=list(BESIDE), choices=list(BESIDE))
    parser.add_argument("--teacher", default="pd+fd", choices=list(STAGE_1), help="whose completed labels stage 2 gets")
    parser.add_argument("--gate", nargs="*", default=[], metavar="KEY=VALUE", help="limits of the gate")
    parser.add_argument(
        "--setting", nargs="+", default=[], metavar="[TRAINER.]KEY=VALUE", help="for every trainer, or for one"
    )
    return parser.parse_args()


def main() -> int:
    """Runs the benchmark; returns 1 if a run failed."""
    args = parse_arguments()
    args.base = dataset_folder(args, "nnUNet_preprocessed")
    args.out = output_folder(args, args.base, "mutual_benchmark")
    test, rest = split_patients(args, args.base, args.out)
    if args.budget.endswith("slices"):
        raise UserError(f"--budget {args.budget}: groups are dealt whole cases: give cases or per cent")
    train = {seed: list(draw(args.budget, rest, seed)) for seed in args.seeds}
    beside = [(0, arm) for arm in args.beside]
    arms = {1: [(1, arm) for arm in args.stage_1], 2: [(2, arm) for arm in args.stage_2] + beside}
    failed = []
    for stage, wanted in arms.items():
        jobs = [describe_run(args, *arm, seed, train[seed], test) for seed in args.seeds for arm in wanted]
        lost = run_all(jobs, args.out, args.jobs)
        failed += lost
        if runs := results_of(jobs, lost):
            report(args, stage, runs)
    return tell_failed(failed, args.out)


if __name__ == "__main__":
    run_as_command(main)
