"""Trains the planned network together with a diffusion teacher, on labeled cases and on the unlabeled pool."""

import numpy as np
import torch
from batchgenerators.dataloading.nondet_multi_threaded_augmenter import NonDetMultiThreadedAugmenter
from batchgenerators.utilities.file_and_folder_operations import isfile, join
from nnunetv2.utilities.collate_outputs import collate_outputs
from nnunetv2.utilities.default_n_proc_DA import get_allowed_n_proc_DA

from nnunet_diffusion.co_training.mask_diffusion import build_pair
from nnunet_diffusion.co_training.teacher_file import load_teacher, restore_teacher
from nnunet_diffusion.co_training.teachers import CrossPseudo, DiffusionTeacher, MeanTeacher, Teacher
from nnunet_diffusion.errors import UserError
from nnunet_diffusion.model_folder import unwrap
from nnunet_diffusion.optimization import ramp_up
from nnunet_diffusion.partial.annotations import annotated_mask
from nnunet_diffusion.preprocessing.cases import pool_folder, pool_identifiers
from nnunet_diffusion.pretraining.denoiser_file import plan_identity
from nnunet_diffusion.pretraining.diffusion import Diffusion
from nnunet_diffusion.pretraining.images import (
    ImageDataset,
    fixed_batches,
    image_loader,
    image_statistics,
    refuse_other_channels,
)
from nnunet_diffusion.pretraining.process import SCHEDULES
from nnunet_diffusion.pretraining.start import own_pretraining, pretraining_command, seen_images
from nnunet_diffusion.pretraining.transfer import plan_differences
from nnunet_diffusion.settings import at_least, between, one_of
from nnunet_diffusion.trainers.PartialLabelTrainer import PartialLabelTrainer


