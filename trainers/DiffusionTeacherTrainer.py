"""Trains a teacher of masks on every image of the data set, without a single label."""

import numpy as np
import torch
from batchgenerators.utilities.file_and_folder_operations import join
from nnunetv2.utilities.collate_outputs import collate_outputs

from nnunet_diffusion.co_training.health import gray_masks, held_out_figures, mask_health
from nnunet_diffusion.co_training.mask_diffusion import Draw, build_pair, draw_mask
from nnunet_diffusion.co_training.teacher_file import save_teacher
from nnunet_diffusion.errors import UserError
from nnunet_diffusion.pretraining import pictures
from nnunet_diffusion.trainers.DenoisingDiffusionTrainer import DenoisingDiffusionTrainer


class DiffusionTeacherTrainer(DenoisingDiffusionTrainer):
    """A mask pathway learns masks that help an image pathway to restore noised images; writes `teacher.pth`.

    First stage of Ciampi et al. 2025 (arXiv 2504.01547), abstract: cycle consistency on noise-corrupted images; see
    `co_training.mask_diffusion` for what is whose. Such masks can be noise: every epoch says on held-out images whether
    they use more than one class, and whether they restore better than masks that say nothing.
    """

    schedule: str = "sigmoid"  # or linear, cosine
    result_file, next_step = "teacher.pth", "train with a student with -tr DiffusionCoTrainingTrainer"

    def prepare(self):
        """Refuses regions as well."""
        super().prepare()
        if self.label_manager.has_regions:
            raise UserError("regions overlap, a mask has one class a voxel: give a data set without regions")

    @staticmethod
    def build_network_architecture(
        plans_manager, configuration_manager, num_input_channels, num_output_channels, enable_deep_supervision=False
    ):
        """Builds the planned network twice, with more input channels, told the timestep."""
        return build_pair(plans_manager, configuration_manager, num_input_channels, num_output_channels)

    def loss_on(self, network, batch, timestep, noise):
        """Measures how badly a network restores a batch with the masks that it makes."""
        images = batch["data"].to(self.device, non_blocking=True)
        masks = draw_mask(images, self.label_manager.num_segmentation_heads, timestep)
        with self.autocast():
            return network(images, masks, Draw(timestep, noise), self.diffusion)[1]

    def validation_step(self, batch: dict) -> dict:
        """Returns the error with the masks and with blank ones, and the share of every class; always the same draws."""
        images, classes = batch["data"].to(self.device), self.label_manager.num_segmentation_heads
        draw = Draw(*self.held_out_draw(batch))
        with self.autocast():
            figures = held_out_figures(self.ema.module, images, classes, draw, batch["number"], self.diffusion)
        return {name: value.cpu().numpy() for name, value in figures.items()}

    def on_validation_epoch_end(self, val_outputs: list[dict]):
        """Says whether the masks may mean anything."""
        super().on_validation_epoch_end(val_outputs)
        outputs = collate_outputs(val_outputs)
        loss, blank_loss = (float(np.mean(outputs[key])) for key in ("loss", "blank_loss"))
        self.health = mask_health(loss, blank_loss, np.mean(outputs["shares"], 0).tolist())
        self.print_to_log_file(self.health)

    def extra_state(self) -> dict:
        """Adds what the masks were found to be."""
        return {**super().extra_state(), "health": self.health}

    def restore(self, checkpoint: dict):
        """Continues the average, and keeps what the masks were found to be."""
        super().restore(checkpoint)
        self.health = checkpoint["health"]

    def save_result(self, path: str, plan: dict, training: dict):
        """Writes teacher.pth."""
        save_teacher(path, self.ema.module, self.diffusion.description, plan, {**training, "health": self.health})

    def draw_samples(self, name: str):
        """Draws a sheet of masks under their images, in gray levels from the first class to the last."""
        images = torch.from_numpy(self.real_images[: self.num_samples]).to(self.device)
        classes, window = self.label_manager.num_segmentation_heads, np.percentile(self.real_images, [0.5, 99.5])
        with self.autocast():
            gray = gray_masks(self.ema.module.eval(), images, classes, self.diffusion, *window)
        title = f"{self.plans_manager.dataset_name}, {self.configuration_name}: masks learned without labels"
        pictures.sample_sheet(join(self.output_folder, name), gray.cpu().numpy(), self.real_images, title)
