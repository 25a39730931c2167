"""The loop: train on what is annotated, predict the pool, gate, train a fresh schedule on both, repeat."""

import math
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from time import time
from typing import Any

import torch
from batchgenerators.utilities.file_and_folder_operations import load_json
from nnunetv2.paths import nnUNet_preprocessed, nnUNet_results
from tqdm import tqdm

from nnunet_diffusion.data.completion import NOTHING_ANNOTATED, ignore_uncertain, keep_labels
from nnunet_diffusion.data.pseudo import ENDING, ignoring, pseudo_cases, pseudo_folder, save_pseudo_label
from nnunet_diffusion.errors import UserError
from nnunet_diffusion.files import atomic, write_json
from nnunet_diffusion.rounds.cases import Cases
from nnunet_diffusion.rounds.gate import DROP, KEEP, GateSettings, Verdict, judge
from nnunet_diffusion.rounds.prediction import Teacher, is_predicted, load_prediction, predict_case, read_evidence
from nnunet_diffusion.rounds.report import draw, to_draw, write_report
from nnunet_diffusion.rounds.state import (
    FORMAT,
    digest,
    load_state,
    record,
    refuse_changed_cases,
    refuse_changes,
    save_state,
)
from nnunet_diffusion.steps import Step, Steps, command_environment

TRAINER = "PseudoLabelTrainer"
CHECKPOINT = "checkpoint_final.pth"
STARTS = ("denoiser", "previous", "scratch")


@dataclass(frozen=True)
class Request:
    """What is asked for; see the command's help."""

    dataset: str  # DatasetXXX_Name
    configuration: str
    fold: str
    plans: str = "nnUNetPlans"
    trainer: str = "DiffusionPretrainedTrainer"
    model: str = ""  # a model folder in the place of a first training
    start: str = "denoiser"
    finetune: bool = False
    gate: GateSettings = GateSettings()
    tolerance: float = 0.01  # of the agreement: by how much it may be below the best so far
    device: str = "cuda"
    num_gpus: int = 1


