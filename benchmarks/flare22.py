"""The few-label protocol of Huang et al. 2024 on FLARE22, from the downloaded folder to the table, with one command.

Converts, plans, preprocesses, holds test patients out, pre-trains on all other scans, then runs the budgets of four
slices, 1 % and 10 % (label_efficiency.py) and writes the table beside the paper's figures, with what differs. Stopped
at any point, the same command continues.

It holds test patients out by a split of its own: give it a data set id that nothing else was trained on.

example, on a GPU:
  python benchmarks/flare22.py --source ~/FLARE22 -d 23
in miniature, on a data set of nnU-Net's that is there:
  python benchmarks/flare22.py -d 501 -c 2d -pl CompactPlanner --pretraining_epochs 2 --num_epochs 2 --device cpu
"""

import argparse
import json
import os
import sys
from pathlib import Path

from nnunet_diffusion.cli.plan_and_preprocess import find_planner
from nnunet_diffusion.commands import Step, Steps, command_environment, number_of_cores
from nnunet_diffusion.errors import UserError
from nnunet_diffusion.files import atomic, write_json
from nnunet_diffusion.installation import require_folders
from nnunet_diffusion.preprocessing.planning import default_plans_name, find_dataset
from nnunet_diffusion.pretraining.denoiser_file import load_denoiser
from nnunet_diffusion.tables import figure
from nnunet_diffusion.trainers import settings_of

