"""The steps of mutual learning: partial-organ networks, completed cases, full-organ networks."""

import os
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from typing import Any

import torch
from nnunetv2.paths import nnUNet_preprocessed, nnUNet_results
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from nnunetv2.utilities.dataset_name_id_conversion import maybe_convert_to_dataset_name
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_diffusion.commands import Step, Steps, command_environment
from nnunet_diffusion.errors import UserError
from nnunet_diffusion.files import read_json
from nnunet_diffusion.locks import locked
from nnunet_diffusion.model_folder import own_results
from nnunet_diffusion.mutual.completion import (
    REPORT,
    complete_cases,
    completion_table,
    describe_cases,
    training_cases_of,
)
from nnunet_diffusion.mutual.dataset import completed_folder
from nnunet_diffusion.mutual.groups import find_groups
from nnunet_diffusion.partial.annotations import output_channels, read_annotations
from nnunet_diffusion.plans import read_plans
from nnunet_diffusion.preprocessing.cases import LABELED_FILES, fold_of
from nnunet_diffusion.rounds.gate import GateSettings
from nnunet_diffusion.rounds.prediction import Teacher
from nnunet_diffusion.rounds.pseudo_labels import ENDING, pseudo_cases
from nnunet_diffusion.rounds.state import (
    FORMAT,
    digest,
    load_state,
    record,
    refuse_changed_cases,
    refuse_changes,
    save_state,
)
from nnunet_diffusion.settings import BLOCK

STAGES = ("MutualDifferenceTrainer", "MutualSimilarityTrainer")


