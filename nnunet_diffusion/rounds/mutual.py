"""The steps of mutual learning: partial-organ networks, completed cases, full-organ networks."""

import os
from typing import Any

import torch
from batchgenerators.utilities.file_and_folder_operations import load_json
from nnunetv2.paths import nnUNet_preprocessed, nnUNet_results
from nnunetv2.utilities.dataset_name_id_conversion import maybe_convert_to_dataset_name
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_diffusion.data.annotated import output_channels
from nnunet_diffusion.data.completed import completed_folder
from nnunet_diffusion.errors import UserError
from nnunet_diffusion.plans import read_plans
from nnunet_diffusion.rounds.completing import (
    REPORT,
    complete_cases,
    completion_table,
    describe_cases,
    training_cases_of,
)
from nnunet_diffusion.rounds.gate import GateSettings
from nnunet_diffusion.rounds.prediction import Teacher
from nnunet_diffusion.rounds.state import locked, record
from nnunet_diffusion.settings import BLOCK
from nnunet_diffusion.steps import Step, Steps, command_environment

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
            UserError: If there is no such data set, plan, configuration or fold.
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
        identifier = PlansManager(self.content).get_configuration(configuration).data_identifier
        self.completed_folder = completed_folder(self.base, identifier, plans, configuration, fold)
        self.cases = training_cases_of(self.base, identifier, fold)
        folder = os.path.join(nnUNet_results, self.dataset, f"mutual__{plans}__{configuration}", f"fold_{fold}")
        self.lock_file = os.path.join(folder, "lock")
        self.steps = Steps(folder, command_environment(None, device), total=3)

    def run(self) -> None:
        """Does what is not finished.

        Raises:
            UserError: If a step fails, or another command works on this run.
        """
        with locked(self.lock_file) as lock:
            self.steps.inherited = (lock,)
            self.train(STAGES[0])
            self.complete()
            self.train(STAGES[1])

    def output_folder(self, trainer: str) -> str:
        """The model folder of a trainer."""
        return os.path.join(nnUNet_results, self.dataset, f"{trainer}__{self.plans}__{self.configuration}")

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
        self.steps.keep_finished(step)
        self.steps.run(step)

    def what_decides(self, trainer: str) -> dict[str, Any]:
        """Settings, cases and annotations, and the completed labels if the trainer reads them."""
        return {
            "settings": self.content.get(BLOCK, {}).get(trainer, {}),
            "annotated_labels": load_json(os.path.join(self.base, "dataset.json")).get("annotated_labels", {}),
            "cases": self.cases,
            "completed": self.completed() if trainer == STAGES[1] else {},
        }

    def final(self, trainer: str) -> str:
        """The checkpoint that a trainer ends with."""
        return os.path.join(self.output_folder(trainer), f"fold_{self.fold}", "checkpoint_final.pth")

    def completed(self) -> dict[str, Any]:
        """What is known of the completed labels; nothing if they are not all there."""
        path = os.path.join(self.completed_folder, REPORT)
        return load_json(path) if os.path.isfile(path) else {}

    def complete(self) -> None:
        """Completes the training cases with the networks of stage 1, unless they are.

        Raises:
            UserError: If stage 2 has been trained on labels that were completed otherwise.
        """
        self.steps.number += 1
        heading = f"[{self.steps.number}/{self.steps.total}] complete the training cases"
        identity, known = record(self.final(STAGES[0]))["sha256"], self.completed()
        if (known.get("teacher"), known.get("gate")) == (identity, self.gate.as_dict()):
            print(f"{heading}: done before", flush=True)
            return
        if known and os.path.isfile(self.final(STAGES[1])):
            raise UserError(
                f"{self.output_folder(STAGES[1])} was trained on labels that were completed by another model or gate "
                f"({known['gate']}): give that gate again, or move the folder away to make it anew"
            )
        print(heading, flush=True)
        teacher = Teacher(self.output_folder(STAGES[0]), [self.fold], identity, torch.device(self.device))
        cases = describe_cases(self.base, teacher, self.cases)
        report = complete_cases(teacher, cases, self.completed_folder, self.gate)
        print(completion_table(report, cases, output_channels(teacher.label_manager)), flush=True)