BUDGETS = ("4slices", "1%", "10%")
PAPER = dict(zip(BUDGETS, (0.5181, 0.7156, 0.7851), strict=True))  # arXiv 2402.15216, abstract
PRETRAINER = "DenoisingDiffusionTrainer"
DIFFERENCES = """\
The paper's figures are from its abstract; nobody here has read its method section. What is known to differ:
- the network: nnU-Net's planned U-Net here, a large diffusion U-Net there; so are its size and the length of training;
- the images: pre-training on the data set's own scans here, on 207,029 slices at 256 x 256 there;
- the training: what stands above the list here; there, of a length that the abstract does not tell;
- the test patients: held out of the labeled scans here; there, what the abstract calls FLARE 2022's evaluation;
- the budgets: 1 % and 10 % of the labeled training patients here (at least one); there, of what is not said;
- four slices: the axial slices here come from four patients and are drawn by seed;
- Dice: nnU-Net's rule here, an organ in neither mask is left out of the mean.
Figures beside each other are therefore no comparison."""


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", help="the folder that FLARE22 was unpacked into; without it, -d is there already")
    parser.add_argument("-d", type=int, default=22, help="data set id (default: %(default)s)")
    parser.add_argument("-c", default="2d_256", help="configuration (default: %(default)s, the paper's 256 x 256)")
    parser.add_argument("-pl", default="DiffusionPlanner", help="planner (default: %(default)s)")
    parser.add_argument("--arms", nargs="+", default=["scratch", "full", "decoder", "linear"])
    parser.add_argument("--budgets", nargs="+", default=list(BUDGETS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--test_cases", help="how many labeled patients to hold out (default: a fifth)")
    parser.add_argument("--pretraining_epochs", type=int, help="default: the trainer's, or the plan's")
    parser.add_argument("--pretraining_iterations", type=int, help="steps an epoch; default likewise")
    parser.add_argument("--num_epochs", type=int, default=100, help="of fine-tuning (default: %(default)s)")
    parser.add_argument("--num_iterations_per_epoch", type=int, default=50, help="(default: %(default)s)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("-o", help="output folder (default: flare22__PLANS__CONFIGURATION in the data set's results)")
    return parser.parse_args(argv)


def write_plans(preprocessed: Path, plans: str, args: argparse.Namespace) -> str:
    """Copies the plan with the lengths of pre-training that were asked for; returns its name."""
    given = {"num_epochs": args.pretraining_epochs, "num_iterations_per_epoch": args.pretraining_iterations}
    content = json.loads((preprocessed / f"{plans}.json").read_text())
    block = content.setdefault("nnunet_diffusion", {})
    block[PRETRAINER] = block.get(PRETRAINER, {}) | {key: value for key, value in given.items() if value}
    content["plans_name"] = plans + "_flare22"
    write_json(preprocessed / f"{content['plans_name']}.json", content)
    return content["plans_name"]


def run_steps(args: argparse.Namespace) -> tuple[Path, Path]:
    """Runs everything; returns the folder with label_efficiency.json, and the denoiser."""
    python, d, few = sys.executable, str(args.d), str(Path(__file__).with_name("label_efficiency.py"))
    plans = default_plans_name(find_planner(args.pl))
    raw, root, results = (Path(os.environ[f"nnUNet_{kind}"]) for kind in ("raw", "preprocessed", "results"))
    name = f"Dataset{args.d:03d}_FLARE22" if args.source else find_dataset(d)
    preprocessed = root / name
    out = Path(args.o or results / name / f"flare22__{plans}__{args.c}").resolve()
    steps = Steps(str(out), command_environment(None, args.device), 4 + bool(args.source))
    if args.source:
        convert = ["nnunet_diffusion", "convert", "flare22", args.source, "-d", d]
        steps.run(Step("convert", convert, str(raw / name / "dataset.json")))
    plan = ["nnunet_diffusion", "plan_and_preprocess", "-d", d, "-pl", args.pl, "-c", args.c]
    plan += ["-np", str(number_of_cores())]
    steps.run(Step("plan and preprocess", plan, str(preprocessed / f"{plans}.json"), is_incremental=True))
    plans = write_plans(preprocessed, plans, args)
    common = ["-d", d, "-c", args.c, "-p", plans, "-o", str(out)]
    split = [python, few, *common, "--make_split"] + (["--test_cases", args.test_cases] if args.test_cases else [])
    steps.run(Step("hold test patients out", split, str(preprocessed / "splits_final.json")))
    model = results / name / f"{PRETRAINER}__{plans}__{args.c}" / "fold_0"
    train = ["nnUNetv2_train", d, args.c, "0", "-tr", PRETRAINER, "-p", plans, "-device", args.device]
    settings = settings_of(json.loads((preprocessed / f"{plans}.json").read_text()), PRETRAINER)
    environment = {"nnUNet_n_proc_DA": "0"} if args.device == "cpu" else {}
    steps.run(
        Step("pre-training", train, str(model / "denoiser.pth"), counts=r": Epoch \d+\s*$",
             total=settings.get("num_epochs", 1000), depends_on=settings, resume_with=["--c"], replaces=str(model),
             environment=environment)
    )  # fmt: skip
    bench = [python, few, *common, "--arms", *args.arms, "--budgets", *args.budgets, "--device", args.device]
    bench += ["--seeds", *map(str, args.seeds), "--num_epochs", str(args.num_epochs)]
    bench += ["--num_iterations_per_epoch", str(args.num_iterations_per_epoch)]
    total = len(args.arms) * len(args.budgets) * len(args.seeds)
    table = str(out / "label_efficiency.json")
    steps.run(Step("few labels", bench, table, r"^\[\d+/\d+\]", total, is_incremental=True))
    return out, model / "denoiser.pth"


def describe_run(denoiser: Path, fine_tuning_steps: int) -> str:
    """Says what was trained, and for how long, after the pre-training that left this denoiser.pth."""
    content = load_denoiser(str(denoiser))
    plan, training = content["plan"], content["training"]
    network, features = plan["network_class"].split(".")[-1], plan["network_kwargs"]["features_per_stage"]
    patch, steps = " x ".join(map(str, plan["patch_size"])), training["epochs"] * training["iterations_per_epoch"]
    return (
        f"{network} with {features[0]} to {features[-1]} features, patches of {patch}. Pre-training: {steps} steps of "
        f"{training['batch_size']} patches on {training['images']} scans. Fine-tuning: {fine_tuning_steps} steps."
    )


def comparison(content: dict, run: str = "") -> str:
    """Writes a Markdown table: a line for each arm, a column for each budget, the paper's figures above, `run` last."""
    arms, budgets = (list(dict.fromkeys(group[key] for group in content["summary"])) for key in ("arm", "budget"))
    cells = {(g["arm"], g["budget"]): figure(g["mean"], g["sd"]) for g in content["summary"]}
    paper = [f"{PAPER[budget]:.3f}" if budget in PAPER else "" for budget in budgets]
    protocol = next(iter(content["arms"].values()))
    lines = [f"| Dice | {' | '.join(budgets)} |", "|---" * (len(budgets) + 1) + "|"]
    lines.append(f"| Huang et al. 2024, FLARE22, as published | {' | '.join(paper)} |")
    lines += [f"| ours, {arm} | {' | '.join(cells.get((arm, budget), '') for budget in budgets)} |" for arm in arms]
    seeds = sorted({seed for group in content["summary"] for seed in group["seeds"]})
    where = f"{protocol['dataset']}, {protocol['configuration']}, {len(content['test_cases'])} test cases"
    lines.append(f"\n{where}, seeds {', '.join(map(str, seeds))}; ± is the standard deviation over seeds.")
    lines.append(f"{run}\n")
    if "FLARE22" not in protocol["dataset"]:
        lines.append(f"**{protocol['dataset']} is not FLARE22: the paper's line shows the form of the table only.**\n")
    return "\n".join([*lines, DIFFERENCES, ""])


def main() -> int:
    """Runs the protocol and writes the table."""
    args = parse_arguments()
    require_folders()
    out, denoiser = run_steps(args)
    run = describe_run(denoiser, args.num_epochs * args.num_iterations_per_epoch)
    table = comparison(json.loads((out / "label_efficiency.json").read_text()), run)
    with atomic(out / "flare22.md") as temporary:
        Path(temporary).write_text(table, encoding="utf-8")
    print(f"{table}\n{out / 'flare22.md'}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (UserError, OSError) as error:
        print(f"flare22: error: {error}", file=sys.stderr)
        sys.exit(1)
