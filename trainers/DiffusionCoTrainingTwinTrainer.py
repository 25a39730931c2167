"""Trains a mask pathway like the teacher's own as the student of a diffusion teacher."""

from nnunet_diffusion.co_training.mask_diffusion import build_student
from nnunet_diffusion.model_folder import unwrap
from nnunet_diffusion.trainers.DiffusionCoTrainingTrainer import DiffusionCoTrainingTrainer


class DiffusionCoTrainingTwinTrainer(DiffusionCoTrainingTrainer):
    """Co-training whose student is the teacher's twin: it too makes masks by diffusion, on the condition of the image.

    The twin student is of Ciampi et al. 2025 (arXiv 2504.01547), abstract. It starts from random weights of its own and
    predicts at one timestep with one noise, so that a prediction can be repeated. The model predicts through this
    trainer and cannot be exported as stock nnU-Net.
    """

    start: str = "scratch"  # there is no denoiser of this topology
    timestep: int = 0  # at which it predicts; at 0 the blank mask is all but free of noise
    allowed_values = {
        "start": lambda value, settings: "scratch, or the path of its own checkpoint" if value == "denoiser" else ""
    }
    has_deep_supervision = False  # a mask pathway

    @staticmethod
    def build_network_architecture(
        plans_manager, configuration_manager, num_input_channels, num_output_channels, enable_deep_supervision=False
    ):
        """Builds the planned network with noised masks as further input, told the timestep."""
        return build_student(plans_manager, configuration_manager, num_input_channels, num_output_channels)

    def initialize(self):
        """Sets the student's process."""
        super().initialize()
        unwrap(self.network).set_process(self.schedule, self.timestep)
