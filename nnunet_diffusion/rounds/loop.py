"""The loop: train on what is annotated, predict the pool, gate, train a fresh schedule on both, repeat."""

import math
import os
import shutil
from collections.abc import Callable, Iterator
from importlib.metadata import version
from time import time
from typing import Any

import torch
from batchgenerators.utilities.file_and_folder_operations import load_json
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from tqdm import tqdm

from nnunet_diffusion.commands import Step, Steps, command_environment
from nnunet_diffusion.errors import UserError
from nnunet_diffusion.files import atomic, write_json
from nnunet_diffusion.model_folder import first_existing, own_results
from nnunet_diffusion.rounds.constrained import NOTHING_ANNOTATED, ignore_uncertain, keep_labels
from nnunet_diffusion.rounds.gate import DROP, KEEP, Verdict, judge
from nnunet_diffusion.rounds.given_model import refuse_leak, refuse_missing, refuse_other_data
from nnunet_diffusion.rounds.prediction import Teacher, is_predicted, load_prediction, predict_case, read_evidence
from nnunet_diffusion.rounds.pseudo_labels import ENDING, ignoring, pseudo_cases, save_pseudo_label
from nnunet_diffusion.rounds.report import draw, to_draw, write_report
from nnunet_diffusion.rounds.run import CHECKPOINT, TRAINER, Run, remove_stale
from nnunet_diffusion.rounds.state import digest, record


