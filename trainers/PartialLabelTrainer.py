"""Trains on cases that were each annotated for only some of the labels."""

from dataclasses import asdict

import numpy as np
import torch
from batchgenerators.utilities.file_and_folder_operations import join
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper

from nnunet_diffusion import settings
from nnunet_diffusion.errors import UserError
from nnunet_diffusion.files import write_json
from nnunet_diffusion.model_folder import HEADS, unwrap
from nnunet_diffusion.optimization import WarmupPolyLR, adamw, ramp_up
from nnunet_diffusion.partial.annotations import (
    annotated_mask,
    balanced_cases,
    group_map,
    output_channels,
    read_annotations,
)
from nnunet_diffusion.partial.losses import PartialLabelLoss, PartialLoss, annotated
from nnunet_diffusion.partial.region_loss import PartialRegionLoss
from nnunet_diffusion.partial.sources import balanced_sources, drop_from_group, drop_from_mask
from nnunet_diffusion.partial.validation import restrict_summary
from nnunet_diffusion.pretraining.start import SCRATCH, find_start, load_first_weights, seen_images
from nnunet_diffusion.pretraining.transfer import parameter_sums, report_loaded
from nnunet_diffusion.settings import at_least, between, one_of
from nnunet_diffusion.trainers.ConfiguredTrainer import ConfiguredTrainer


