"""Fine-tunes the decoder of the planned network from a denoiser."""

from nnunet_diffusion.model_folder import unwrap
from nnunet_diffusion.pretraining.linear import freeze_encoder
from nnunet_diffusion.trainers.DiffusionPretrainedTrainer import DiffusionPretrainedTrainer


class DiffusionPretrainedDecoderTrainer(DiffusionPretrainedTrainer):
    """Only decoder and heads train; the encoder keeps the denoiser's parameters and statistics bit by bit.

    A strategy of Huang et al. 2024 (arXiv 2402.15216), abstract.
    """

    @staticmethod
    def build_network_architecture(
        plans_manager, configuration_manager, num_input_channels, num_output_channels, enable_deep_supervision=True
    ):
        """Builds the planned network, its encoder frozen."""
        network = DiffusionPretrainedTrainer.build_network_architecture(
            plans_manager, configuration_manager, num_input_channels, num_output_channels, enable_deep_supervision
        )
        freeze_encoder(network)
        return network

    def on_train_epoch_start(self):
        """Keeps the running statistics of the frozen encoder."""
        super().on_train_epoch_start()
        unwrap(self.network).encoder.eval()