class Rounds:
    """One run: a data set, plan, configuration and fold."""

    def __init__(self, request: Request, lock: int | None = None):
        """Finds the folders, and what was done before.

        Args:
            request: What is asked for.
            lock: The open file of the run's lock, which trainings inherit.

        Raises:
            UserError: If the data, the plan, the settings or the state are not what the run can go on with.
        """
        self.request = request
        self.base = os.path.join(nnUNet_preprocessed, request.dataset)
        self.results = os.path.join(nnUNet_results, request.dataset)
        plans_file = os.path.join(self.base, request.plans + ".json")
        if not os.path.isfile(plans_file):
            raise UserError(f"{plans_file}: no such plan: run nnunet_diffusion plan_and_preprocess first")
        self.plans = load_json(plans_file)
        self.cases = Cases(self.base, self.plans, request.configuration, request.fold)
        self.name = f"{request.plans}__{request.configuration}__fold_{request.fold}"
        self.identifier = self.cases.configuration.data_identifier
        self.folder = pseudo_folder(self.base, self.identifier, self.name)
        self.reports = os.path.join(
            self.results, f"rounds__{request.plans}__{request.configuration}", f"fold_{request.fold}"
        )
        self.state_file = os.path.join(self.folder, "state.json")
        self.state = self.open_state()
        self.lock = lock

    # ---------------------------------------------------------------- state

    def open_state(self) -> dict[str, Any]:
        """The state as it was left, or a new one; refuses to mix what changed."""
        known = load_state(self.state_file)
        request = self.request
        inputs = {
            "nnunet_diffusion": version("nnunet_diffusion"),
            "trainer": request.trainer,
            "model": os.path.abspath(request.model) if request.model else "",
            "start": request.start,
            "finetune": request.finetune,
            "gate": request.gate.as_dict(),
            "plan": digest(self.plans),
            "labels": self.cases.dataset_json["labels"],
            "validation": sorted(self.validation()),
        }
        if known is None:
            state = {"format": FORMAT, "inputs": inputs, "cases": {}, "rounds": [], "steps": {}}
        else:
            inputs["validation"] = inputs["validation"] or known["inputs"]["validation"]
            known["inputs"]["validation"] = known["inputs"]["validation"] or inputs["validation"]
            refuse_changes(self.state_file, known["inputs"], inputs)
            state = known
        records, moved = self.cases.records(state["cases"]), set(self.cases.annotations)
        for kind, may_move in (("annotated", ()), ("pool", moved)):
            refuse_changed_cases(self.state_file, kind, state["cases"].get(kind, {}), records[kind], may_move)
        self.new_cases = sorted(
            case for kind in records for case in set(records[kind]) - set(state["cases"].get(kind, {})) if known
        )
        state["cases"] = records
        for entry in state["rounds"]:
            self.refuse_other_checkpoint(entry)
        return state

    def validation(self) -> list[str]:
        """The cases that this fold is validated on; none as long as there are no splits."""
        if not os.path.isfile(os.path.join(self.base, "splits_final.json")):
            return []
        return self.cases.split()[1]

    def refuse_other_checkpoint(self, entry: dict) -> None:
        """Raises UserError if the checkpoint of a finished training is not there or was replaced."""
        for path, known in entry.get("checkpoints", {}).items():
            if not os.path.isfile(path) or record(path, known)["sha256"] != known["sha256"]:
                raise UserError(
                    f"{path}: is not the checkpoint that round {entry['round']} ended with: restore it, or remove the "
                    f"folder {self.folder} to start anew"
                )

    def save(self) -> None:
        """Writes the state."""
        os.makedirs(self.folder, exist_ok=True)
        save_state(self.state_file, self.state)

    def entry(self, number: int) -> dict[str, Any]:
        """What is known of a round; 0 is the first training."""
        while len(self.state["rounds"]) <= number:
            self.state["rounds"].append({"round": len(self.state["rounds"])})
        return self.state["rounds"][number]

    # ---------------------------------------------------------------- names

    def round_folder(self, number: int) -> str:
        """The pseudo labels of a round."""
        return os.path.join(self.folder, f"round_{number}")

    def predicted(self, number: int) -> str:
        """The predictions of a round."""
        return os.path.join(self.round_folder(number), "predicted")

    def round_plans(self, number: int | str) -> str:
        """The name of the plans with a round's settings."""
        return f"{self.request.plans}_round{number}"

    def model(self, number: int | str) -> str:
        """The model folder of a round."""
        if number == 0:
            trained = f"{self.request.trainer}__{self.request.plans}__{self.request.configuration}"
            return os.path.abspath(self.request.model) if self.request.model else os.path.join(self.results, trained)
        return os.path.join(self.results, f"{TRAINER}__{self.round_plans(number)}__{self.request.configuration}")

    def final_model(self) -> str:
        """Where `nnUNetv2_predict -tr PseudoLabelTrainer -p PLANS` looks."""
        return os.path.join(self.results, f"{TRAINER}__{self.request.plans}__{self.request.configuration}")

    def folds(self, number: int | str) -> list[str]:
        """The folds that teach: of a given model all, if nothing is validated on; else this run's own."""
        if number == 0 and self.request.model and self.request.fold == "all":
            folder = self.model(0)
            return sorted(name[5:] for name in os.listdir(folder)
                          if os.path.isfile(os.path.join(folder, name, CHECKPOINT)))  # fmt: skip
        return [self.request.fold]

    def checkpoints(self, number: int | str) -> list[str]:
        """The checkpoints of a round's model."""
        return [os.path.join(self.model(number), f"fold_{fold}", CHECKPOINT) for fold in self.folds(number)]

    # ---------------------------------------------------------------- the first model

    def check_given_model(self) -> None:
        """Raises UserError unless the given model is of this data set and plan, and saw no validation case."""
        folder = self.request.model
        files = [os.path.join(folder, name) for name in ("plans.json", "dataset.json")]
        if missing := [file for file in files if not os.path.isfile(file)]:
            raise UserError(f"--from {folder}: is no model folder, it has no {missing[0]}")
        plans, dataset_json = map(load_json, files)
        configuration = plans.get("configurations", {}).get(self.request.configuration, {})
        mine = self.plans["configurations"][self.request.configuration]
        pairs = {"labels": (dataset_json.get("labels"), self.cases.dataset_json["labels"])}
        pairs["channel_names"] = dataset_json.get("channel_names"), self.cases.dataset_json["channel_names"]
        keys = ("spacing", "patch_size", "normalization_schemes", "architecture")
        pairs |= {key: (configuration.get(key), mine.get(key)) for key in keys}
        intensities = "foreground_intensity_properties_per_channel"
        pairs[intensities] = plans.get(intensities), self.plans[intensities]
        if wrong := [key for key, (theirs, ours) in pairs.items() if theirs != ours]:
            raise UserError(
                f"--from {folder}: is a model of another data set or plan, {', '.join(wrong)} differ from those of "
                f"{self.request.dataset}, {self.request.plans}"
            )
        if missing := [path for path in self.checkpoints(0) if not os.path.isfile(path)] or not self.checkpoints(0):
            raise UserError(f"--from {folder}: has no {CHECKPOINT} of fold {self.request.fold} ({missing})")
        self.refuse_leak()

    def refuse_leak(self) -> None:
        """Raises UserError unless the given model was validated on all that this fold is validated on."""
        unseen = self.cases.split()[1]
        if not unseen:
            return
        ending = self.cases.dataset_json["file_ending"]
        folder = os.path.join(self.request.model, f"fold_{self.request.fold}", "validation")
        files = os.listdir(folder) if os.path.isdir(folder) else []
        if seen := sorted(set(unseen) - {name.removesuffix(ending) for name in files}):
            raise UserError(
                f"--from {self.request.model}: fold {self.request.fold} was not validated on {', '.join(seen)} and may "
                "have learned from them: take a model with the same splits, whose validation folder is there"
            )

    def train_first(self, steps: Steps) -> None:
        """Trains on what is annotated, unless there is such a model."""
        entry = self.entry(0)
        if self.request.model and "checkpoints" not in entry:
            self.check_given_model()
        elif "checkpoints" not in entry and not self.is_trained_elsewhere():
            plans, trainer = self.request.plans, self.request.trainer
            self.refuse_unfinished()
            epochs = self.plans.get("nnunet_diffusion", {}).get(trainer, {}).get("num_epochs", 1000)
            steps.run(self.training("training on annotated cases", 0, plans, trainer, epochs, [digest(self.plans)]))
        self.finish(entry, 0)

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
        command += ["-tr", trainer, "-p", plans, "-device", request.device, "-num_gpus", str(request.num_gpus)]
        folder = os.path.join(self.model(number), f"fold_{request.fold}")
        return Step(
            title, command, os.path.join(folder, CHECKPOINT), counts=r": Epoch \d+\s*$", total=epochs,
            depends_on=depends_on, resume_with=["--c"], replaces=folder,
            environment={"nnUNet_n_proc_DA": "0"} if request.device == "cpu" else {},
        )  # fmt: skip

    def finish(self, entry: dict, number: int | str) -> None:
        """Records the checkpoints of a training and how well the model does on what it was validated on."""
        if "checkpoints" in entry:
            return
        entry["checkpoints"] = {path: record(path) for path in self.checkpoints(number)}
        entry["agreement"] = self.agreement(number)
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

    def predict(self, number: int, num_parts: int = 1, part_id: int = 0) -> None:
        """Predicts the cases of a round, or a part of them, that are not predicted yet."""
        cases, identity, folder = self.cases.to_predict(), self.teacher(number), self.predicted(number)
        mine = self.entry(number)["cases"][part_id::num_parts]
        todo = [case for case in mine if case in cases and not is_predicted(folder, case, identity)]
        if not todo:
            return
        teacher = Teacher(self.model(number - 1), self.folds(number - 1), identity, torch.device(self.request.device))
        for case in tqdm(todo, f"round {number}: predicting ({len(mine) - len(todo)} there)"):
            predict_case(teacher, case, cases[case], folder, self.predicted(number - 1), self.cases.channels)

    def predict_part(self, rounds: int, num_parts: int, part_id: int) -> None:
        """Predicts a part of the pool for the round that is due; writes nothing but predictions.

        Raises:
            UserError: If no round waits for predictions.
        """
        due = [entry["round"] for entry in self.state["rounds"] if "cases" in entry and "verdicts" not in entry]
        if not due or due[0] > rounds:
            raise UserError(f"{self.state_file}: no round waits for predictions: run it with --stop_after train first")
        self.predict(due[0], num_parts, part_id)

    def gate(self, number: int) -> None:
        """Judges the predictions of a round, saves the pseudo labels that are kept, and reports."""
        entry, folder = self.entry(number), self.round_folder(number)
        if "verdicts" in entry:
            return
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

    def verdicts(self, number: int) -> dict[str, Verdict]:
        """The verdicts of a round."""
        return {case: Verdict(*verdict) for case, verdict in self.entry(number).get("verdicts", {}).items()}

    def waited(self, case: str, number: int) -> int:
        """In how many rounds before, one after the other, a case was not kept."""
        count = 0
        for before in range(number - 1, 0, -1):
            verdict = self.verdicts(before).get(case)
            if verdict is None or verdict.decision == KEEP:
                break
            count += 1
        return count

    def train(self, number: int, steps: Steps) -> None:
        """Trains a fresh schedule on annotated cases and on what the gate kept."""
        entry = self.entry(number)
        if "checkpoints" in entry:
            return
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

    def name_for_plans(self) -> str:
        """The run's name with a placeholder for the fold, since folds share their plans."""
        return f"{self.request.plans}__{self.request.configuration}__fold_{{fold}}"

    def write_plans(self, number: int | str, pseudo: str, teacher: int) -> tuple[str, int, dict]:
        """Writes the plan with the settings of a round's training; returns its name, the epochs and the settings."""
        block = dict(self.plans.get("nnunet_diffusion", {}))
        settings = {**block.get(TRAINER, {}), "pseudo_labels": pseudo}
        if self.request.start == "previous" or number == "finetune":
            settings["start_from"] = os.path.join(self.model(teacher), "fold_{fold}", CHECKPOINT)
        if self.request.start == "scratch" and number != "finetune":
            settings["scratch"] = True
        name = self.round_plans(number)
        content = {**self.plans, "plans_name": name, "nnunet_diffusion": block | {TRAINER: settings}}
        write_json(os.path.join(self.base, name + ".json"), content)
        return name, settings.get("num_epochs", 1000), settings

    # ---------------------------------------------------------------- all of it

    def stages(self, rounds: int) -> Iterator[tuple[str, Any]]:
        """(What it is, what does it), in order, until the last round or until the agreement falls."""
        steps = self.steps(rounds)
        yield "train", lambda: self.train_and_begin(0, rounds, steps)
        for number in range(1, rounds + 1):
            if (fallen := self.fallen()) is not None:
                print(f"round {fallen}: agreement with the held-out annotations fell: stopped", flush=True)
                break
            self.begin(number)
            yield "predict", lambda number=number: self.predict(number)
            yield "gate", lambda number=number: self.gate(number)
            yield "train", lambda number=number: self.train_and_begin(number, rounds, steps)
        yield "publish", lambda: self.publish(rounds, steps)

    def train_and_begin(self, number: int, rounds: int, steps: Steps) -> None:
        """Trains, and fixes what the next round predicts, so that other machines can begin with it."""
        self.train(number, steps) if number else self.train_first(steps)
        if number < rounds and self.fallen() is None:
            self.begin(number + 1)

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
        for kind, do in self.stages(rounds):
            before, start = digest(self.state), time()
            do()
            if kind == stop_after and (digest(self.state) != before or time() - start > 1):
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

    # ---------------------------------------------------------------- looking only

    def table(self, rounds: int) -> str:
        """What is done, a line for each round."""
        lines = ["round  predicted  kept  waiting  dropped  trained  agreement"]
        for number in range(rounds + 1):
            entry = self.state["rounds"][number] if number < len(self.state["rounds"]) else {}
            decisions = [verdict[0] for verdict in entry.get("verdicts", {}).values()]
            cases = entry.get("cases", [])
            there = sum(os.path.isfile(os.path.join(self.predicted(number), case + ".b2nd")) for case in cases)
            counts = [decisions.count(kind) if decisions else "-" for kind in ("keep", "wait", "drop")]
            agreement = entry.get("agreement")
            cells = [number, f"{there}/{len(cases)}" if cases else "-", *counts]
            cells += ["yes" if "checkpoints" in entry else "no", "-" if agreement is None else f"{agreement:.3f}"]
            lines.append(
                "  ".join(str(cell).rjust(width) for cell, width in zip(cells, (5, 9, 4, 7, 7, 7, 9), strict=True))
            )
        return "\n".join(lines)

    def plan_of_work(self, rounds: int) -> str:
        """What would be done, with the numbers of cases as they are now."""
        trained = [entry["round"] for entry in self.state["rounds"] if "checkpoints" in entry]
        annotated = len(self.state["cases"]["annotated"])
        first = self.request.model or self.request.trainer
        lines = [f"round 0: {first} on {annotated} annotated cases, less those validated on"]
        lines += [
            f"round {number}: predict {len(self.state['cases']['pool'])} scans of the pool, gate, train {TRAINER}"
            for number in range(1, rounds + 1)
        ]
        lines = [line + (" (done)" if number in trained else "") for number, line in enumerate(lines)]
        return "\n".join([*lines, f"then: {self.final_model()}"])


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
