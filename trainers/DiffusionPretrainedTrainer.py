"""Fine-tunes all of the planned network from a denoiser."""

from nnunet_diffusion.trainers.PartialLabelTrainer import PartialLabelTrainer


class DiffusionPretrainedTrainer(PartialLabelTrainer):
    """nnU-Net that starts from a denoiser; everything trains.

    Without a denoiser it refuses to train.
    """

    start: str = "denoiser"  # this data set's own; scratch: the fair control, the same training from random weights
