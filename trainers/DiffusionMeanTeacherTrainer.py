"""Trains as the mean teacher does, with a diffusion model of masks beside it that helps to label the pool."""

import torch

from nnunet_diffusion.co_training.mask_diffusion import build_pathway
from nnunet_diffusion.co_training.mask_prior import MaskPrior
from nnunet_diffusion.errors import UserError
from nnunet_diffusion.pretraining.images import ImageDataset, image_statistics
from nnunet_diffusion.pretraining.process import SCHEDULES
from nnunet_diffusion.settings import at_least, between, one_of
from nnunet_diffusion.trainers.MeanTeacherTrainer import MeanTeacherTrainer


class DiffusionMeanTeacherTrainer(MeanTeacherTrainer):
    """The mean teacher, whose labels of the pool are averaged with masks that a diffusion model draws.

    The diffusion model learns on labeled patches to denoise true masks, on the condition of the image, as in A&D (Wang
    and Li 2023, arXiv 2310.11320); so it may know what shapes organs have. Whether that adds anything to the mean
    teacher alone is on docs/mean_teacher.md.
    """

    schedule: str = "sigmoid"  # of the masks' noise; or linear, cosine
    sample_steps: int = 3  # of DDIM, for a label of the pool
    prior_share: float = 0.5  # of the diffusion model in what labels the pool; the rest is the averaged network's
    allowed_values = {
        "schedule": one_of(*SCHEDULES), "sample_steps": at_least(1), "prior_share": between(0, 1),
    }  # fmt: skip

    def prepare(self):
        """Refuses several processes as well."""
        super().prepare()
        if self.is_ddp:
            raise UserError(f"{type(self).__name__} trains on one GPU: leave out -num_gpus")

    def build_teacher(self):
        """Adds the diffusion model of masks."""
        super().build_teacher()
        classes, plan = len(self.channels), (self.plans_manager, self.configuration_manager)
        self.prior = MaskPrior(build_pathway(*plan, classes + self.num_input_channels, classes), classes, self.schedule)
        self.prior.to(self.device)
        if self._do_i_compile():
            self.prior.pathway.compile()

    def trained_networks(self) -> list[torch.nn.Module]:
        """Adds the diffusion model."""
        return [*super().trained_networks(), self.prior]

    def look_at_pool(self, pool: ImageDataset):
        """Measures the images, in units of which the masks' noise is."""
        if not self.is_resumed:
            statistics = image_statistics(pool)
            limits = torch.tensor([statistics.low, statistics.high])
            self.prior.calibrate(torch.as_tensor(statistics.spread, dtype=torch.float32), limits)

    def labeled_loss(self, images, targets, is_annotated) -> torch.Tensor:
        """Lets the diffusion model learn the true masks as well."""
        logits = self.prior.denoise(images, targets[0], self.prior.draw(images))
        return super().labeled_loss(images, targets, is_annotated) + self.loss_of_output(targets)(logits)

    def teacher_probabilities(self, images: torch.Tensor) -> torch.Tensor:
        """Averages what the averaged network says and what the diffusion model draws."""
        with self.autocast():
            drawn = self.prior.eval().sample(images, self.sample_steps)
        self.prior.train()
        return torch.lerp(super().teacher_probabilities(images), drawn, self.prior_share)

    def extra_state(self) -> dict:
        """Adds the diffusion model, so that a resumed run continues it."""
        return {**super().extra_state(), "prior": self.prior.state_dict()}

    def restore(self, checkpoint: dict):
        """Continues it."""
        super().restore(checkpoint)
        self.prior.load_state_dict(checkpoint["prior"])