class PartialLabelTrainer(ConfiguredTrainer):
    """nnU-Net that never punishes a prediction where nobody looked.

    It starts from random weights, from a denoiser folded at timestep t* and fed with clean images, from a checkpoint,
    or from what nnU-Net loads (`-pretrained_weights`).

    dataset.json says what was annotated in which case (`annotated_labels`, `union_labels`). The loss, the online Dice
    that chooses the best checkpoint, and the final validation count annotated (case, label) pairs only. Where all is
    annotated, all of them are nnU-Net's own.
    """

    start: str = "scratch"  # or denoiser (the data set's own), or the path of a denoiser or a checkpoint
    # (absolute, or below the data set's results; {fold} stands for the fold)
    timestep: int = 50  # t*, at which a denoiser is folded (docs/label_efficiency.md)
    optimizer_name: str = "SGD"  # nnU-Net's; or AdamW, for trainings of a few thousand steps
    warmup_epochs: int = 0  # of a learning rate that rises from 0
    head_lr_factor: float = 1.0  # learning rate of the output heads, relative to initial_lr
    exclusion_weight: float = 2.0  # Shi et al. 2021
    exclusion_ramp: float = 1.0  # share of the epochs over which that weight grows from 0 (docs/partial_labels.md)
    label_dropout: float = 0.0  # share of its labels that a case, each time it is drawn, is taken not to annotate
    balanced_sources: bool = False  # draw cases so that each of dataset.json's `sources` is equally often drawn from
    balanced: bool = True  # draw cases so that each label is equally often the reason, however few cases annotate it
    allowed_values = {
        "optimizer_name": one_of("SGD", "AdamW"),
        **dict.fromkeys(("warmup_epochs", "head_lr_factor", "exclusion_weight", "exclusion_ramp"), at_least(0)),
        "label_dropout": between(0, 1), "timestep": at_least(0),
        "start": lambda value, settings: "" if value else "scratch, denoiser or a path",
    }  # fmt: skip
    replaced_settings = {
        "denoiser": 'give its path with the setting start; "denoiser" there means the data set\'s own',
        "scratch": 'give the setting start: "scratch" or "denoiser"',
        "start_from": "give that path with the setting start",
        "plans_of_denoiser": "plans of a round find the denoiser themselves; for others give its path as start",
    }

    def initialize(self):
        """Reads what was annotated."""
        folder = self.preprocessed_dataset_folder
        self.channels = output_channels(self.label_manager)
        cases = infer_dataset_class(folder).get_identifiers(folder)
        self.annotations = read_annotations(self.dataset_json, cases, self.channels)
        super().initialize()
        self.initial_sums = parameter_sums(unwrap(self.network))

    def on_train_start(self):
        """Loads the first weights, or refuses to train; a resumed run keeps what it has learned."""
        if not self.was_initialized:
            self.initialize()
        if not self.is_resumed:
            self.take_first_weights()
        super().on_train_start()

    def take_first_weights(self):
        """Takes what nnU-Net has loaded, else what the setting `start` says; reports every parameter."""
        report = report_loaded(unwrap(self.network), self.initial_sums)
        if report and "start" in settings.chosen(self.plans_manager.plans, type(self)):
            raise UserError(f"-pretrained_weights contradicts the setting start, {self.start!r}: give one of them")
        if not report and self.start != SCRATCH:
            report = load_first_weights(
                find_start(self.start, self.plans_manager, self.configuration_name, self.fold),
                unwrap(self.network), self.planned_networks(), self.plans_manager, self.configuration_name,
                self.dataset_json, self.timestep,
            )  # fmt: skip
        if report:
            self.print_to_log_file(f"{report}\n{seen_images(report.source, self.fold)}".strip())
            if self.local_rank == 0:
                write_json(join(self.output_folder, "transfer_report.json"), asdict(report))

    def planned_networks(self) -> list[torch.nn.Module]:
        """Returns the networks that a denoiser is loaded into, each of the planned topology."""
        return [unwrap(self.network)]

    def configure_optimizers(self):
        """Returns the chosen optimizer for what trains, with a rate of their own for the heads."""
        networks = [unwrap(network) for network in self.trained_networks()]
        named = [(name, p) for network in networks for name, p in network.named_parameters() if p.requires_grad]
        rest = {"params": [p for name, p in named if HEADS not in name]}
        heads = {"params": [p for name, p in named if HEADS in name]}
        heads["lr"] = self.initial_lr * self.head_lr_factor
        groups = [group for group in (rest, heads) if group["params"]]
        if self.optimizer_name == "SGD":
            kwargs = {"momentum": 0.99, "nesterov": True}
            optimizer = torch.optim.SGD(groups, self.initial_lr, weight_decay=self.weight_decay, **kwargs)
        else:
            optimizer = adamw(groups, self.initial_lr, self.weight_decay)
        return optimizer, WarmupPolyLR(optimizer, self.num_epochs, self.warmup_epochs)

    def _build_loss(self):
        """Builds nnU-Net's loss, deep supervision and all, with the partial loss in the place of the complete one."""
        nnunet, loss = super()._build_loss(), self.partial_loss()
        if not isinstance(nnunet, DeepSupervisionWrapper):
            loss.complete = nnunet
            return loss
        loss.complete, nnunet.loss = nnunet.loss, loss
        return nnunet

    def partial_loss(self) -> PartialLoss:
        """Returns the loss at one resolution, of partly annotated cases too; nnU-Net's own becomes its `complete`."""
        batch_dice, ignore_label = self.configuration_manager.batch_dice, self.label_manager.ignore_label
        if self.label_manager.has_regions:
            return PartialRegionLoss(batch_dice, self.is_ddp, ignore_label is not None)
        return PartialLabelLoss(batch_dice, self.is_ddp, ignore_label, self.exclusion_weight)

    def with_annotations(self, batch: dict, dropout: float = 0.0):
        """Returns a context in which the loss counts what was annotated in the batch, but for a share of the labels."""
        describe, drop = (
            (annotated_mask, drop_from_mask) if self.label_manager.has_regions else (group_map, drop_from_group)
        )
        annotation = describe(batch["keys"], self.annotations, self.channels)
        return annotated(self.loss, drop(annotation, dropout) if dropout else annotation)

    def is_annotated(self, batch: dict) -> torch.Tensor:
        """Returns (B, C) bool: whether somebody looked for an output's label in a case."""
        return annotated_mask(batch["keys"], self.annotations, self.channels)

    def get_tr_and_val_datasets(self):
        """Repeats training cases of rare labels and of small sources, if asked to."""
        train, validation = super().get_tr_and_val_datasets()
        if self.balanced:
            train.identifiers = balanced_cases(train.identifiers, self.annotations)
        if self.balanced_sources:
            train.identifiers = balanced_sources(train.identifiers, self.dataset_json.get("sources", {}))
        return train, validation

    def on_train_epoch_start(self):
        """Ramps up the weight of the exclusion."""
        super().on_train_epoch_start()
        weight = self.exclusion_weight * ramp_up(self.current_epoch, self.num_epochs, self.exclusion_ramp)
        for loss in self.loss.modules():
            if isinstance(loss, PartialLabelLoss):
                loss.exclusion_weight = weight

    def train_step(self, batch: dict) -> dict:
        """Takes nnU-Net's step, with a loss of what was annotated."""
        with self.with_annotations(batch, self.label_dropout):
            return super().train_step(batch)

    def validation_step(self, batch: dict) -> dict:
        """Takes nnU-Net's step, with a loss of what was annotated, and counts that."""
        with self.with_annotations(batch):
            return super().validation_step(batch)

    def on_validation_epoch_end(self, val_outputs: list[dict]):
        """Logs as nnU-Net, whose moving average would never recover from an epoch that met no annotated label."""
        if not any(output[key].any() for output in val_outputs for key in ("tp_hard", "fp_hard", "fn_hard")):
            self.print_to_log_file("No validation patch held an annotated label: Dice of this epoch is taken to be 0")
            val_outputs = [{**output, "fn_hard": output["fn_hard"] + 1} for output in val_outputs]
        with np.errstate(invalid="ignore"):  # the Dice of a label that no patch held
            super().on_validation_epoch_end(val_outputs)

    def perform_actual_validation(self, save_probabilities: bool = False):
        """Validates as nnU-Net; then summary.json and its means are restricted to annotated pairs."""
        super().perform_actual_validation(save_probabilities)
        if self.local_rank == 0 and not annotated_mask(list(self.annotations), self.annotations, self.channels).all():
            path = join(self.output_folder, "validation", "summary.json")
            summary = restrict_summary(path, self.dataset_json["file_ending"], self.annotations, self.channels)
            self.print_to_log_file(
                f"Only annotated pairs of case and label count: {summary['counted_pairs']}. "
                f"Mean Validation Dice: {summary['foreground_mean']['Dice']}"
            )
