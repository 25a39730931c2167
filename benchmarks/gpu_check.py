"""What only a GPU shows, in parts of under ten minutes that continue one another; writes one JSON and one page.

  tests          those that need CUDA (pytest -m gpu)
  data           OpenKBP converted, planned and preprocessed; 20 test patients held out
  TRAINER        five epochs of every trainer: seconds an epoch, peak memory, beside nnUNetTrainer's; or its refusal
  prediction     of five scans by nnUNetv2_predict, mirrored as nnU-Net's own, and as our trainers' come
  rounds         one round of pseudo labels
  pre-training   a denoiser of the planned 3-D network
  ARM            fine-tuning with 8 labeled cases by SGD at 1e-2, by SGD at 1e-3 with 50 epochs of warm-up (as nnU-Net
                 fine-tunes), and by AdamW, each from random weights and from the denoiser

A part that is done is skipped, one that fails is told and tried again by the next call; when all are done the exit code
is 0. The plan is DiffusionPlanner's 3d_fullres.

example, in a folder with OpenKBP's imagesTr, labelsTr and imagesUn:
  bash benchmarks/gpu_check.sh openkbp -o gpu_check
On a machine without a GPU, to see that it runs:
  bash benchmarks/gpu_check.sh openkbp -o gpu_check --miniature
"""

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from runs import run_as_command

from nnunet_diffusion.errors import UserError
from nnunet_diffusion.files import atomic, write_json
from nnunet_diffusion.installation import trainer_names, with_our_trainers

ID, NAME = "501", "Dataset501_OpenKBP"
LABELS = ("Brainstem", "SpinalCord", "RightParotid", "LeftParotid", "Mandible")
SECONDS = 540  # of a call; a part that has begun is finished
OPTIMIZERS = {
    "SGD 1e-2": "initial_lr=0.01",
    "SGD 1e-3, warm-up": "initial_lr=0.001,warmup_epochs={warmup}",
    "AdamW 3e-4": "optimizer_name=AdamW,initial_lr=0.0003,warmup_epochs={warmup}",
}
STARTS = {"random weights": "scratch", "denoiser": "full"}
# Trains one trainer for a few epochs; the last line is what was measured.
FIVE_EPOCHS = """
import json, resource, sys
import torch
from nnunetv2.run.run_training import get_trainer_from_args
dataset, configuration, plans, name, device, epochs, steps = sys.argv[1:]
trainer = get_trainer_from_args(dataset, configuration, "all", name, plans, device=torch.device(device))
trainer.num_epochs, trainer.num_iterations_per_epoch, trainer.num_val_iterations_per_epoch = int(epochs), int(steps), 2
trainer.disable_checkpointing = True
trainer.run_training()
begin, end = (trainer.logger.get_value(f"epoch_{key}_timestamps", step=None) for key in ("start", "end"))
on_cuda = device == "cuda"
peak = torch.cuda.max_memory_allocated() / 2**10 if on_cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
median = sorted(b - a for a, b in zip(begin, end))[len(begin) // 2]
print(json.dumps({"epoch_seconds": median, "peak_mib": peak / 2**10}))
"""


def installed(command: str) -> str:
    """Returns the path of a command of this installation."""
    return str(Path(sys.executable).with_name(command))