class DiffusionCoTrainingTrainer(PartialLabelTrainer):
    """The planned network as student of a diffusion teacher; each learns from the other's masks of the pool's images.

    Ciampi et al. 2025 (arXiv 2504.01547), abstract: co-training with a diffusion teacher, several rounds of pseudo
    labels. Ours: the student is the planned network, which starts from a denoiser (the setting `start`), so the model
    folder is stock; the paper's twin is DiffusionCoTrainingTwinTrainer. Ours, too, is the gate: an image on whose masks
    student and teacher do not agree teaches nothing about masks. For comparison, `method` replaces the teacher by a
    second network like the student (cross_pseudo), by the student's averaged weights (mean_teacher), or by nothing
    (supervised).
    """

    start: str = "denoiser"  # this data set's own
    method: str = "co_training"  # or cross_pseudo, mean_teacher, supervised
    teacher_file: str = ""  # path of a teacher.pth; empty: this data set's own, else random weights; none: those anyway
    schedule: str = "sigmoid"  # of a teacher that starts from random weights; else the file's
    rounds: int = 1  # K; the prototype: 3, 5 or 10
    chained: bool = True  # False: every round is a redraw from the teacher's first mask, as in the prototype
    unlabeled_weight: float = 1.0  # of all that is learned from the pool, when it is ramped up
    ramp: float = 1.0  # share of the epochs over which that weight grows from 0
    gate: float = 0.5  # least agreement (mean Dice) of student and teacher on an image; 0: no gate
    ema_decay: float = 0.99  # of mean_teacher
    perturbation: float = 0.1  # standard deviation of the noise on mean_teacher's images
    allowed_values = {
        "method": one_of("co_training", "cross_pseudo", "mean_teacher", "supervised"),
        "schedule": one_of(*SCHEDULES), "rounds": at_least(1), "ema_decay": between(0, 1),
        **dict.fromkeys(("unlabeled_weight", "ramp", "gate", "perturbation"), at_least(0)),
    }  # fmt: skip

    def prepare(self):
        """Refuses regions, cascades and several processes."""
        name = type(self).__name__
        if self.label_manager.has_regions:
            raise UserError(f"{name}: regions overlap, a mask has one class a voxel")
        if self.is_cascaded:
            raise UserError(f"{name}: {self.configuration_name} needs the masks of an earlier stage, the pool has none")
        if self.is_ddp:
            raise UserError(f"{name} trains on one GPU: leave out -num_gpus")

    def initialize(self):
        """Refuses a label that no training case annotates: its pseudo labels would be noise."""
        super().initialize()
        known = annotated_mask(self.do_split()[0], self.annotations, self.channels).any(0).tolist()
        if unknown := [name for name, is_known in zip(self.channels, known, strict=True) if not is_known]:
            raise UserError(
                f"no training case annotates {unknown}: nothing tells student and teacher what that is; annotate it, "
                "or take it out of the labels"
            )

    def configure_optimizers(self):
        """Returns one optimizer for student and teacher."""
        self.teacher = self.build_teacher().to(self.device)
        if self._do_i_compile():
            for network in self.teacher.children():
                network.compile()
        return super().configure_optimizers()

    def build_teacher(self) -> Teacher:
        """Builds the teacher of the chosen method, from random weights."""
        channels, classes = self.num_input_channels, len(self.channels)
        plan, batch_dice = (self.plans_manager, self.configuration_manager), self.configuration_manager.batch_dice
        if self.method == "supervised":
            return Teacher()
        if self.method == "mean_teacher":
            return MeanTeacher(unwrap(self.network), self.ema_decay, self.perturbation)
        if self.method == "cross_pseudo":
            second = self.build_network_architecture(*plan, channels, classes, self.enable_deep_supervision)
            return CrossPseudo(second, self.gate, batch_dice)
        diffusion = Diffusion(self.schedule, device=self.device)
        pair = build_pair(*plan, channels, classes)
        return DiffusionTeacher(pair, self.gate, batch_dice, diffusion, classes, self.rounds, self.chained)

    def planned_networks(self) -> list[torch.nn.Module]:
        """Adds a second network that learns from pseudo labels: it starts as the student does, with other heads."""
        second = [self.teacher.network] if self.method == "cross_pseudo" else []
        return [*super().planned_networks(), *map(unwrap, second)]

    def trained_networks(self) -> list[torch.nn.Module]:
        """Adds the teacher, if it learns by gradients."""
        learns = any(parameter.requires_grad for parameter in self.teacher.parameters())
        return [self.network, *([self.teacher] if learns else [])]

    def on_train_start(self):
        """Lets the teacher start from what it has learned without labels."""
        if not self.was_initialized:
            self.initialize()
        super().on_train_start()
        if not self.is_resumed:
            self.teacher.start_from(unwrap(self.network))
            if self.method == "co_training":
                self.start_teacher()

    def start_teacher(self):
        """Loads teacher.pth; without one the teacher starts from random weights, and the log says so."""
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

    def get_dataloaders(self):
        """Adds a loader of the pool, augmented in the same way, to nnU-Net's."""
        self.pool_loader = self.get_pool_loader() if self.teacher.needs_pool else None
        return super().get_dataloaders()

    def get_pool_loader(self):
        """Returns random patches of the unlabeled images; refuses a pool that is missing or does not fit."""
        folder = pool_folder(self.preprocessed_dataset_folder_base, self.configuration_manager.data_identifier)
        masked = self.configuration_manager.use_mask_for_norm
        pool = ImageDataset([join(folder, case) for case in pool_identifiers(folder)], any(masked))
        if not pool.identifiers:
            raise UserError(
                f"there is no unlabeled image in {folder}: name some (nnunet_diffusion convert ... --unlabeled) and "
                "run nnunet_diffusion plan_and_preprocess, or set method to supervised"
            )
        refuse_other_channels(pool, self.num_input_channels)
        self.print_to_log_file(f"{self.method} with {len(pool.identifiers)} unlabeled images")
        patch_size = self.configuration_manager.patch_size
        if self.method == "co_training" and not self.is_resumed:
            fixed = fixed_batches(pool, 20, self.batch_size, patch_size, self.label_manager, seed=1234)
            patches = (batch["data"] for batch in fixed)
            self.teacher.diffusion.calibrate([self.teacher.network], image_statistics(pool), patches)
        rotation, dummy_2d, size, mirror_axes = self.configure_rotation_dummyDA_mirroring_and_inital_patch_size()
        return image_loader(
            pool, self.batch_size, patch_size, size, self.label_manager,
            transforms=self.get_training_transforms(
                patch_size, rotation, None, mirror_axes, dummy_2d, use_mask_for_norm=masked
            ),
            workers=get_allowed_n_proc_DA(), pin_memory=self.device.type == "cuda",
        )  # fmt: skip

    def on_train_epoch_start(self):
        """Ramps up the weight of the pool."""
        super().on_train_epoch_start()
        self.teacher.train()
        self.pool_weight = self.unlabeled_weight * ramp_up(self.current_epoch, self.num_epochs, self.ramp)

    def train_step(self, batch: dict) -> dict:
        """Takes a labeled batch, then one of the pool; their gradients add up."""
        images = batch["data"].to(self.device, non_blocking=True)
        self.optimizer.zero_grad(set_to_none=True)
        with self.with_annotations(batch), self.mixed_precision():
            loss = self.teacher.labeled(self.network, images, self.supervised_loss(self.targets(batch)))
        self.backward(loss)
        report = {"loss": loss.detach().cpu().numpy()}
        if self.teacher.needs_pool:
            images = next(self.pool_loader)["data"].to(self.device, non_blocking=True)
            with self.mixed_precision():
                loss, figures = self.teacher.unlabeled(self.network, images)
            self.backward(self.pool_weight * loss)
            report |= {name: value.detach().cpu().numpy() for name, value in {"pool_loss": loss, **figures}.items()}
        self.update(max_norm=12)  # nnU-Net's
        self.teacher.after_step(unwrap(self.network))
        return report

    def supervised_loss(self, targets: list[torch.Tensor]):
        """Returns the loss of an output on the labels, with deep supervision if the output has it."""
        whole = self.loss.loss if self.enable_deep_supervision else self.loss

        def loss(output):
            return self.loss(output, targets) if isinstance(output, (list, tuple)) else whole(output, targets[0])

        return loss

    def on_train_epoch_end(self, train_outputs: list[dict]):
        """Logs the loss on the pool and what the gate kept."""
        super().on_train_epoch_end(train_outputs)
        outputs = collate_outputs(train_outputs)
        if "pool_loss" in outputs:
            self.print_to_log_file(f"pool_loss {np.mean(outputs['pool_loss']):.4f}, its weight {self.pool_weight:.3f}")
        if "agreement" in outputs:
            agreed = outputs["agreement"]
            self.print_to_log_file(
                f"Student and teacher agree on the pool with a mean Dice of {np.mean(agreed):.3f}; the gate "
                f"({self.gate}) kept {np.mean(agreed >= self.gate):.1%} of {agreed.size} images"
            )

    def on_train_end(self):
        """Ends the pool's workers as well."""
        super().on_train_end()
        if isinstance(self.pool_loader, NonDetMultiThreadedAugmenter):
            self.pool_loader._finish()

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