class Rounds(Run):
    """A run, and what is done in it."""

    # ---------------------------------------------------------------- the first model

    def check_model(self) -> None:
        """Raises UserError unless the first model, which this run did not train, may teach."""
        folder, dataset_json = self.model(0), self.cases.dataset_json
        refuse_other_data(folder, self.plans, self.request.configuration, dataset_json)
        refuse_missing(self.checkpoints(0), folder)
        refuse_leak(folder, self.request.fold, self.cases.split()[1], dataset_json["file_ending"])

    def train_first(self, steps: Steps) -> bool:
        """Trains on what is annotated, unless there is such a model; returns whether there was anything to do."""
        entry = self.entry(0)
        if "checkpoints" in entry:
            return False
        self.refuse_unusable_start()
        if self.request.model or self.is_trained_elsewhere():
            self.check_model()
        else:
            plans, trainer = self.request.plans, self.request.trainer
            self.refuse_unfinished()
            epochs = self.plans.get("nnunet_diffusion", {}).get(trainer, {}).get("num_epochs", 1000)
            steps.run(self.training("training on annotated cases", 0, plans, trainer, epochs, [digest(self.plans)]))
        self.finish(entry, 0)
        return True

    def refuse_unusable_start(self) -> None:
        """Raises UserError if the rounds cannot start as they are to, before anything is trained."""
        if self.request.model and os.path.realpath(self.model(0)) == os.path.realpath(self.final_model()):
            raise UserError(f"--from {self.model(0)}: is where the outcome goes: copy it to another place first")
        if self.request.start == "previous" and self.folds(0) != [self.request.fold]:
            raise UserError("--start previous: an ensemble has no weights to go on from: take denoiser or scratch")
        settings = self.plans.get("nnunet_diffusion", {}).get(TRAINER, {})
        if self.request.start != "denoiser" or settings.get("scratch") or settings.get("start_from"):
            return
        plans, configuration = PlansManager(self.plans), self.request.configuration
        fold, pretraining = self.request.fold, "DenoisingDiffusionTrainer"
        own = own_results(plans, self.request.plans, configuration, fold, pretraining, "denoiser.pth")
        first_existing(
            [settings["denoiser"]] if settings.get("denoiser") else own,
            f"make one with\n  nnUNetv2_train {self.request.dataset} {configuration} all -tr {pretraining} "
            f"-p {self.request.plans}\nor let the rounds start elsewhere with --start scratch or --start previous, "
            "and the first model with -tr PartialLabelTrainer",
        )

    def is_trained_elsewhere(self) -> bool:
        """Whether the user has trained the first model already."""
        begun = "training on annotated cases" in self.state["steps"]
        return not begun and all(map(os.path.isfile, self.checkpoints(0)))

    def refuse_unfinished(self) -> None:
        """Raises UserError if there is a training in the place of the first one that this run did not begin."""
        folder = os.path.join(self.model(0), f"fold_{self.request.fold}")
        if "training on annotated cases" not in self.state["steps"] and os.path.isdir(folder):
            raise UserError(f"{folder}: holds a training that is not finished: finish it (--c), or remove it")

    def training(self, title: str, number: int | str, plans: str, trainer: str, epochs: int, depends_on: list) -> Step:
        """The command that trains one model."""
        request = self.request
        command = ["nnunet_diffusion", "train", request.dataset, request.configuration, request.fold]
        command += ["-tr", trainer, "-p", plans]
        folder = os.path.join(self.model(number), f"fold_{request.fold}")
        return Step(
            title, command, os.path.join(folder, CHECKPOINT), counts=r": Epoch \d+\s*$", total=epochs,
            depends_on=depends_on, resume_with=["--c"], replaces=folder,
            where=["-device", request.device, "-num_gpus", str(request.num_gpus)],
            environment={"nnUNet_n_proc_DA": "0"} if request.device == "cpu" else {},
        )  # fmt: skip

    def finish(self, entry: dict, number: int | str) -> None:
        """Records the checkpoints of a training and how well the model does on what it was validated on."""
        entry["checkpoints"] = {path: record(path) for path in self.checkpoints(number)}
        entry["agreement"] = self.agreement(number)
        report = os.path.join(self.model(number), f"fold_{self.request.fold}", "transfer_report.json")
        source = load_json(report)["source"] if os.path.isfile(report) else ""
        entry["denoiser"] = {source: record(source)} if os.path.isfile(source) else {}
        entry["versions"] = {name: version(name) for name in ("nnunetv2", "torch")}
        self.save()

    def agreement(self, number: int | str) -> float | None:
        """Mean validation Dice of a model; None where nothing is held out, or nothing was measured."""
        path = os.path.join(self.model(number), f"fold_{self.request.fold}", "validation", "summary.json")
        if self.request.fold == "all" or not os.path.isfile(path):
            return None
        dice = load_json(path)["foreground_mean"]["Dice"]
        return dice if isinstance(dice, float) and math.isfinite(dice) else None

    # ---------------------------------------------------------------- one round

    def begin(self, number: int) -> dict[str, Any]:
        """Fixes which cases a round predicts."""
        entry = self.entry(number)
        if "cases" not in entry:
            dropped = {case for case, verdict in self.verdicts(number - 1).items() if verdict.decision == DROP}
            entry["cases"] = sorted(set(self.cases.to_predict()) - dropped)
            entry["dropped"] = sorted(dropped | set(self.entry(number - 1).get("dropped", [])))
            entry["cases"] = [case for case in entry["cases"] if case not in entry["dropped"]]
            self.save()
        return entry

    def teacher(self, number: int) -> str:
        """A name for the weights that a round is predicted with."""
        return digest(sorted(file["sha256"] for file in self.entry(number - 1)["checkpoints"].values()))

    def predict(self, number: int, num_parts: int = 1, part_id: int = 0) -> bool:
        """Predicts what is not predicted yet of a round's cases, or of a part of them; returns whether that is any."""
        cases, identity, folder = self.cases.to_predict(), self.teacher(number), self.predicted(number)
        mine = self.entry(number)["cases"][part_id::num_parts]
        todo = [case for case in mine if case in cases and not is_predicted(folder, case, identity)]
        if not todo:
            return False
        folds, device = self.folds(number - 1), torch.device(self.request.device)
        teacher = Teacher(self.model(number - 1), folds, identity, device, self.request.mirroring)
        for case in tqdm(todo, f"round {number}: predicting ({len(mine) - len(todo)} there)"):
            predict_case(teacher, case, cases[case], folder, self.predicted(number - 1), self.cases.channels)
        return True

    def predict_part(self, rounds: int, num_parts: int, part_id: int) -> None:
        """Predicts a part of the pool for the round that is due; writes nothing but predictions.

        Raises:
            UserError: If no round waits for predictions.
        """
        due = [entry["round"] for entry in self.state["rounds"] if "cases" in entry and "verdicts" not in entry]
        if not due or due[0] > rounds:
            raise UserError(f"{self.state_file}: no round waits for predictions: run it with --stop_after train first")
        self.predict(due[0], num_parts, part_id)

    def gate(self, number: int) -> bool:
        """Judges the predictions of a round, saves what is kept, and reports, unless that is done; returns whether."""
        entry, folder = self.entry(number), self.round_folder(number)
        if "verdicts" in entry:
            return False
        cases, shown = self.cases.to_predict(), self.cases.anatomy()
        present = [case for case in entry["cases"] if case in cases]  # others were annotated meanwhile
        evidence, verdicts = {}, {}
        for case in present:
            annotation = cases[case].annotation
            lacking = self.cases.lacking(annotation or NOTHING_ANNOTATED)
            found = read_evidence(self.predicted(number), case)[0]
            evidence[case] = {organ: found[organ] for organ in lacking}
            waited = self.waited(case, number)
            verdicts[case] = judge(evidence[case], shown, self.request.gate, waited, annotation is not None)
        kept = [case for case, verdict in verdicts.items() if verdict.decision == KEEP]
        for case in tqdm(kept, f"round {number}: keeping"):
            self.keep(number, case, cases[case].annotation, verdicts[case])
        for case in set(pseudo_cases(folder)) - set(kept):
            os.remove(os.path.join(folder, case + ENDING))
        report = os.path.join(self.reports, f"round_{number}")
        write_report(report, f"{self.name}, round {number}", verdicts, evidence)
        draw(report, cases, to_draw(verdicts, evidence), self.predicted(number), self.cases.plans,
             self.cases.dataset_json["labels"])  # fmt: skip
        entry["verdicts"] = {case: list(verdict) for case, verdict in verdicts.items()}
        self.save()
        return True

    def keep(self, number: int, case: str, annotation, verdict: Verdict) -> None:
        """Saves the pseudo label of one case."""
        gate, manager = self.request.gate, ignoring(self.cases.label_manager)
        prediction = load_prediction(self.predicted(number), case)
        labels = torch.from_numpy(prediction.labels)
        if not gate.is_open:
            confidence = torch.from_numpy(prediction.confidence)
            labels = ignore_uncertain(labels, confidence, gate.voxel_confidence, manager.ignore_label)
        known = annotation or NOTHING_ANNOTATED
        labels, says = keep_labels(labels, set(verdict.organs), known, self.cases.channels)
        save_pseudo_label(
            self.round_folder(number), case, labels.numpy(), says, manager, self.cases.configuration.patch_size,
            annotation, {"round": number, "teacher": prediction.teacher},
        )  # fmt: skip

    def waited(self, case: str, number: int) -> int:
        """In how many rounds before, one after the other, a case was not kept."""
        count = 0
        for before in range(number - 1, 0, -1):
            verdict = self.verdicts(before).get(case)
            if verdict is None or verdict.decision == KEEP:
                break
            count += 1
        return count

    def train(self, number: int, steps: Steps) -> bool:
        """Trains a fresh schedule on annotated cases and on what was kept, unless that is done; returns whether."""
        entry = self.entry(number)
        if "checkpoints" in entry:
            return False
        if not pseudo_cases(self.round_folder(number)):
            raise UserError(
                f"round {number}: the gate kept nothing, see {self.reports}/round_{number}/report.md: train the first "
                "model better, or open the gate (--gate KEY=VALUE)"
            )
        pseudo = f"{self.name_for_plans()}/round_{number}"
        plans, epochs, settings = self.write_plans(number, pseudo, number - 1)
        annotated = {case: files["_seg.b2nd"]["sha256"] for case, files in self.state["cases"]["annotated"].items()}
        depends_on = [settings, annotated, entry["verdicts"], self.teacher(number)]
        title = f"round {number}: training"
        steps.run(self.training(title, number, plans, TRAINER, epochs, [digest(depends_on)]))
        self.finish(entry, number)
        return True

    def name_for_plans(self) -> str:
        """The run's name with a placeholder for the fold, since folds share their plans."""
        return f"{self.request.plans}__{self.request.configuration}__fold_{{fold}}"

    def write_plans(self, number: int | str, pseudo: str, teacher: int) -> tuple[str, int, dict]:
        """Writes the plan with the settings of a round's training; returns its name, the epochs and the settings."""
        block = dict(self.plans.get("nnunet_diffusion", {}))
        settings = {**block.get(TRAINER, {}), "pseudo_labels": pseudo}
        if self.request.start == "previous" or number == "finetune":
            settings["start_from"] = os.path.join(self.model(teacher), "fold_{fold}", CHECKPOINT)
            settings.pop("scratch", None)
        if self.request.start == "scratch" and number != "finetune":
            settings["scratch"] = True
        settings["plans_of_denoiser"] = self.request.plans
        name = self.round_plans(number)
        content = {**self.plans, "plans_name": name, "nnunet_diffusion": block | {TRAINER: settings}}
        write_json(os.path.join(self.base, name + ".json"), content)
        return name, settings.get("num_epochs", 1000), settings

    # ---------------------------------------------------------------- all of it

    def stages(self, rounds: int) -> Iterator[tuple[int, str, Callable[[], bool]]]:
        """(Round, what it is, what does it), in order, until the last round or until the agreement falls."""
        steps = self.steps(rounds)
        yield 0, "train", lambda: self.train_and_begin(0, rounds, steps)
        for number in range(1, rounds + 1):
            if (fallen := self.fallen()) is not None:
                print(f"round {fallen}: agreement with the held-out annotations fell: stopped", flush=True)
                break
            self.begin(number)
            yield number, "predict", lambda number=number: self.predict(number)
            yield number, "gate", lambda number=number: self.gate(number)
            yield number, "train", lambda number=number: self.train_and_begin(number, rounds, steps)
        self.publish(rounds, steps)

    def train_and_begin(self, number: int, rounds: int, steps: Steps) -> bool:
        """Trains, and fixes what the next round predicts, so that other machines can begin with it."""
        is_new = self.train(number, steps) if number else self.train_first(steps)
        if number < rounds and self.fallen() is None:
            self.begin(number + 1)
        return is_new

    def steps(self, rounds: int) -> Steps:
        """The runner of trainings, whose state is this run's."""
        inherited = () if self.lock is None else (self.lock,)
        environment = command_environment(None, self.request.device)
        total = rounds + 1 + self.request.finetune
        steps = Steps(self.reports, environment, total, self.state["steps"], self.save, inherited)
        steps.number = sum("checkpoints" in entry for entry in self.state["rounds"])
        return steps

    def run(self, rounds: int, stop_after: str = "") -> None:
        """Does all that is not done; ends after the first stage of a kind that had something to do, if asked to.

        Raises:
            UserError: If a stage fails.
        """
        if self.new_cases:
            print(f"new cases, which join the next round: {', '.join(self.new_cases)}", flush=True)
        self.save()
        remove_stale(self.folder)
        for number, kind, do in self.stages(rounds):
            start = time()
            if do():
                seconds = self.entry(number).setdefault("seconds", {})
                seconds[kind] = round(seconds.get(kind, 0) + time() - start, 2)
                self.save()
                if kind == stop_after:
                    return

    def fallen(self) -> int | None:
        """The first round whose model agrees less with what is held out than the best one before; None so far."""
        best = None
        for entry in self.state["rounds"]:
            agreement = entry.get("agreement")
            if agreement is None:
                continue
            if best is not None and agreement < best - self.request.tolerance:
                return entry["round"]
            best = agreement if best is None else max(best, agreement)
        return None

    def last_good(self, rounds: int) -> int:
        """The round whose model is the outcome."""
        trained = [entry["round"] for entry in self.state["rounds"] if "checkpoints" in entry]
        last = max(number for number in trained if number <= rounds)
        fallen = self.fallen()
        return last if fallen is None else min(last, fallen - 1)

    def publish(self, rounds: int, steps: Steps) -> None:
        """Puts the outcome where `nnUNetv2_predict` looks for it; the models of all rounds stay where they are."""
        number: int | str = self.last_good(rounds)
        source = self.entry(number)
        if self.request.finetune:
            plans, epochs, settings = self.write_plans("finetune", "", number)
            depends_on = [digest([settings, self.state["cases"]["annotated"], source["checkpoints"]])]
            steps.run(self.training("fine-tuning on annotated cases", "finetune", plans, TRAINER, epochs, depends_on))
            number = "finetune"
        for fold, checkpoint in zip(self.folds(number), self.checkpoints(number), strict=True):
            target, content = os.path.join(self.final_model(), f"fold_{fold}", CHECKPOINT), record(checkpoint)["sha256"]
            if not os.path.isfile(target) or record(target)["sha256"] != content:
                copy_fold(os.path.dirname(checkpoint), self.final_model(), fold)
        print(f"{self.final_model()}: the model of {'the fine-tuning' if number == 'finetune' else f'round {number}'}")


def copy_fold(source: str, model: str, fold: str) -> None:
    """Copies a trained fold into a model folder: it is there whole or not at all."""
    os.makedirs(model, exist_ok=True)
    for name in ("plans.json", "dataset.json", "dataset_fingerprint.json"):
        file = os.path.join(os.path.dirname(source), name)
        if os.path.isfile(file):
            with atomic(os.path.join(model, name)) as temporary:
                shutil.copyfile(file, temporary)
    target, temporary, old = (os.path.join(model, f"{prefix}fold_{fold}") for prefix in ("", ".tmp_", ".old_"))
    for folder in (temporary, old):
        shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(source, temporary)
    if os.path.isdir(target):
        os.rename(target, old)
    os.rename(temporary, target)
    shutil.rmtree(old, ignore_errors=True)
