"""What a run of rounds was asked for, and where everything of it lies."""

import os
from dataclasses import dataclass, replace

from nnunetv2.paths import nnUNet_preprocessed, nnUNet_results

from nnunet_diffusion.rounds.gate import GateSettings
from nnunet_diffusion.rounds.pseudo_labels import pseudo_folder
from nnunet_diffusion.rounds.teacher import AT_ONCE, CHECKPOINT
from nnunet_diffusion.settings import SettingsOf, given_settings
from nnunet_diffusion.workers import HERE, Workers


@dataclass(frozen=True)
class Request:
    """What is asked for; see the command's help."""

    dataset: str  # DatasetXXX_Name
    configuration: str
    fold: str
    plans: str = "nnUNetPlans"
    trainer: str = "DiffusionPretrainedTrainer"
    model: str = ""  # a model folder in the place of a first training
    round_trainer: str = "PseudoLabelTrainer"
    start: str = "denoiser"
    finetune: bool = False
    gate: GateSettings = GateSettings()
    tolerance: float = 0.01  # of the validation Dice: by how much it may be below the best so far
    device: str = "cuda"
    num_gpus: int = 1
    mirroring: bool = True  # when the pool is predicted
    settings_of: SettingsOf = given_settings
    workers: Workers = HERE  # of what is many cases
    keep_rounds: int = 0  # of how many rounds predictions and pseudo labels are kept; 0: of all

    @property
    def predictors(self) -> Workers:
        """Says where networks predict: with a GPU each, several cases in their hands."""
        number = self.workers.number if self.workers.scheduler else self.num_gpus
        return replace(self.workers, number=number, at_once=AT_ONCE, needs_gpu=self.device == "cuda")

    @property
    def base(self) -> str:
        """The data set's folder of preprocessed cases."""
        return os.path.join(nnUNet_preprocessed, self.dataset)

    @property
    def results(self) -> str:
        """The data set's folder of results."""
        return os.path.join(nnUNet_results, self.dataset)

    @property
    def reports(self) -> str:
        """The folder of the rounds' reports and logs, with their lock: it can be removed to start anew."""
        return os.path.join(self.results, f"rounds__{self.plans}__{self.configuration}", f"fold_{self.fold}")

    def model_folder(self, trainer: str, plans: str = "") -> str:
        """Returns the model folder of a trainer, by default with the plans that were asked for."""
        return os.path.join(self.results, f"{trainer}__{plans or self.plans}__{self.configuration}")


class Places:
    """The folders and files of one run; a round is a number, or "finetune"."""

    def __init__(self, request: Request, data_identifier: str):
        """Names them; `data_identifier` is that of the configuration."""
        self.request = request
        self.base = request.base
        self.name = f"{request.plans}__{request.configuration}__fold_{request.fold}"
        self.folder = pseudo_folder(self.base, data_identifier, self.name)
        self.state = os.path.join(self.folder, "state.json")
        self.reports = request.reports

    def round(self, number: int) -> str:
        """Returns the pseudo labels of a round."""
        return os.path.join(self.folder, f"round_{number}")

    def predicted(self, number: int) -> str:
        """Returns the predictions of a round."""
        return os.path.join(self.round(number), "predicted")

    def failed(self, number: int) -> str:
        """Says which cases could not be predicted, and why."""
        return os.path.join(self.round(number), "failed.jsonl")

    def verdicts(self, number: int) -> str:
        """Says what the filter decided about each case."""
        return os.path.join(self.round(number), "verdicts.jsonl")

    def plans(self, number: int | str) -> str:
        """Returns the name of the plans with a round's settings."""
        return f"{self.request.plans}_round{number}"

    def pseudo_labels(self, number: int) -> str:
        """Returns the trainer's setting; it has a placeholder for the fold, since folds share their plans."""
        return f"{self.request.plans}__{self.request.configuration}__fold_{{fold}}/round_{number}"

    def model(self, number: int | str) -> str:
        """Returns the model folder of a round."""
        if number == 0 and self.request.model:
            return os.path.abspath(self.request.model)
        if number == 0:
            return self.request.model_folder(self.request.trainer)
        return self.request.model_folder(self.request.round_trainer, self.plans(number))

    def outcome(self) -> str:
        """Says where `nnUNetv2_predict -tr ROUND_TRAINER -p PLANS` looks."""
        return self.request.model_folder(self.request.round_trainer)

    def folds(self, number: int | str) -> list[str]:
        """Lists the folds that predict: of a given model all, if nothing is validated on; else this run's own."""
        if number == 0 and self.request.model and self.request.fold == "all":
            model = self.model(0)
            names = sorted(name[5:] for name in os.listdir(model) if name.startswith("fold_"))
            return [fold for fold in names if os.path.isfile(os.path.join(model, f"fold_{fold}", CHECKPOINT))]
        return [self.request.fold]

    def checkpoints(self, number: int | str) -> list[str]:
        """Lists the checkpoints of a round's model."""
        return [os.path.join(self.model(number), f"fold_{fold}", CHECKPOINT) for fold in self.folds(number)]
