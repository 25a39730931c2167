"""Fine-tunes all of the planned network from a denoiser."""

from os.path import basename, dirname

from batchgenerators.utilities.file_and_folder_operations import join
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunet_diffusion.errors import UserError
from nnunet_diffusion.files import write_json
from nnunet_diffusion.model_folder import first_existing, own_results, unwrap
from nnunet_diffusion.pretraining.conditioning import fold
from nnunet_diffusion.pretraining.denoiser_file import load_denoiser, plan_identity, rebuild
from nnunet_diffusion.pretraining.transfer import (
    plan_differences,
    pretrained_weights_argument,
    transfer,
)
from nnunet_diffusion.settings import BLOCK, at_least
from nnunet_diffusion.trainers.PartialLabelTrainer import PartialLabelTrainer


class DiffusionPretrainedTrainer(PartialLabelTrainer):
    """nnU-Net that starts from a denoiser, folded at timestep t* and fed with clean images; everything trains.

    The denoiser is the file of `-pretrained_weights`, else the setting `denoiser`, else this data set's own for the
    same plan and configuration; without one it refuses to train.
    """

    denoiser: str = ""  # path of a denoiser.pth; empty: this data set's own
    timestep: int = 50  # t* (docs/label_efficiency.md)
    scratch: bool = False  # True: the fair control, the same training from random weights
    allowed_values = {"timestep": at_least(0)}

    def initialize(self):
        """Checks the file of `-pretrained_weights` before nnU-Net unpickles it, and that its weights fit."""
        if path := pretrained_weights_argument():
            if self.scratch:
                raise UserError(f"-pretrained_weights {path} contradicts the setting scratch: give one of them")
            content = load_denoiser(path)
        super().initialize()
        if path:
            self.refuse_misfit(path, content)

    def refuse_misfit(self, path: str, content: dict):
        """Refuses a file of which nnU-Net, which takes no other shape, would only say which assertion failed."""
        self.fold_for_plan(path, content)
        if (channels := len(content["plan"]["channel_names"])) != self.num_input_channels:
            raise UserError(
                f"-pretrained_weights {path}: the denoiser has {channels} input channels, this network "
                f"{self.num_input_channels}, and nnU-Net takes the same number only: leave -pretrained_weights out and "
                f'give the file with the setting {BLOCK}.{type(self).__name__}.denoiser: "{path}" of '
                f"{self.plans_manager.plans_name}.json, which adapts the first convolution"
            )

    def on_train_start(self):
        """Transfers the denoiser, or refuses to train."""
        if not self.was_initialized:
            self.initialize()
        if not self.scratch and not self.is_resumed:
            self.transfer_denoiser()
        super().on_train_start()

    def transfer_denoiser(self):
        """Folds the denoiser at t* into the network and reports what became of every parameter."""
        path = self.find_denoiser()
        content = load_denoiser(path)
        folded = self.fold_for_plan(path, content)
        channels = len(self.dataset_json["channel_names"])
        report = [transfer(network, folded, channels) for network in self.planned_networks()][0]
        report.source, report.timestep = path, self.timestep
        now = plan_identity(self.plans_manager, self.configuration_name, self.dataset_json)
        report.warnings = plan_differences(content["plan"], now)
        self.print_to_log_file(report)
        self.tell_what_it_saw(path)
        if self.local_rank == 0:
            write_json(join(self.output_folder, "transfer_report.json"), report.as_dict())

    def fold_for_plan(self, path: str, content: dict) -> dict:
        """The weights of a denoiser folded at t*; refuses one whose topology or timesteps are others."""
        if not 0 <= self.timestep < content["process"]["timesteps"]:
            raise UserError(
                f"plans.json: {BLOCK}.{type(self).__name__}.timestep is {self.timestep}: {path} knows 0 to "
                f"{content['process']['timesteps'] - 1}"
            )
        channels = len(content["plan"]["channel_names"])
        planned = nnUNetTrainer.build_network_architecture(
            self.plans_manager, self.configuration_manager, channels, channels, False
        )
        try:
            return fold(rebuild(content, planned), self.timestep).state_dict()
        except UserError as error:
            raise UserError(f"{path}: {error}") from error

    def tell_what_it_saw(self, path: str):
        """Logs that a pre-training of fold `all` knows the images of the validation cases."""
        if self.fold != "all" and basename(dirname(path)) == "fold_all":
            self.print_to_log_file(
                f"{path} has seen the images (no labels) of all cases, those of fold {self.fold}'s validation among "
                f"them: for validation on unseen images pre-train with fold {self.fold}"
            )

    def planned_networks(self) -> list:
        """The networks that start from the denoiser."""
        return [unwrap(self.network)]

    def find_denoiser(self) -> str:
        """The path of the denoiser that this training starts from."""
        given = pretrained_weights_argument() or self.denoiser
        candidates = [given] if given else self.own_results("DenoisingDiffusionTrainer", "denoiser.pth")
        return first_existing(
            candidates,
            f"make one with\n  {self.training_command('DenoisingDiffusionTrainer')}\n"
            "or give one with -pretrained_weights or the setting denoiser, or train from random weights with the "
            "setting scratch",
        )

    def own_results(self, trainer: str, file: str) -> list[str]:
        """Where this data set's own result of a pre-training for this plan may be: the own fold's first."""
        plans, name = self.plans_manager, self.name_of_pretrained_plans()
        return own_results(plans, name, self.configuration_name, self.fold, trainer, file)

    def name_of_pretrained_plans(self) -> str:
        """The name of the plans that a pre-training of this data set had."""
        return self.plans_manager.plans_name

    def training_command(self, trainer: str) -> str:
        """What makes the result of a pre-training for this plan."""
        plans, dataset = self.name_of_pretrained_plans(), self.plans_manager.dataset_name
        dataset_id = dataset[len("Dataset") : len("Dataset") + 3]
        return f"nnUNetv2_train {dataset_id} {self.configuration_name} all -tr {trainer} -p {plans}"
