"""`nnunet_diffusion demo`: from scans to segmentations and a report, beside what the labels alone give."""

import argparse
import os
import shlex
import signal
import sys
from typing import NamedTuple

from nnunet_diffusion.errors import UserError
from nnunet_diffusion.files import read_json, write_json
from nnunet_diffusion.marks import mark, refuse_foreign

HELP = "learn from all scans, predict and compare with the labels alone: on synthetic CTs, or on your data"
EPILOG = """\
Without --data it makes synthetic torso CTs and does everything in a folder of its own: a few minutes on two CPU
cores. With --data it works in nnU-Net's own folders on your data set: the test cases are those with images in
imagesTs and labels in labelsTs, else the validation cases of fold 0, which then train nothing. Stopped at any
point, the same command continues. The exit code is 0 only if every step went well.

example:
  nnunet_diffusion demo
  nnunet_diffusion demo --data 22 -c 3d_fullres -pl DiffusionPlanner --device cuda
"""
INTRODUCTION = """\
Synthetic torso CTs: few are labeled, more are not. The network that nnU-Net plans is pre-trained on all of them by
denoising, then trained on the few labels and on the others with labels that its own average makes; the control is
trained on the few labels alone, from random weights.
"""
PHANTOM = "Dataset900_Phantom"
PRETRAINER, WITHOUT_POOL = "DenoisingDiffusionTrainer", "DiffusionPretrainedTrainer"


class Arm(NamedTuple):
    """What is trained from where; `suffix` is added to the name of its plans."""

    trainer: str
    start: str
    suffix: str


