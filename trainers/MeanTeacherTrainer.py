"""Trains on labeled cases and on the unlabeled pool, whose labels the average of the network's weights makes."""

import math
from collections.abc import Callable

import numpy as np
import torch
from batchgenerators.dataloading.nondet_multi_threaded_augmenter import NonDetMultiThreadedAugmenter
from batchgenerators.utilities.file_and_folder_operations import join
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from batchgeneratorsv2.transforms.utils.deep_supervision_downsampling import DownsampleSegForDSTransform
from nnunetv2.utilities.collate_outputs import collate_outputs
from nnunetv2.utilities.default_n_proc_DA import get_allowed_n_proc_DA
from torch.optim.swa_utils import AveragedModel

from nnunet_diffusion.errors import UserError
from nnunet_diffusion.mean_teacher.copy_paste import random_labeled_parts
from nnunet_diffusion.mean_teacher.pseudo_labels import ClassThresholds, dice_of_counts, occurring, without_absent
from nnunet_diffusion.mean_teacher.strong_view import with_strong_view
from nnunet_diffusion.model_folder import unwrap
from nnunet_diffusion.optimization import ramp_up, warming_ema
from nnunet_diffusion.partial.annotations import annotated_mask, group_map
from nnunet_diffusion.partial.losses import annotated
from nnunet_diffusion.partial.validation import hard_counts
from nnunet_diffusion.preprocessing.cases import pool_folder, pool_identifiers
from nnunet_diffusion.pretraining.images import ImageDataset, image_loader, refuse_other_channels
from nnunet_diffusion.rounds.pseudo_labels import ignoring
from nnunet_diffusion.settings import at_least, between, one_of
from nnunet_diffusion.trainers.PartialLabelTrainer import PartialLabelTrainer