class Check:
    """The parts, and what is known of them."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.out = args, Path(args.o).resolve()
        (self.out / "logs").mkdir(parents=True, exist_ok=True)
        self.file = self.out / "gpu_check.json"
        self.found: dict[str, dict] = json.loads(self.file.read_text()) if self.file.is_file() else {}
        small = args.miniature
        self.device = "cpu" if small else "cuda"
        self.planner, self.plans = ("CompactPlanner", "nnUNetCompactPlans") if small else (
            "DiffusionPlanner", "nnUNetDiffusionPlans",
        )  # fmt: skip
        self.configuration, self.test_cases = ("2d", "4") if small else ("3d_fullres", "20")
        self.epochs, self.steps = (2, 2) if small else (5, 50)  # of the trainers
        self.long_epochs, self.long_steps = (2, 2) if small else (200, 20)  # of pre-training and fine-tuning
        self.folders = {f"nnUNet_{kind}": str(self.out / kind) for kind in ("raw", "preprocessed", "results")}
        os.environ |= self.folders | {"nnUNet_extTrainer": with_our_trainers([])}
        if small:
            os.environ |= {"nnUNet_n_proc_DA": "0", "nnUNet_def_n_proc": "2", "nnUNet_compile": "f"}

    def parts(self) -> dict[str, Callable[[], dict]]:
        """Returns all parts, in their order."""
        trainers = ("nnUNetTrainer", *trainer_names())
        parts = {"tests": self.run_tests, "data": self.prepare}
        parts |= {name: lambda name=name: self.five_epochs(name) for name in trainers}
        parts |= {"prediction": self.predict, "rounds": self.rounds, "pre-training": self.pretrain}
        for start, arm in STARTS.items():
            for optimizer, settings in OPTIMIZERS.items():
                name = f"{optimizer}, {start}"
                parts[name] = lambda arm=arm, settings=settings: self.fine_tune(arm, settings)
        return parts

    def run(self) -> int:
        """Does what is left, for about nine minutes; returns 1 if something failed or is left."""
        parts, failed, begin = self.parts(), [], time.monotonic()
        for name, part in parts.items():
            if name in self.found:
                continue
            if time.monotonic() - begin > SECONDS:
                break
            print(f"{name} ...", flush=True)
            start = time.monotonic()
            try:
                self.found[name] = {**part(), "seconds": round(time.monotonic() - start, 1)}
            except UserError as error:
                failed.append(name)
                print(f"FAILED {name}: {error}", file=sys.stderr)
                continue
            write_json(self.file, self.found)
            with atomic(self.out / "gpu_check.md") as temporary:
                Path(temporary).write_text(self.page())
        left = [name for name in parts if name not in self.found]
        print(f"{self.file}, gpu_check.md: " + (f"{len(left)} parts left: run it again" if left else "all is done"))
        return 1 if failed or left else 0

    def command(self, name: str, *command: str, allowed: str = "") -> str:
        """Runs a command with a log; returns what it printed.

        Args:
            name: Of the log.
            command: The command.
            allowed: A pattern: an exit code other than 0 is no failure if what was printed matches.

        Raises:
            UserError: If it failed; names the log.
        """
        log = self.out / "logs" / f"{re.sub('[^A-Za-z0-9]+', '_', name)}.log"
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        log.write_text(done.stdout)
        if done.returncode and not (allowed and re.search(allowed, done.stdout)):
            raise UserError(f"exit code {done.returncode} of {' '.join(command)[:200]}: see {log}")
        return done.stdout

    def benchmark(self, name: str, script: str, *arguments: str) -> str:
        """Runs a benchmark beside this one."""
        return self.command(name, sys.executable, str(Path(__file__).with_name(script)), *arguments)

    def run_tests(self) -> dict:
        """Runs the tests that need CUDA."""
        tests = str(Path(__file__).resolve().parent.parent / "tests")
        printed = self.command("tests", sys.executable, "-m", "pytest", "-q", "-m", "gpu", tests)
        return {"outcome": printed.strip().splitlines()[-1]}

    def prepare(self) -> dict:
        """Converts, plans, preprocesses, and holds test patients out."""
        source = Path(self.args.openkbp).resolve()
        images, labels, unlabeled = (str(source / name) for name in ("imagesTr", "labelsTr", "imagesUn"))
        ours = installed("nnunet_diffusion")
        self.command("convert", ours, "convert", "folder", images, labels, "--unlabeled", unlabeled, "-d", ID,
                     "-n", "OpenKBP", "--labels", *LABELS)  # fmt: skip
        self.command("plan", ours, "plan_and_preprocess", "-d", ID, "-pl", self.planner, "-c", self.configuration)
        self.benchmark("split", "label_efficiency.py", *self.common(), "--test_cases", self.test_cases, "--make_split")
        return {}

    def common(self) -> list[str]:
        """Returns the arguments that all benchmarks take."""
        return ["-d", ID, "-c", self.configuration, "-p", self.plans, "--device", self.device]

    def five_epochs(self, name: str) -> dict:
        """Trains a trainer for five epochs, from random weights where it asks where from."""
        plans = self.plans
        if name != "nnUNetTrainer":
            plans = f"{self.plans}_check"
            content = json.loads((self.preprocessed / f"{self.plans}.json").read_text())
            block = content.setdefault("nnunet_diffusion", {})
            for trainer in ("PartialLabelTrainer", "DiffusionPretrainedTrainer", "MeanTeacherTrainer"):
                block[trainer] = {**block.get(trainer, {}), "start": "scratch"}
            block["MeanTeacherTrainer"] |= {"supervised_share": 0.0, "least_dice": 0.0}  # the pool from the start
            write_json(self.preprocessed / f"{plans}.json", {**content, "plans_name": plans})
        arguments = (ID, self.configuration, plans, name, self.device, str(self.epochs), str(self.steps))
        printed = self.command(name, sys.executable, "-c", FIVE_EPOCHS, *arguments, allowed="UserError: ")
        last = printed.strip().splitlines()[-1]
        return {"refused": last.split("UserError: ")[-1]} if "UserError: " in last else json.loads(last)

    @property
    def preprocessed(self) -> Path:
        """Returns the data set's preprocessed folder."""
        return Path(self.folders["nnUNet_preprocessed"], NAME)

    def predict(self) -> dict:
        """Trains the same network twice, for an epoch, and predicts five scans with each."""
        inputs, seconds, which = self.out / "five_scans", {}, ("-d", ID, "-c", self.configuration, "-f", "0")
        inputs.mkdir(exist_ok=True)
        for image in sorted(Path(self.args.openkbp, "imagesTr").resolve().glob("*.nii.gz"))[:5]:
            if not (inputs / image.name).exists():
                (inputs / image.name).symlink_to(image)
        for mirroring in ("all", "auto"):
            plans, content = (
                f"{self.plans}_{mirroring}",
                json.loads((self.preprocessed / f"{self.plans}.json").read_text()),
            )
            once = {"num_epochs": 1, "num_iterations_per_epoch": self.steps, "mirroring": mirroring}
            content |= {"plans_name": plans, "nnunet_diffusion": {"ConfiguredTrainer": once}}
            write_json(self.preprocessed / f"{plans}.json", content)
            model = ("-tr", "ConfiguredTrainer", "-p", plans, "-device", self.device)
            train = (installed("nnUNetv2_train"), ID, self.configuration, "0", *model)
            self.command(f"train, mirroring {mirroring}", *train)
            start, masks = time.monotonic(), str(self.out / f"masks_{mirroring}")
            predict = (installed("nnUNetv2_predict"), "-i", str(inputs), "-o", masks, *which, *model)
            self.command(f"predict, mirroring {mirroring}", *predict)
            seconds[mirroring] = round(time.monotonic() - start, 1)
        return {"predict_seconds": seconds}

    def rounds(self) -> dict:
        """Runs one round of pseudo labels, unfiltered: so short a training makes none that would pass."""
        printed = self.benchmark(
            "rounds", "rounds.py", *self.common(), "--seeds", "0", "--annotated", "8", "--rounds", "1", "--num_epochs",
            str(self.epochs), "--num_iterations_per_epoch", str(self.steps), "-o", str(self.out / "rounds"),
            "--gate", "is_open=true", *(("--pool", "8", "--validation", "4") if self.args.miniature else ()),
        )  # fmt: skip
        return {"outcome": printed.strip().splitlines()[-1]}

    def pretrain(self) -> dict:
        """Pre-trains the planned network on all but the test patients, killed or not."""
        path = self.preprocessed / f"{self.plans}.json"
        content = json.loads(path.read_text())
        block = content.setdefault("nnunet_diffusion", {})
        long = {"num_epochs": self.long_epochs, "num_iterations_per_epoch": self.long_steps, "save_every": 10}
        block["DenoisingDiffusionTrainer"] = {**block.get("DenoisingDiffusionTrainer", {}), **long, "warmup_epochs": 1}
        write_json(path, content)
        model = f"DenoisingDiffusionTrainer__{self.plans}__{self.configuration}"
        folder = Path(self.folders["nnUNet_results"], NAME, model, "fold_0")
        resume = ["--c"] if (folder / "checkpoint_latest.pth").is_file() else []
        train = (installed("nnUNetv2_train"), ID, self.configuration, "0", "-tr", "DenoisingDiffusionTrainer")
        self.command("pre-training", *train, "-p", self.plans, "-device", self.device, *resume)
        return {}

    def fine_tune(self, arm: str, settings: str) -> dict:
        """Fine-tunes with 8 labeled cases, one seed; returns the test patients' mean Dice."""
        arm = f"{arm},{settings.format(warmup=max(1, self.long_epochs // 4))}"
        out = self.out / "fine_tuning"
        self.benchmark(
            arm, "label_efficiency.py", *self.common(), "--budgets", "8", "--seeds", "0", "--arms", arm, "--num_epochs",
            str(self.long_epochs), "--num_iterations_per_epoch", str(self.long_steps), "-o", str(out),
        )  # fmt: skip
        (summary,) = json.loads((out / "label_efficiency.json").read_text())["summary"]
        return {"dice": summary["mean"]}

    def page(self) -> str:
        """Writes what was found as Markdown."""
        stock = self.found.get("nnUNetTrainer", {})
        title = "What a GPU showed" if self.device == "cuda" else "In miniature on a CPU: it runs"
        lines = [f"# {title}", "", "| part | found |", "|---|---|"]
        for name, found in self.found.items():
            values = {key: value for key, value in found.items() if key != "seconds"}
            if stock and "epoch_seconds" in values:
                values["of_stock"] = round(values["epoch_seconds"] / stock["epoch_seconds"], 2)
            shown = ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in values.items())
            lines.append(f"| {name} | {shown or 'done'} ({found['seconds']} s) |")
        return "\n".join(lines) + "\n"


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("openkbp", help="folder with imagesTr, labelsTr and imagesUn")
    parser.add_argument("-o", default="gpu_check", help="results and nnU-Net's folders (default: %(default)s)")
    parser.add_argument("--miniature", action="store_true", help="on a CPU, two epochs of two steps of a small network")
    return parser.parse_args()


def main() -> int:
    """Does some parts; returns 1 if any failed or are left."""
    return Check(parse_arguments()).run()


if __name__ == "__main__":
    run_as_command(main)
