"""Trains a mask pathway like the teacher's own as the student of a diffusion teacher."""

import torch

from nnunet_diffusion.co_training.mask_diffusion import build_student
from nnunet_diffusion.errors import UserError
from nnunet_diffusion.model_folder import unwrap
from nnunet_diffusion.pretraining.process import alpha_bar_schedule
from nnunet_diffusion.trainers.DiffusionCoTrainingTrainer import DiffusionCoTrainingTrainer


class DiffusionCoTrainingTwinTrainer(DiffusionCoTrainingTrainer):
    """Co-training whose student is the teacher's twin: it too makes masks by diffusion, on the condition of the image.

    The twin student is of Ciampi et al. 2025 (arXiv 2504.01547), abstract. It starts from random weights of its own and
    predicts at one timestep with one noise, so that a prediction can be repeated. The model predicts through this
    trainer and cannot be exported as stock nnU-Net.
    """

    scratch: bool = True  # there is no denoiser of this topology
    timestep: int = 0  # at which it predicts; at 0 the blank mask is all but free of noise

    def __init__(self, plans, configuration, fold, dataset_json, device=torch.device("cuda")):  # noqa: B008
        super().__init__(plans, configuration, fold, dataset_json, device)
        if not self.scratch:
            raise UserError("setting scratch is false: a twin starts from no denoiser, take DiffusionCoTrainingTrainer")
        self.enable_deep_supervision = False

    @staticmethod
    def build_network_architecture(
        plans_manager, configuration_manager, num_input_channels, num_output_channels, enable_deep_supervision=False
    ):
        """The planned network with noised masks as further input, told the timestep."""
        return build_student(plans_manager, configuration_manager, num_input_channels, num_output_channels)

    def initialize(self):
        """Tells the student its process."""
        super().initialize()
        student = unwrap(self.network)
        if not 0 <= self.timestep < len(student.alpha_bar):
            raise UserError(f"setting timestep is {self.timestep}: it must be 0 to {len(student.alpha_bar) - 1}")
        student.alpha_bar.copy_(alpha_bar_schedule(self.schedule))
        student.timestep.fill_(self.timestep)

    def set_deep_supervision_enabled(self, enabled: bool):
        """A mask pathway has none."""