class MeanTeacherTrainer(PartialLabelTrainer):
    """nnU-Net that also learns its own averaged predictions of the pool, with labeled boxes pasted into it.

    A step has a labeled batch, as ever, and a mixed one: parts of labeled patches with their labels, parts of patches
    of the pool with the labels that the teacher, the average of the weights (Tarvainen and Valpola 2017), is sure of;
    it sees them as they are, the student with other intensities (Sohn et al. 2020). Copy-paste is Bai et al. 2023. The
    teacher speaks when the student recognizes every label on labeled patches. The model folder is stock.
    """

    start: str = "denoiser"  # this data set's own
    supervised_share: float = 0.3  # of the epochs, in which there are only labels, and until each is recognized
    least_dice: float = 0.1  # of a label on labeled patches, with which it counts as recognized
    unlabeled_weight: float = 0.5  # of the mixed batch, when it is ramped up
    ramp: float = 0.0  # share of the epochs over which that weight grows, from the first with the pool on
    ema_decay: float = 0.99  # of the teacher
    confidence: float = 0.6  # least probability of a pseudo label, of the class that the teacher is surest of
    adaptive: bool = True  # lower for classes that the teacher is less sure of; False: the same for all
    absent: str = "background"  # where the teacher does not find a class in a patch; or unknown: it may be anywhere
    paste: str = "into_pool"  # labeled boxes into patches of the pool; or both: and the other way round; or none
    strong_probability: float = 0.5  # of each change of intensities in the student's view of the pool
    body_share: float = 0.67  # of the pool's patches are centered on the body
    allowed_values = {
        **dict.fromkeys(("unlabeled_weight", "ramp"), at_least(0)),
        **dict.fromkeys(("supervised_share", "least_dice", "ema_decay", "confidence"), between(0, 1)),
        **dict.fromkeys(("strong_probability", "body_share"), between(0, 1)),
        "absent": one_of("unknown", "background"), "paste": one_of("both", "into_pool", "none"),
    }  # fmt: skip

    ignores_what_is_unsure = True  # in pseudo labels; the loss must know it

    def prepare(self):
        """Refuses regions and cascades."""
        name = type(self).__name__
        if self.label_manager.has_regions:
            raise UserError(f"{name}: regions overlap, a pseudo label has one class a voxel")
        if self.is_cascaded:
            raise UserError(f"{name}: {self.configuration_name} needs the masks of an earlier stage, the pool has none")

    def initialize(self):
        """Refuses a label that no training case annotates: its pseudo labels would be noise."""
        if self.ignores_what_is_unsure:
            self.label_manager = ignoring(self.label_manager)
        super().initialize()
        known = annotated_mask(self.do_split()[0], self.annotations, self.channels).any(0)
        if unknown := [name for name, is_known in zip(self.channels, known.tolist(), strict=True) if not is_known]:
            raise UserError(
                f"no training case annotates {unknown}: nothing tells student and teacher what that is; annotate it, "
                "or take it out of the labels"
            )

    def configure_optimizers(self):
        """Adds the teacher."""
        self.build_teacher()
        if self._do_i_compile():
            for network in self.teacher.children():
                network.compile()
        return super().configure_optimizers()

    def build_teacher(self):
        """Builds the average of the weights, and what decides when it speaks and of what it is sure."""
        self.teacher = AveragedModel(unwrap(self.network), multi_avg_fn=warming_ema(self.ema_decay))
        self.teacher.requires_grad_(False).eval()
        self.thresholds = ClassThresholds(len(self.channels), self.confidence, is_adaptive=self.adaptive)
        self.thresholds.to(self.device)
        self.counts = np.zeros((3, len(self.channels) - 1))  # voxels of labeled patches in an epoch: tp, fp, fn
        self.first_epoch_with_pool = -1  # not yet

    def on_train_start(self):
        """Lets the teacher start when the student has its first weights."""
        super().on_train_start()
        if not self.is_resumed:
            self.start_teacher()

    def start_teacher(self):
        """Takes the student's weights."""
        self.teacher.module.load_state_dict(unwrap(self.network).state_dict())

    def get_dataloaders(self):
        """Adds a loader of the pool to nnU-Net's."""
        self.pool_loader = self.get_pool_loader() if self.needs_pool() else None
        return super().get_dataloaders()

    def needs_pool(self) -> bool:
        """Tells whether the pool is learned from at all."""
        return True

    def get_pool_loader(self):
        """Returns random patches of the unlabeled images; refuses a pool that is missing or does not fit."""
        folder = pool_folder(self.preprocessed_dataset_folder_base, self.configuration_manager.data_identifier)
        masked = self.configuration_manager.use_mask_for_norm
        pool = ImageDataset([join(folder, case) for case in pool_identifiers(folder)], any(masked))
        if not pool.identifiers:
            raise UserError(
                f"there is no unlabeled image in {folder}: name some (nnunet_diffusion convert ... --unlabeled) and "
                "run nnunet_diffusion plan_and_preprocess, or train with DiffusionPretrainedTrainer"
            )
        refuse_other_channels(pool, self.num_input_channels)
        self.print_to_log_file(f"{len(pool.identifiers)} unlabeled images")
        self.look_at_pool(pool)
        patch_size = self.configuration_manager.patch_size
        rotation, dummy_2d, size, mirror_axes = self.configure_rotation_dummyDA_mirroring_and_inital_patch_size()
        nnunet = self.get_training_transforms(
            patch_size, rotation, None, mirror_axes, dummy_2d, use_mask_for_norm=masked
        )
        return image_loader(
            pool, self.batch_size, patch_size, size, self.label_manager, transforms=self.pool_transforms(nnunet),
            workers=get_allowed_n_proc_DA(), pin_memory=self.device.type == "cuda", body_share=self.body_share,
        )  # fmt: skip

    def look_at_pool(self, pool: ImageDataset):
        """Does what a subclass must know of the images before it learns from them."""

    def pool_transforms(self, nnunet: ComposeTransforms) -> ComposeTransforms:
        """Returns the augmentation of the pool: two views of a patch."""
        return with_strong_view(nnunet, self.num_input_channels, self.strong_probability)

    def on_train_epoch_start(self):
        """Decides whether the pool is learned from, and ramps up its weight."""
        super().on_train_epoch_start()
        if self.first_epoch_with_pool < 0 and self.is_ready():
            self.first_epoch_with_pool = self.current_epoch
            self.print_to_log_file("From this epoch on the teacher labels the pool")
        self.counts[:] = 0
        self.uses_pool = self.first_epoch_with_pool >= 0
        since = self.current_epoch - self.first_epoch_with_pool
        self.pool_weight = self.unlabeled_weight * ramp_up(since, self.num_epochs, self.ramp)

    def is_ready(self) -> bool:
        """Tells whether the student has had its supervised epochs and, in the last, recognized every label."""
        if self.current_epoch < math.ceil(self.supervised_share * self.num_epochs):
            return False
        counts = torch.from_numpy(self.counts)
        if self.is_ddp:
            counts = counts.to(self.device)
            torch.distributed.all_reduce(counts)
        tp, fp, fn = counts.tolist()
        dice = dice_of_counts(tp, fp, fn)
        if missing := [name for name, d in zip(list(self.channels)[1:], dice, strict=True) if d < self.least_dice]:
            self.print_to_log_file(f"The pool waits: on labeled patches the student does not recognize {missing} yet")
        return not missing

    def train_step(self, batch: dict) -> dict:
        """Takes a labeled batch, then one with patches of the pool; their gradients add up."""
        images = batch["data"].to(self.device, non_blocking=True)
        targets = self.targets(batch)
        self.optimizer.zero_grad(set_to_none=True)
        with self.with_annotations(batch, self.label_dropout), self.autocast():
            is_annotated = annotated_mask(batch["keys"], self.annotations, self.channels)
            loss = self.labeled_loss(images, targets, is_annotated)
        self.backward(loss)
        report = {"loss": loss.detach().cpu().numpy()}
        if self.uses_pool:
            report |= self.learn_from_pool(batch["keys"], images, targets[0])
        self.update(max_norm=12)  # nnU-Net's
        self.update_teacher()
        return report

    def labeled_loss(
        self, images: torch.Tensor, targets: list[torch.Tensor], is_annotated: torch.Tensor
    ) -> torch.Tensor:
        """Returns the loss of a labeled batch; until the teacher speaks, what the student recognizes is counted."""
        output = self.network(images)
        if not self.uses_pool:
            logits = output[0] if self.enable_deep_supervision else output
            self.counts += hard_counts(logits.detach(), targets[0], is_annotated, self.label_manager)
        return self.loss(output, targets if self.enable_deep_supervision else targets[0])

    def loss_of_output(self, targets: list[torch.Tensor]) -> Callable:
        """Returns the loss of an output on labels, with deep supervision if the output has it."""
        whole = self.loss.loss if self.enable_deep_supervision else self.loss

        def loss(output):
            return self.loss(output, targets) if isinstance(output, (list, tuple)) else whole(output, targets[0])

        return loss

    def update_teacher(self):
        """Averages the weights."""
        self.teacher.update_parameters(unwrap(self.network))

    def learn_from_pool(self, keys: list[str], images: torch.Tensor, target: torch.Tensor) -> dict:
        """Adds the gradient of a mixed batch; returns its loss and how much of the pool the teacher labels."""
        views = self.next_of_pool()
        weak, strong = views.chunk(2, 1)
        pseudo_labels = self.labels_of_teacher(weak)
        is_labeled = random_labeled_parts(images.shape, self.paste, self.device)
        mixed = torch.where(is_labeled, images, strong)
        labels = torch.where(is_labeled, target.long(), pseudo_labels)
        group = group_map(keys, self.annotations, self.channels)
        if self.absent == "unknown":
            group = without_absent(group, labels)
        with annotated(self.loss, group), self.autocast():
            loss = self.loss(self.network(mixed), self.at_all_scales(labels))
        self.backward(self.pool_weight * loss)
        is_sure = (pseudo_labels != self.label_manager.ignore_label).flatten(1).float().mean(1)
        found = occurring(pseudo_labels, len(self.channels))[:, 1:].float().mean(1)
        return {name: value.cpu().numpy() for name, value in
                {"pool_loss": loss.detach(), "is_sure": is_sure, "found": found}.items()}  # fmt: skip

    def next_of_pool(self) -> torch.Tensor:
        """Returns a batch of the pool, on the device."""
        return next(self.pool_loader)["data"].to(self.device, non_blocking=True)

    @torch.no_grad()
    def labels_of_teacher(self, images: torch.Tensor) -> torch.Tensor:
        """Returns the teacher's labels (B, 1, X, Y[, Z]) of images, the ignore label where it is not sure."""
        probabilities = self.teacher_probabilities(images)
        self.thresholds.update(probabilities)
        return self.thresholds.labels(probabilities, self.label_manager.ignore_label)

    def teacher_probabilities(self, images: torch.Tensor) -> torch.Tensor:
        """Returns what the teacher says of images, (B, C, X, Y[, Z])."""
        with self.autocast():
            output = self.teacher(images)
        return (output[0] if self.enable_deep_supervision else output).float().softmax(1)

    def at_all_scales(self, labels: torch.Tensor):
        """Returns labels (B, 1, X, Y[, Z]) as nnU-Net's loader would: at each scale of deep supervision."""
        if not self.enable_deep_supervision:
            return labels
        downsample = DownsampleSegForDSTransform(self._get_deep_supervision_scales())
        return [scaled[:, None] for scaled in downsample(segmentation=labels[:, 0])["segmentation"]]

    def on_train_epoch_end(self, train_outputs: list[dict]):
        """Logs what was learned from the pool."""
        super().on_train_epoch_end(train_outputs)
        if self.uses_pool:
            self.log_pool(collate_outputs(train_outputs))

    def log_pool(self, outputs: dict):
        """Logs the loss on the pool and how much of it the teacher labels."""
        means = {name: float(np.mean(outputs[name])) for name in ("pool_loss", "is_sure", "found")}
        self.print_to_log_file(
            f"Pool: loss {means['pool_loss']:.4f}, weight {self.pool_weight:.3f}; the teacher is sure of "
            f"{means['is_sure']:.1%} of the voxels and finds {means['found']:.1%} of the labels in a patch"
        )

    def on_train_end(self):
        """Ends the pool's workers as well."""
        super().on_train_end()
        if isinstance(self.pool_loader, NonDetMultiThreadedAugmenter):
            self.pool_loader._finish()

    def extra_state(self) -> dict:
        """Adds the teacher and when it began to speak, so that a resumed run continues."""
        return {
            "teacher": self.teacher.state_dict(), "thresholds": self.thresholds.state_dict(),
            "counts": torch.from_numpy(self.counts), "first_epoch_with_pool": self.first_epoch_with_pool,
        }  # fmt: skip

    def restore(self, checkpoint: dict):
        """Continues the teacher."""
        self.teacher.load_state_dict(checkpoint["teacher"])
        self.thresholds.load_state_dict(checkpoint["thresholds"])
        self.counts = checkpoint["counts"].numpy()
        self.first_epoch_with_pool = checkpoint["first_epoch_with_pool"]
