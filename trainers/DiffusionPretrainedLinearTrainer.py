"""Linear classification of the features of a denoiser."""

from nnunet_diffusion.pretraining.linear import LinearClassifier
from nnunet_diffusion.trainers.DiffusionPretrainedTrainer import DiffusionPretrainedTrainer


class DiffusionPretrainedLinearTrainer(DiffusionPretrainedTrainer):
    """Only 1x1 heads on all stages train, upsampled and summed; everything else stays the denoiser's.

    A strategy of Huang et al. 2024 (arXiv 2402.15216), abstract; heads on all stages, the encoder's too, because the
    last one knows little but noise and the others do not know where they are. The model predicts through this
    trainer and cannot be exported as stock nnU-Net.
    """

    has_deep_supervision = False  # the heads of all stages are always summed

    @staticmethod
    def build_network_architecture(
        plans_manager, configuration_manager, num_input_channels, num_output_channels, enable_deep_supervision=False
    ):
        """Builds the planned network with summed heads, everything else frozen."""
        network = DiffusionPretrainedTrainer.build_network_architecture(
            plans_manager, configuration_manager, num_input_channels, num_output_channels, True
        )
        return LinearClassifier(network)
