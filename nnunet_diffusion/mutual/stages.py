"""The stages of mutual learning: partial-organ networks, completed cases, full-organ networks."""

import os
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from typing import Any

from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_diffusion.commands import Step, Steps, command_environment
from nnunet_diffusion.errors import UserError
from nnunet_diffusion.files import read_json
from nnunet_diffusion.locks import locked
from nnunet_diffusion.mutual.completion import (
    Report,
    Setup,
    complete_cases,
    completion_table,
    describe_cases,
    read_report,
    training_cases_of,
)
from nnunet_diffusion.mutual.dataset import completed_folder
from nnunet_diffusion.mutual.groups import find_groups
from nnunet_diffusion.partial.annotations import output_channels, read_annotations
from nnunet_diffusion.plans import read_plans
from nnunet_diffusion.preprocessing.cases import LABELED_FILES, fold_of
from nnunet_diffusion.pretraining.start import SCRATCH, find_start
from nnunet_diffusion.records import digest, made_from, refuse_other, size_and_time
from nnunet_diffusion.rounds.cases import COPY
from nnunet_diffusion.rounds.places import Request
from nnunet_diffusion.rounds.pseudo_labels import ENDING, pseudo_cases
from nnunet_diffusion.rounds.state import State, load_state
from nnunet_diffusion.rounds.teacher import CHECKPOINT, Model
from nnunet_diffusion.schemas import Dataset
from nnunet_diffusion.settings import BLOCK

STAGES = ("MutualDifferenceTrainer", "MutualSimilarityTrainer")