class MutualLearning:
    """Both stages on one fold, with logs and the state in a results folder of their own."""

    def __init__(self, dataset: str, configuration: str, fold: str, plans: str, device: str, gate: list[str],
                 num_gpus: int = 1):  # fmt: skip
        """Checks what was asked for.

        Args:
            dataset: Id or name.
            configuration: Of the plan.
            fold: A number, or all.
            plans: Name of the plan.
            device: cpu or cuda.
            gate: Settings of the gate, as KEY=VALUE.
            num_gpus: Of each training.

        Raises:
            UserError: If there is no such data set, plan, configuration or fold, or mutual learning is not for it.
        """
        try:
            self.dataset = maybe_convert_to_dataset_name(dataset)
        except (RuntimeError, ValueError) as error:
            raise UserError(f"-d {dataset}: {error}") from error
        self.configuration, self.fold, self.plans, self.device = configuration, fold, plans, device
        self.num_gpus = num_gpus
        self.gate = GateSettings.from_pairs(gate)
        self.base = os.path.join(nnUNet_preprocessed, self.dataset)
        if not (fold.isdigit() or fold == "all"):
            raise UserError(f"-f {fold}: give the number of a fold, or all")
        self.content = read_plans(self.base, plans, configuration)
        self.dataset_json = read_json(os.path.join(self.base, "dataset.json"))
        self.refuse_cascade_and_regions()
        identifier = PlansManager(self.content).get_configuration(configuration).data_identifier
        self.labeled = os.path.join(self.base, identifier)
        self.completed_folder = completed_folder(self.base, identifier, plans, configuration, fold)
        self.cases = training_cases_of(self.base, identifier, fold)
        self.folder = os.path.join(nnUNet_results, self.dataset, f"mutual__{plans}__{configuration}", f"fold_{fold}")
        self.state_file = os.path.join(self.folder, "state.json")

    def refuse_cascade_and_regions(self) -> None:
        """Raises UserError for what both trainers refuse, before anything is trained."""
        manager = PlansManager(self.content)
        if manager.get_configuration(self.configuration).previous_stage_name is not None:
            raise UserError(f"-c {self.configuration}: a cascade's second stage has no mutual learning: take the first")
        labels = manager.get_label_manager(self.dataset_json)
        if labels.has_regions:
            raise UserError(
                f"{self.base}/dataset.json: its labels are regions, which overlap: mutual learning is between labels "
                "that do not: train PartialLabelTrainer"
            )
        self.channels = output_channels(labels)

    def run(self) -> None:
        """Does what is not finished.

        Raises:
            UserError: If the cases make no groups, a step fails, a finished step was made from something else, or
                another command works on this run.
        """
        self.read_annotations()
        with locked(os.path.join(self.folder, "lock"), f"the run in {self.folder}") as lock:
            self.open_state(lock)
            self.train(STAGES[0])
            self.complete()
            self.train(STAGES[1])

    def read_annotations(self) -> None:
        """Reads what was annotated in every preprocessed case; raises UserError if that makes no groups."""
        names = infer_dataset_class(self.labeled).get_identifiers(self.labeled)
        if lacking := [case for case in self.cases if case not in names]:
            raise UserError(
                f"{self.labeled}: {len(lacking)} training case(s) of fold {self.fold}, such as {lacking[0]}, are not "
                "there: run nnunet_diffusion plan_and_preprocess, or correct splits_final.json"
            )
        self.annotations = read_annotations(self.dataset_json, names, self.channels)
        groups = self.settings(STAGES[0]).get("groups", [])
        find_groups({case: self.annotations[case] for case in self.cases}, self.channels, groups)

    # ---------------------------------------------------------------- state

    def open_state(self, lock: int) -> None:
        """Reads what is finished, and the files that were read before, of which only changed ones are read again."""
        self.state = load_state(self.state_file) or {"format": FORMAT, "steps": {}, "versions": {}, "files": {}}
        environment = command_environment(None, self.device)
        self.steps = Steps(self.folder, environment, 3, self.state["steps"], self.save, (lock,))

    def save(self) -> None:
        """Writes the state."""
        save_state(self.state_file, self.state)

    def sha256(self, path: str) -> str:
        """What is in a file."""
        files = self.state["files"]
        files[path] = record(path, files.get(path))
        return files[path]["sha256"]

    def annotated(self, cases: Iterable[str]) -> dict[str, dict[str, dict]]:
        """Preprocessed cases by content: {case: {file ending, or dataset.json for what it says of the case: hash}}."""
        found = self.contents(self.labeled, cases, LABELED_FILES)
        for case, files in found.items():
            files["dataset.json"] = {"sha256": digest([sorted(self.annotations[case].labels)])}
        return found

    def contents(self, folder: str, cases: Iterable[str], endings: Sequence[str]) -> dict[str, dict[str, dict]]:
        """The files of some cases by content: {case: {file ending: hash}}."""
        return {
            case: {ending: {"sha256": self.sha256(os.path.join(folder, case + ending))} for ending in endings}
            for case in cases
        }

    def validation(self) -> list[str]:
        """The preprocessed cases that the fold is validated on."""
        if self.fold == "all":
            return []
        _, validation = fold_of(os.path.join(self.base, "splits_final.json"), self.fold)
        return sorted(set(validation) & set(self.annotations))

    def what_decides(self, trainer: str) -> dict[str, Any]:
        """What the outcome of a training depends on: the inputs by value, as far as that helps, cases by content."""
        settings, validation = self.settings(trainer), self.validation()
        completed = pseudo_cases(self.completed_folder) if trainer == STAGES[1] else []
        inputs = {
            "nnunet_diffusion": version("nnunet_diffusion"),
            **self.plan(),
            "labels": self.dataset_json["labels"],
            "settings": settings,
            "denoiser": self.denoiser(settings),
            "numbers of training and validation cases": [len(self.cases), len(validation)],
        }
        return {
            "inputs": inputs,
            "training": self.annotated(self.cases),
            "validation": self.annotated(validation),
            "completed": self.contents(self.completed_folder, completed, [ENDING]),
        }

    def settings(self, trainer: str) -> dict[str, Any]:
        """Those that the plan gives for a trainer."""
        return self.content.get(BLOCK, {}).get(trainer, {})

    def plan(self) -> dict[str, Any]:
        """The plan without other configurations and without settings."""
        general = {key: value for key, value in self.content.items() if key not in ("configurations", BLOCK)}
        return general | PlansManager(self.content).get_configuration(self.configuration).configuration

    def denoiser(self, settings: dict[str, Any]) -> dict[str, str]:
        """The denoiser that a training starts from, by content; none from random weights, as by default."""
        if settings.get("scratch", True):
            return {}
        manager, pretraining = PlansManager(self.content), "DenoisingDiffusionTrainer"
        own = own_results(manager, self.plans, self.configuration, self.fold, pretraining, "denoiser.pth")
        candidates = [settings["denoiser"]] if settings.get("denoiser") else own
        return {path: self.sha256(path) for path in list(filter(os.path.isfile, candidates))[:1]}

    def refuse_other_inputs(self, step: Step) -> None:
        """Raises UserError, naming what has changed, if a training was finished with something else."""
        if step.title not in self.state["steps"] or not os.path.isfile(step.output):
            return
        (_, known), (_, now) = self.state["steps"][step.title]["identity"], step.identity
        for kind, moved in (("training", ()), ("validation", now["training"]), ("completed", ())):
            refuse_changed_cases(step.output, kind, known[kind], now[kind], moved)
        refuse_changes(step.output, known["inputs"], now["inputs"])

    # ---------------------------------------------------------------- steps

    def output_folder(self, trainer: str) -> str:
        """The model folder of a trainer."""
        return os.path.join(nnUNet_results, self.dataset, f"{trainer}__{self.plans}__{self.configuration}")

    def final(self, trainer: str) -> str:
        """The checkpoint that a trainer ends with."""
        return os.path.join(self.output_folder(trainer), f"fold_{self.fold}", "checkpoint_final.pth")

    def train(self, trainer: str) -> None:
        """Trains one stage unless it is finished."""
        choice = [self.dataset, self.configuration, self.fold, "-tr", trainer, "-p", self.plans]
        step = Step(
            f"train {trainer}",
            ["nnunet_diffusion", "train", *choice],
            self.final(trainer),
            where=["-device", self.device, "-num_gpus", str(self.num_gpus)],
            counts=r"Epoch time: ",
            depends_on=self.what_decides(trainer),
            resume_with=["--c"],
        )
        self.refuse_other_inputs(step)
        self.steps.keep_finished(step)
        if not os.path.isfile(step.output):
            self.state["versions"][trainer] = {name: version(name) for name in ("nnunetv2", "torch")}
        self.save()
        self.steps.run(step)

    def complete(self) -> None:
        """Completes the training cases with the networks of stage 1, unless they are.

        Raises:
            UserError: If stage 2 has been trained on labels that were completed otherwise.
        """
        self.steps.number += 1
        heading = f"[{self.steps.number}/{self.steps.total}] complete the training cases"
        now = {"teacher": self.sha256(self.final(STAGES[0])), "gate": self.gate.as_dict()}
        path = os.path.join(self.completed_folder, REPORT)
        report = read_json(path) if os.path.isfile(path) else {}
        known = {key: report[key] for key in now if key in report}
        if known == now and set(self.cases) <= set(pseudo_cases(self.completed_folder)):
            print(f"{heading}: done before", flush=True)
            return
        if os.path.isfile(self.final(STAGES[1])):
            refuse_changes(self.final(STAGES[1]), known, now)
        print(heading, flush=True)
        device = torch.device(self.device)
        teacher = Teacher(self.output_folder(STAGES[0]), [self.fold], now["teacher"], device)
        cases = describe_cases(self.base, teacher, self.cases)
        report = complete_cases(teacher, cases, self.completed_folder, self.gate)
        print(completion_table(report, cases, self.channels), flush=True)
