"""Trains the planned network together with a diffusion teacher, on labeled cases and on the unlabeled pool."""

import numpy as np
import torch
from batchgenerators.utilities.file_and_folder_operations import isfile

from nnunet_diffusion.co_training.mask_diffusion import build_pair
from nnunet_diffusion.co_training.teacher_file import load_teacher, restore_teacher
from nnunet_diffusion.co_training.teachers import CrossPseudo, DiffusionTeacher, Teacher
from nnunet_diffusion.errors import UserError
from nnunet_diffusion.model_folder import unwrap
from nnunet_diffusion.pretraining.denoiser_file import plan_identity
from nnunet_diffusion.pretraining.diffusion import Diffusion
from nnunet_diffusion.pretraining.images import ImageDataset, fixed_batches, image_statistics
from nnunet_diffusion.pretraining.process import SCHEDULES
from nnunet_diffusion.pretraining.start import own_pretraining, pretraining_command, seen_images
from nnunet_diffusion.pretraining.transfer import plan_differences
from nnunet_diffusion.settings import at_least, one_of
from nnunet_diffusion.trainers.MeanTeacherTrainer import MeanTeacherTrainer


class DiffusionCoTrainingTrainer(MeanTeacherTrainer):
    """The planned network as student of a diffusion teacher; each learns from the other's masks of the pool's images.

    Ciampi et al. 2025 (arXiv 2504.01547), abstract: co-training with a diffusion teacher, several rounds of pseudo
    labels. Ours: the student is the planned network, which starts from a denoiser (the setting `start`), so the model
    folder is stock; the paper's twin is DiffusionCoTrainingTwinTrainer. Ours, too, is the gate: an image on whose masks
    student and teacher do not agree teaches nothing about masks. For comparison, `method` replaces the teacher by a
    second network like the student (cross_pseudo), or by nothing (supervised). Of MeanTeacherTrainer it has the pool
    and its settings `unlabeled_weight`, `ramp` and `body_share`; the others do nothing here.
    """

    unlabeled_weight: float = 1.0  # of all that is learned from the pool, when it is ramped up
    ramp: float = 1.0  # share of the epochs over which that weight grows from 0
    method: str = "co_training"  # or cross_pseudo, supervised
    teacher_file: str = ""  # path of a teacher.pth; empty: this data set's own, else random weights; none: those anyway
    schedule: str = "sigmoid"  # of a teacher that starts from random weights; else the file's
    rounds: int = 1  # K; the prototype: 3, 5 or 10
    chained: bool = True  # False: every round is a redraw from the teacher's first mask, as in the prototype
    detached: bool = True  # as in the prototype; False: restoring teaches S through the mask, segmenting R
    gate: float = 0.5  # least agreement (mean Dice) of student and teacher on an image; 0: no gate
    allowed_values = {
        "method": one_of("co_training", "cross_pseudo", "supervised"),
        "schedule": one_of(*SCHEDULES), "rounds": at_least(1), "gate": at_least(0),
    }  # fmt: skip

    replaced_settings = {"perturbation": "train with MeanTeacherTrainer, which has strong_probability instead"}

    ignores_what_is_unsure = False  # the gate drops whole images

    def prepare(self):
        """Refuses several processes as well."""
        super().prepare()
        if self.is_ddp:
            raise UserError(f"{type(self).__name__} trains on one GPU: leave out -num_gpus")

    def build_teacher(self):
        """Builds the teacher of the chosen method, from random weights."""
        self.teacher = self.teacher_of_method().to(self.device)
        self.first_epoch_with_pool = 0 if self.needs_pool() else -1
        self.counts = np.zeros(0)  # nothing is waited for

    def teacher_of_method(self) -> Teacher:
        """Returns a new teacher."""
        channels, classes = self.num_input_channels, len(self.channels)
        plan, batch_dice = (self.plans_manager, self.configuration_manager), self.configuration_manager.batch_dice
        if self.method == "supervised":
            return Teacher()
        if self.method == "cross_pseudo":
            second = self.build_network_architecture(*plan, channels, classes, self.enable_deep_supervision)
            return CrossPseudo(second, self.gate, batch_dice)
        pair, diffusion = build_pair(*plan, channels, classes), Diffusion(self.schedule, device=self.device)
        return DiffusionTeacher(
            pair, self.gate, batch_dice, diffusion, classes, self.rounds, self.chained, self.detached
        )

    def planned_networks(self) -> list[torch.nn.Module]:
        """Adds a second network that learns from pseudo labels: it starts as the student does, with other heads."""
        second = [self.teacher.network] if self.method == "cross_pseudo" else []
        return [*super().planned_networks(), *map(unwrap, second)]

    def trained_networks(self) -> list[torch.nn.Module]:
        """Adds the teacher, if it learns by gradients."""
        learns = any(parameter.requires_grad for parameter in self.teacher.parameters())
        return [self.network, *([self.teacher] if learns else [])]

    def start_teacher(self):
        """Loads teacher.pth; without one the teacher starts from random weights, and the log says so."""
        if self.method != "co_training":
            return
        if self.teacher_file == "none":
            self.print_to_log_file("The teacher starts from random weights, as the setting teacher_file says")
            return
        plan, pretraining = (self.plans_manager, self.configuration_name), "DiffusionTeacherTrainer"
        own = own_pretraining(*plan, self.fold, pretraining, "teacher.pth")
        path = self.teacher_file or next(filter(isfile, own), None)
        if path is None:
            looked = "".join(f"\n  {candidate}" for candidate in own)
            self.print_to_log_file(
                f"WARNING: the teacher starts from random weights, there is no file of{looked}\nmake one with\n"
                f"  {pretraining_command(*plan, pretraining)}"
            )
            return
        content = load_teacher(path)
        restore_teacher(content, self.teacher.network)
        self.teacher.diffusion = Diffusion(**content["process"], device=self.device)
        self.print_to_log_file(f"The teacher starts from {path}\n  {content['training']['health']}")
        differences = plan_differences(content["plan"], plan_identity(*plan, self.dataset_json))
        warnings = [seen_images(path, self.fold), *(f"WARNING: {difference}" for difference in differences)]
        for warning in filter(None, warnings):
            self.print_to_log_file(warning)

    def needs_pool(self) -> bool:
        """Tells whether the method learns from it."""
        return self.teacher.needs_pool

    def look_at_pool(self, pool: ImageDataset):
        """Measures the images, in units of which their noise is."""
        if self.method == "co_training" and not self.is_resumed:
            patch_size, student = self.configuration_manager.patch_size, unwrap(self.network)
            fixed = fixed_batches(pool, 20, self.batch_size, patch_size, self.label_manager, 1234, self.body_share)
            networks = [self.teacher.network, *([student] if hasattr(student, "calibrate") else [])]
            patches = (batch["data"] for batch in fixed)
            self.teacher.diffusion.calibrate(networks, image_statistics(pool), patches)

    def pool_transforms(self, nnunet):
        """Returns nnU-Net's own: student and teacher see the same."""
        return nnunet

    def on_train_epoch_start(self):
        """Lets the teacher learn."""
        super().on_train_epoch_start()
        self.teacher.train()

    def is_ready(self) -> bool:
        """Tells that the pool will never be learned from, if it is not from the first epoch on."""
        return False

    def labeled_loss(self, images, targets, is_annotated) -> torch.Tensor:
        """Returns the loss of student and teacher on a labeled batch."""
        return self.teacher.labeled(self.network, images, self.loss_of_output(targets))

    def learn_from_pool(self, keys: list[str], images: torch.Tensor, target: torch.Tensor) -> dict:
        """Adds the gradient of a batch of the pool."""
        with self.autocast():
            loss, figures = self.teacher.unlabeled(self.network, self.next_of_pool())
        self.backward(self.pool_weight * loss)
        return {name: value.detach().cpu().numpy() for name, value in {"pool_loss": loss, **figures}.items()}

    def update_teacher(self):
        """Does nothing: it learns by gradients."""

    def log_pool(self, outputs: dict):
        """Logs the loss on the pool and what the gate kept."""
        self.print_to_log_file(f"pool_loss {np.mean(outputs['pool_loss']):.4f}, its weight {self.pool_weight:.3f}")
        agreed = outputs["agreement"]
        self.print_to_log_file(
            f"Student and teacher agree on the pool with a mean Dice of {np.mean(agreed):.3f}; the gate "
            f"({self.gate}) kept {np.mean(agreed >= self.gate):.1%} of {agreed.size} images"
        )

    def extra_state(self) -> dict:
        """Adds the teacher, so that a resumed run continues it."""
        state = {"teacher": self.teacher.state_dict()}
        if self.method == "co_training":
            state["process"] = self.teacher.diffusion.description
        return state

    def restore(self, checkpoint: dict):
        """Continues the teacher."""
        self.teacher.load_state_dict(checkpoint["teacher"])
        if "process" in checkpoint:
            self.teacher.diffusion = Diffusion(**checkpoint["process"], device=self.device)