ALONE, ALL = "labels alone", "all scans"
CASES = {"labeled": 3, "unlabeled": 32, "test": 6}
# budgets of the synthetic data: minutes on two CPU cores
PRETRAINING = {
    "num_epochs": 28,
    "num_iterations_per_epoch": 25,
    "num_val_iterations_per_epoch": 2,
    "warmup_epochs": 2,
    "sample_steps": 20,
    "save_every": 6,
}
FINETUNING = {
    "num_epochs": 12,
    "num_iterations_per_epoch": 25,
    "num_val_iterations_per_epoch": 2,
    "warmup_epochs": 1,
    "optimizer_name": "AdamW",  # nnU-Net's SGD learns nothing in so few steps, from either start
    "initial_lr": 2e-3,
    "head_lr_factor": 10.0,
    "save_every": 4,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    parser.add_argument(
        "-o", dest="folder", metavar="FOLDER", help="results; default: ./nnunet_diffusion_demo[/DATASET]"
    )
    parser.add_argument("--data", metavar="ID", help="a data set of yours in nnUNet_raw, id or name")
    parser.add_argument("-c", dest="configuration", metavar="CONFIG", default="2d", help="default: 2d")
    parser.add_argument(
        "-pl", dest="planner", metavar="PLANNER", default="CompactPlanner", help="default: CompactPlanner"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    parser.add_argument(
        "--epochs",
        type=int,
        metavar="N",
        help="of each training; default: the plan's settings, fewer for synthetic CTs",
    )
    parser.add_argument("--pretraining_epochs", type=int, metavar="N", help="likewise")
    for kind, count in CASES.items():
        parser.add_argument(
            f"--{kind}", type=int, metavar="N", default=count, help=f"synthetic cases; default: {count}"
        )


def run(args: argparse.Namespace) -> int:
    """Runs all steps, then compares."""
    from nnunet_diffusion.installation import require_folders, usable_device
    from nnunet_diffusion.preprocessing.planning import find_dataset

    usable_device(args.device)
    if args.data:
        require_folders()
    elif min(args.labeled, args.test) < 1:
        raise UserError("--labeled and --test: at least 1 of each")
    demo = Demo(args, find_dataset(args.data) if args.data else PHANTOM)
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)  # takes the running command along
    try:
        demo.prepare()
        demo.train()
        demo.predict()
        demo.compare()
    except KeyboardInterrupt:
        print("\nstopped: the same command continues", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, previous)
    return 1 if demo.steps.partly_done else 0


class Demo:
    """The recipe: what is run on one data set, and where things are."""

    def __init__(self, args: argparse.Namespace, name: str):
        """Prepares the folders.

        Args:
            args: The command line.
            name: DatasetXXX_Name.
        """
        from nnunet_diffusion.commands import Steps, command_environment

        self.args, self.name, self.id = args, name, str(int(name[7:10]))
        default = os.path.join("nnunet_diffusion_demo", name if args.data else "")
        self.folder = os.path.abspath(args.folder or default)
        names = ("test_images", "test_labels", "report.html")
        self.inputs, self.references, self.page = (os.path.join(self.folder, name) for name in names)
        for folder in (self.inputs, self.references):  # links are made there anew each time
            refuse_foreign(folder)
        environment = command_environment(None if args.data else self.folder, args.device)
        self.steps = Steps(self.folder, environment, total=7 if args.data else 8)
        self.raw, self.preprocessed, self.results = (
            os.path.join(self.steps.environment[f"nnUNet_{kind}"], name) for kind in ("raw", "preprocessed", "results")
        )
        self.test = {}  # case -> (images, label)
        self.arms: dict[str, Arm] = {}

    def prepare(self) -> None:
        """Makes the synthetic data, plans and preprocesses, and decides what is held out."""
        from nnunet_diffusion.cli.plan_and_preprocess import find_planner
        from nnunet_diffusion.commands import Step, number_of_cores
        from nnunet_diffusion.preprocessing.planning import default_plans_name
        from nnunet_diffusion.schemas import Dataset

        self.plans_name = default_plans_name(find_planner(self.args.planner))
        if not self.args.data:
            print(f'{INTRODUCTION}folders: eval "$(nnunet_diffusion env --root {shlex.quote(self.folder)})"\n')
            counts = [f"--{kind}={getattr(self.args, kind)}" for kind in CASES]
            command = [os.path.basename(sys.executable), "-m", "nnunet_diffusion.demo.phantom", self.raw, *counts]
            self.steps.run(Step("synthetic scans", command, f"{self.raw}/dataset.json", replaces=self.raw))
        command = ["nnunet_diffusion", "plan_and_preprocess", "-d", self.id, "-c", self.args.configuration]
        command += ["-pl", self.args.planner, "-np", str(number_of_cores())]
        plans_file = os.path.join(self.preprocessed, self.plans_name + ".json")
        self.steps.run(Step("plan and preprocess", command, plans_file, is_incremental=bool(self.args.data),
                            partly_done_if="everything else is done"))  # fmt: skip
        self.dataset_json = read_json(os.path.join(self.raw, "dataset.json"), Dataset)
        trainer = "MeanTeacherTrainer" if self.dataset_json.get("unlabeled") else WITHOUT_POOL
        self.arms = {ALONE: Arm(WITHOUT_POOL, "scratch", "_demo_scratch"), ALL: Arm(trainer, "denoiser", "_demo")}
        self.test = self.separate_test_cases()
        self.fold = "all" if self.test else "0"
        if not self.test and len(self.labeled_cases()) < 5:
            raise UserError(
                f"{self.raw}: no test cases in imagesTs and labelsTs, and fewer than the 5 labeled cases that "
                "cross-validation takes: add some of either"
            )

    def labeled_cases(self) -> dict[str, dict]:
        """Finds the labeled cases: case -> {"images": paths, "label": path}."""
        from nnunet_diffusion.preprocessing.cases import labeled_cases

        return labeled_cases(self.name)[1]

    def separate_test_cases(self) -> dict[str, tuple[list[str], str]]:
        """Finds the labels in labelsTs whose images are in imagesTs."""
        ending, channels = self.dataset_json["file_ending"], len(self.dataset_json["channel_names"])
        labels = os.path.join(self.raw, "labelsTs")
        test = {}
        for file in sorted(os.listdir(labels)) if os.path.isdir(labels) else ():
            case = file.removesuffix(ending)
            images = [os.path.join(self.raw, "imagesTs", f"{case}_{c:04d}{ending}") for c in range(channels)]
            if file.endswith(ending) and all(map(os.path.isfile, images)):
                test[case] = images, os.path.join(labels, file)
        return test

    def train(self) -> None:
        """Pre-trains, then trains the very same network twice, with the same settings."""
        budget = self.write_plans()
        self.train_step("pre-training", PRETRAINER, self.arms[ALL].suffix, budget[PRETRAINER], "denoiser.pth")
        for name, arm in self.arms.items():
            self.train_step(f"training, {name}", arm.trainer, arm.suffix, budget[arm.trainer], "checkpoint_final.pth")

    def train_step(self, title: str, trainer: str, suffix: str, epochs: int, output: str) -> None:
        """Trains one model; of the plans' settings only those of its trainer decide the result."""
        from nnunet_diffusion.commands import Step
        from nnunet_diffusion.plans import read_plans
        from nnunet_diffusion.trainers import settings_of

        plans, configuration = self.plans_name + suffix, self.args.configuration
        command = ["nnUNetv2_train", self.id, configuration, self.fold, "-tr", trainer, "-p", plans]
        model = os.path.join(self.results, f"{trainer}__{plans}__{configuration}", f"fold_{self.fold}")
        content = read_plans(self.preprocessed, plans)
        content["nnunet_diffusion"] = settings_of(content, trainer)
        step = Step(
            title,
            [*command, "-device", self.args.device],
            os.path.join(model, output),
            counts=r": Epoch \d+\s*$",
            total=epochs,
            depends_on={"dataset.json": self.dataset_json, "plans": content},
            resume_with=["--c"],
            replaces=model,
            # on a CPU augmentation in the training process itself is faster, and repeats exactly
            environment={"nnUNet_n_proc_DA": "0"} if self.args.device == "cpu" else {},
        )
        self.steps.run(step)

    def write_plans(self) -> dict[str, int]:
        """Copies the plan for both arms, with the demo's settings; returns the number of epochs of each trainer."""
        from nnunet_diffusion.plans import read_plans
        from nnunet_diffusion.trainers import settings_of

        plans = read_plans(self.preprocessed, self.plans_name)
        pretraining, training = ({}, {"seed": 0}) if self.args.data else (PRETRAINING, {"seed": 0, **FINETUNING})
        settings = {PRETRAINER: pretraining | _epochs(self.args.pretraining_epochs)}
        settings |= {arm.trainer: training | _epochs(self.args.epochs) for arm in self.arms.values()}
        block = plans.setdefault("nnunet_diffusion", {})
        for arm in self.arms.values():
            own = settings | {arm.trainer: settings[arm.trainer] | {"start": arm.start}}
            block |= {trainer: block.get(trainer, {}) | values for trainer, values in own.items()}
            plans["plans_name"] = self.plans_name + arm.suffix
            write_json(os.path.join(self.preprocessed, self.plans_name + arm.suffix + ".json"), plans)
        return {trainer: settings_of(plans, trainer)["num_epochs"] for trainer in settings}

    def predict(self) -> None:
        """Predicts the test images with nnU-Net's own command."""
        from nnunet_diffusion.commands import Step, link
        from nnunet_diffusion.preprocessing.cases import fold_of

        if not self.test:
            cases = self.labeled_cases()
            splits = os.path.join(self.preprocessed, "splits_final.json")
            if not (held_out := fold_of(splits, 0)[1]):
                raise UserError(f"{splits}: [0].val: is empty, there is nothing to test on: put cases into it")
            self.test = {case: (cases[case]["images"], cases[case]["label"]) for case in held_out}
        ending = self.dataset_json["file_ending"]
        for folder in (self.inputs, self.references):
            mark(folder, links="of nnunet_diffusion demo")
        for case, (images, label) in self.test.items():
            link(label, os.path.join(self.references, case + ending))
            for channel, image in enumerate(images):
                link(image, os.path.join(self.inputs, f"{case}_{channel:04d}{ending}"))
        for name, arm in self.arms.items():
            output = self.predictions(name)
            command = ["nnUNetv2_predict", "-i", self.inputs, "-o", output, "-d", self.id]
            command += ["-c", self.args.configuration, "-f", self.fold, "-tr", arm.trainer]
            command += ["-p", self.plans_name + arm.suffix, "-device", self.args.device]
            last = os.path.join(output, max(self.test) + ending)
            few = ["-npp", "1", "-nps", "1"] if self.args.device == "cpu" else []
            self.steps.run(
                Step(f"prediction, {name}", command + few, last, r"done with ", len(self.test), replaces=output)
            )

    def predictions(self, arm: str) -> str:
        """Returns the folder of an arm's predictions."""
        return os.path.join(self.folder, "predictions", arm.replace(" ", "_"))

    def compare(self) -> None:
        """Prints Dice per organ for both arms, draws pictures, and writes results.json and the report."""
        from nnunet_diffusion.evaluation.rules import NNUNET
        from nnunet_diffusion.tables import mean_over_organs, organ_means

        evaluations = {arm: self.evaluate(arm) for arm in self.arms}
        scores = {arm: found for arm, (found, _) in evaluations.items()}
        print(f"\n{arms_table(scores)}\n{len(self.test)} test cases, which chose nothing; {NNUNET.description}.")
        print(verdict(*scores.values()))
        self.draw(scores)
        results = {
            "dataset": self.name,
            "configuration": self.args.configuration,
            "planner": self.args.planner,
            "rule": NNUNET.description,
            "arms": {
                arm: {"mean": mean_over_organs(found), "organs": organ_means(found), "cases": found}
                for arm, found in scores.items()
            },
            "seconds": self.steps.seconds(),
        }
        write_json(os.path.join(self.folder, "results.json"), results)
        self.report([file for _, file in evaluations.values()])
        print(f"Pictures: {os.path.join(self.folder, 'overlays')}. Numbers: {self.folder}/results.json.")
        print(f"{sum(self.steps.seconds().values()) / 60:.1f} minutes in all.")
        print(f"Report: {self.page}")

    def evaluate(self, arm: str) -> tuple[dict, str]:
        """Compares an arm's predictions with the references; returns Dice by case and organ, and evaluate's file.

        Raises:
            UserError: If a prediction is missing or cannot be compared.
        """
        from nnunet_diffusion.evaluation.folders import evaluate_folders
        from nnunet_diffusion.evaluation.rules import NNUNET
        from nnunet_diffusion.evaluation.summary import dice_scores, problems, write_results

        found = evaluate_folders(self.predictions(arm), self.references, self.dataset_json, NNUNET)
        if self.test.keys() & {*found.missing, *found.failed}:
            raise UserError("\n".join([f"{self.predictions(arm)}: not everything can be compared", *problems(found)]))
        dice = {case: organs for case, organs in dice_scores(found).items() if case in self.test}
        return dice, write_results(self.predictions(arm), found)[-1]

    def draw(self, scores: dict) -> None:
        """Writes a picture of each test case."""
        from nnunet_diffusion.evaluation.overlays import draw_overlay
        from nnunet_diffusion.tables import figure, mean

        folder, ending = os.path.join(self.folder, "overlays"), self.dataset_json["file_ending"]
        os.makedirs(folder, exist_ok=True)
        is_ct = next(iter(self.dataset_json["channel_names"].values())).lower() == "ct"
        for case, (images, label) in self.test.items():
            predictions = {
                f"{arm}, Dice {figure(mean(scores[arm][case].values()), digits=2)}":
                    os.path.join(self.predictions(arm), case + ending)
                for arm in self.arms
            }  # fmt: skip
            picture = os.path.join(folder, case + ".png")
            draw_overlay(picture, images[0], label, predictions, self.dataset_json["labels"], case, is_ct)

    def report(self, evaluations: list[str]) -> None:
        """Writes the report of the data set, with the test cases' scores; what it could not read, it names."""
        from nnunet_diffusion.commands import Step

        command = ["nnunet_diffusion", "report", "-d", self.id, "-o", self.page, "--evaluation", *evaluations]
        self.steps.run(Step("report", command, self.page, is_incremental=True, partly_done_if="Wrote "))


def _epochs(number: int | None) -> dict[str, int]:
    return {"num_epochs": number} if number else {}


def arms_table(scores: dict) -> str:
    """Writes Dice of both arms beside each other and their difference: a line for each organ, then the mean."""
    from nnunet_diffusion.tables import figure, mean_over_organs, organ_means, text_table

    means = {arm: [*organ_means(found).values(), mean_over_organs(found)] for arm, found in scores.items()}
    first, second = means.values()
    differences = [figure(b - a, sign="+") for a, b in zip(first, second, strict=True)]
    columns = {arm: [figure(value) for value in values] for arm, values in means.items()}
    organs = list(organ_means(next(iter(scores.values()))))
    return text_table({"Dice": [*organs, "mean"], **columns, "difference": differences})


def verdict(alone: dict, everything: dict) -> str:
    """Says what was measured, whichever arm is ahead, and what it is worth."""
    from nnunet_diffusion.tables import mean, mean_over_organs

    gain = mean_over_organs(everything) - mean_over_organs(alone)
    ahead = sum(mean(everything[case].values()) > mean(alone[case].values()) for case in alone)
    who = "ahead of" if gain > 0 else "behind" if gain < 0 else "level with"
    return (
        f"What learned from all scans is {who} what learned from the labels alone by {abs(gain):.3f} Dice, and better "
        f"in {ahead} of {len(alone)} cases.\nIt is one run with few cases: for evidence, repeat it with several seeds "
        "and patients."
    )