class MutualLearning:
    """Both stages on one fold, with logs and the state in a results folder of their own."""

    def __init__(self, request: Request):
        """Checks what was asked for.

        Args:
            request: The data set, plan, configuration, fold, device and gate; the rest is of rounds.

        Raises:
            UserError: If there is no such data set, plan, configuration or fold, or mutual learning is not for it.
        """
        self.request, self.base, self.fold = request, request.base, request.fold
        plans, configuration = request.plans, request.configuration
        self.content = read_plans(self.base, plans, configuration)
        self.dataset_json = read_json(os.path.join(self.base, "dataset.json"), Dataset, COPY)
        self.plans = PlansManager(self.content)
        self.configuration = self.plans.get_configuration(configuration)
        label_manager = self.plans.get_label_manager(self.dataset_json)
        self.refuse_cascade_and_regions(label_manager)
        self.channels = output_channels(label_manager)
        identifier = self.configuration.data_identifier
        self.labeled = os.path.join(self.base, identifier)
        self.completed_folder = completed_folder(self.base, identifier, plans, configuration, self.fold)
        self.cases = training_cases_of(self.base, identifier, self.fold)
        self.folder = os.path.join(request.results, f"mutual__{plans}__{configuration}", f"fold_{self.fold}")

    def refuse_cascade_and_regions(self, label_manager: LabelManager) -> None:
        """Raises UserError for what both trainers refuse, before anything is trained."""
        if self.configuration.previous_stage_name is not None:
            raise UserError(
                f"-c {self.request.configuration}: a cascade's second stage has no mutual learning: take the first"
            )
        if label_manager.has_regions:
            raise UserError(
                f"{self.base}/dataset.json: its labels are regions, which overlap: mutual learning is between labels "
                "that do not: train PartialLabelTrainer"
            )

    def run(self) -> None:
        """Does what is not finished.

        Raises:
            UserError: If the cases make no groups, a stage fails, a finished one was made from something else, or
                another command works on this run.
        """
        self.read_annotations()
        with locked(os.path.join(self.folder, "lock"), f"the run in {self.folder}") as lock:
            file = os.path.join(self.folder, "state.json")
            self.state = load_state(file) or State(made_from({}))
            environment = command_environment(None, self.request.device)
            steps = Steps(self.folder, environment, 3, self.state.steps, lambda: self.state.save(file), (lock,))
            steps.run_all(self.stages())

    def stages(self) -> Iterator[Step]:
        """Yields all that is to be done, in order."""
        yield self.training(STAGES[0])
        yield Step("complete the training cases", do=self.complete, is_done=self.is_completed)
        yield self.training(STAGES[1])

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

    # ---------------------------------------------------------------- trainings

    def final(self, trainer: str) -> str:
        """Returns the checkpoint that a trainer ends with."""
        return os.path.join(self.request.model_folder(trainer), f"fold_{self.fold}", CHECKPOINT)

    def training(self, trainer: str) -> Step:
        """Trains one stage; a finished one is never trained anew."""
        request, settings = self.request, self.settings(trainer)
        choice = [request.dataset, request.configuration, request.fold, "-tr", trainer, "-p", request.plans]
        splits = os.path.join(self.base, "splits_final.json")
        validation = [] if self.fold == "all" else fold_of(splits, self.fold)[1]
        completed = pseudo_cases(self.completed_folder) if trainer == STAGES[1] else []
        return Step(
            f"train {trainer}",
            ["nnunet_diffusion", "train", *choice],
            self.final(trainer),
            where=["-device", request.device, "-num_gpus", str(request.num_gpus)],
            counts=r"Epoch time: ",
            depends_on={
                "nnunet_diffusion": version("nnunet_diffusion"),
                **self.plan(),
                "labels": self.dataset_json["labels"],
                "settings": settings,
                "denoiser": self.denoiser(settings),
            },
            cases={
                "training": self.recorded(self.cases),
                "validation": self.recorded(sorted(set(validation) & set(self.annotations))),
                "completed": {case: size_and_time(self.completed_folder, case, [ENDING]) for case in completed},
            },
            resume_with=["--c"],
            is_kept=True,
        )

    def recorded(self, cases: Sequence[str]) -> dict[str, str]:
        """Records preprocessed cases by the size and time of their files, and what dataset.json says of them."""
        return {
            case: f"{size_and_time(self.labeled, case, LABELED_FILES)} {digest(sorted(self.annotations[case].labels))}"
            for case in cases
        }

    def settings(self, trainer: str) -> dict[str, Any]:
        """Returns those that the plan gives for a trainer."""
        return self.request.settings_of(self.content, trainer)

    def plan(self) -> dict[str, Any]:
        """Returns the plan without other configurations and without settings."""
        general = {key: value for key, value in self.content.items() if key not in ("configurations", BLOCK)}
        return general | self.configuration.configuration

    def denoiser(self, settings: dict[str, Any]) -> dict[str, str]:
        """Returns the denoiser that a training starts from, by content; none from random weights, as by default."""
        if (start := settings.get("start", SCRATCH)) == SCRATCH:
            return {}
        path = find_start(start, self.plans, self.request.configuration, self.fold)
        return {path: self.state.sha256(path)}

    # ---------------------------------------------------------------- completion

    def completed_from(self) -> dict[str, Any]:
        """Says what the completed labels are made from."""
        return made_from({"teacher": self.state.sha256(self.final(STAGES[0])), "gate": self.request.gate.as_dict()})

    def is_completed(self) -> bool:
        """Says whether the training cases are completed.

        Raises:
            UserError: If stage 2 has been trained on labels that were completed otherwise.
        """
        report: Report | None = read_report(self.completed_folder)
        known, now = report and report["made_from"], self.completed_from()
        if known == now and set(self.cases) <= set(pseudo_cases(self.completed_folder)):
            return True
        final = self.final(STAGES[1])
        if os.path.isfile(final):
            refuse_other(final, known or made_from({}), now, f"remove the folder {os.path.dirname(final)}")
        return False

    def complete(self) -> None:
        """Completes the training cases with the networks of stage 1."""
        request, identity = self.request, self.completed_from()["values"]["teacher"]
        model = Model(request.model_folder(STAGES[0]), (self.fold,), identity, request.device)
        setup = Setup(self.base, self.plans, self.configuration, self.dataset_json)
        cases = describe_cases(setup, self.cases)
        report = complete_cases(
            model, setup, cases, self.completed_folder, request.gate, request.predictors, request.workers
        )
        print(completion_table(report, cases, self.channels), flush=True)
