"""nnU-Net with settings from the plans and views that fit the data: the base of all trainers here."""

import contextlib
import io
import math
import os
import random
import re

import numpy as np
import torch
from batchgenerators.utilities.file_and_folder_operations import join
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch.nn.parallel import DistributedDataParallel

from nnunet_diffusion import settings
from nnunet_diffusion.errors import UserError
from nnunet_diffusion.files import atomic, check_shape, naming_full_disk
from nnunet_diffusion.locks import locked
from nnunet_diffusion.marks import WORK
from nnunet_diffusion.model_folder import load_checkpoint, load_nothing_but_plain_values, refuse_unbuildable
from nnunet_diffusion.partial.laterality import axes_not_to_mirror, lateral_pairs
from nnunet_diffusion.partial.validation import hard_counts
from nnunet_diffusion.plans import check_plans
from nnunet_diffusion.preprocessing.case_files import check_preprocessed, load_properties, refuse_unreadable
from nnunet_diffusion.preprocessing.cases import pool_folder, pool_identifiers, read_splits
from nnunet_diffusion.schemas import Dataset
from nnunet_diffusion.settings import above, at_least, between, one_of
from nnunet_diffusion.trainers import our_trainers
from nnunet_diffusion.views import MIRRORING, Views, choose_views, lie_the_same_way, rotated_patch_size

# Of blosc2, where the training process itself reads the cases, and of batchgenerators, where others do.
UNREADABLE = re.compile("getting the buffer|background workers")


class ConfiguredTrainer(nnUNetTrainer):
    """Plain nnU-Net whose settings come from plans.json, among them how patches are rotated and mirrored.

    Scans that all lie the same way are shown upright; left and right are never swapped where labels differ by side.

    The block `nnunet_diffusion: {"ConfiguredTrainer": {"num_epochs": 100}}` of plans.json overrides the defaults
    below. Everything not overridden here is nnU-Net's own.
    """

    num_epochs: int = 1000  # an epoch is a number of steps, not a pass over the data
    num_iterations_per_epoch: int = 250  # optimization steps
    num_val_iterations_per_epoch: int = 50  # batches that the online validation looks at
    initial_lr: float = 1e-2  # learning rate, falling to 0 over the epochs
    weight_decay: float = 3e-5  # L2 penalty; of AdamW, decoupled
    save_every: int = 50  # epochs between two checkpoint_latest.pth
    mirroring: str = "auto"  # all: nnU-Net's axes; none; auto: none if all scans are known to lie the same way
    rotation_degrees: float = -1.0  # at most; negative: 15 if all scans are known to lie the same way, else nnU-Net's
    mixed_precision: str = "auto"  # nnU-Net's: float16 on a GPU, none on a CPU; bf16: bfloat16 on both; none
    seed: int = -1  # negative: not seeded; exact repetition also needs nnUNet_n_proc_DA=0 and a CPU
    allowed_values = {
        **dict.fromkeys(("num_epochs", "num_iterations_per_epoch", "num_val_iterations_per_epoch"), at_least(1)),
        "initial_lr": above(0), "weight_decay": at_least(0), "save_every": at_least(1),
        "mixed_precision": one_of("auto", "bf16", "none"),
        "mirroring": one_of(*MIRRORING), "rotation_degrees": between(-1, 180),
    }  # fmt: skip
    has_deep_supervision = True  # the network; one without is never asked for outputs at several scales

    def __init__(self, plans, configuration, fold, dataset_json, device=torch.device("cuda")):  # noqa: B008
        load_nothing_but_plain_values()
        check_plans(plans, "plans.json")  # refused before nnU-Net makes the results folder
        check_shape(dataset_json, Dataset, "dataset.json")
        settings.chosen(plans, type(self), our_trainers())
        super().__init__(plans, configuration, fold, dataset_json, device)
        settings.apply(self)
        self.is_resumed, self.checked_cases = False, set()
        if self.is_ddp and (device.type != "cuda" or device.index is not None):
            # nnU-Net takes the number of the process for that of its GPU, which holds on the first machine only
            self.device = device
        if self.device.type != "cuda" or self.mixed_precision != "auto":  # only float16 needs its gradients scaled
            self.grad_scaler = None
        self.enable_deep_supervision = self.has_deep_supervision
        self.prepare()

    def prepare(self):
        """Refuses what a subclass cannot train, and adds what it needs; called at the end of `__init__`."""

    def initialize(self):
        """Builds the network from seeded weights; one that the plan does not describe is refused by name."""
        refuse_unbuildable(self.plans_manager, self.configuration_name, len(self.dataset_json["channel_names"]))
        self.seed_everything(0)
        super().initialize()

    def _set_batch_size_and_oversample(self):
        """Lets nnU-Net think, from here to the loss, that one process trains, so that it does not wrap the network."""
        patches = self.configuration_manager.batch_size
        if self.is_ddp and (number := torch.distributed.get_world_size()) > patches:
            raise UserError(
                f"{number} processes share a batch of {patches} patch(es), and each needs one: start {patches}, or "
                f"give configuration {self.configuration_name} of the plan a batch_size of {number} or more"
            )
        super()._set_batch_size_and_oversample()
        self.is_one_of_many, self.is_ddp = self.is_ddp, False

    def _build_loss(self):
        """Wraps the network as nnU-Net does, but for the device that it is on, before it builds nnU-Net's loss."""
        self.is_ddp = self.is_one_of_many
        if self.is_ddp:
            on_cuda = self.device.type == "cuda"
            network = torch.nn.SyncBatchNorm.convert_sync_batchnorm(self.network) if on_cuda else self.network
            self.network = DistributedDataParallel(network, device_ids=[self.device] if on_cuda else None)
        return super()._build_loss()

    def set_deep_supervision_enabled(self, enabled: bool):
        """Does nothing where the network has none."""
        if self.has_deep_supervision:
            super().set_deep_supervision_enabled(enabled)

    def on_train_epoch_start(self):
        """Makes an epoch depend on the seed and its number alone, so that a resumed run repeats it."""
        self.seed_everything(1 + self.current_epoch)
        super().on_train_epoch_start()

    def seed_everything(self, step: int):
        """Seeds all generators from the setting `seed`, the rank and a step."""
        if self.seed >= 0:
            seed = int(np.random.SeedSequence([self.seed, self.local_rank, step]).generate_state(1)[0])
            random.seed(seed)
            np.random.seed(seed)
            torch.manual_seed(seed)

    def configure_rotation_dummyDA_mirroring_and_inital_patch_size(self):
        """Chooses the views of the training; the checkpoint carries the mirrored axes to prediction."""
        rotation, dummy_2d, _, mirror_axes = super().configure_rotation_dummyDA_mirroring_and_inital_patch_size()
        patch_size, scans = self.configuration_manager.patch_size, self.scan_properties()
        pairs, lateral = lateral_pairs(self.dataset_json["labels"]), set()
        if pairs:
            lateral = axes_not_to_mirror(scans, self.plans_manager.transpose_forward, len(patch_size))
        nnunet = Views(math.degrees(rotation[1]), mirror_axes)
        is_oriented = lie_the_same_way(scans)
        views = choose_views(nnunet, self.mirroring, self.rotation_degrees, is_oriented, lateral)
        self.print_to_log_file(
            f"Patches are rotated by up to {views.degrees:g} degrees, mirrored along axes {list(views.mirror_axes)}: "
            + (f"all {len(scans)} scans lie the same way" if is_oriented else "scans are not known to lie the same way")
            + (f"; labels come in left/right pairs {pairs}, axes {sorted(lateral)} are never mirrored" if pairs else "")
        )
        self.inference_allowed_mirroring_axes = views.mirror_axes or None  # nnU-Net's predictor wants None, not ()
        angle = math.radians(views.degrees)
        size = rotated_patch_size(patch_size, views.degrees, dummy_2d)
        return (-angle, angle), dummy_2d, size, views.mirror_axes

    def scan_properties(self) -> list[dict]:
        """Returns what nnU-Net's reader said of every preprocessed scan, labeled or in the pool."""
        folder = self.preprocessed_dataset_folder
        pool = pool_folder(self.preprocessed_dataset_folder_base, self.configuration_manager.data_identifier)
        files = [join(folder, case) for case in infer_dataset_class(folder).get_identifiers(folder)]
        files += [join(pool, case) for case in pool_identifiers(pool)]
        return [load_properties(f"{file}.pkl") for file in files]

    def do_split(self):
        """Checks what people edit and kills may cut: splits_final.json, and the files of the cases."""
        path = join(self.preprocessed_dataset_folder_base, "splits_final.json")
        if self.fold != "all" and os.path.isfile(path):
            read_splits(path)
        train, validation = super().do_split()
        unchecked = {*train, *validation} - self.checked_cases  # nnU-Net and trainers of ours split several times
        check_preprocessed(self.preprocessed_dataset_folder, sorted(unchecked))
        self.checked_cases |= unchecked
        return train, validation

    def run_training(self):
        """Trains alone in its folder, and names it if there is no room for what nnU-Net writes; ours names the file."""
        with self.alone(), naming_full_disk(join(self.output_folder, "a file of the training")):
            try:
                super().run_training()
            except RuntimeError as error:
                if UNREADABLE.search(str(error)):
                    refuse_unreadable(self.preprocessed_dataset_folder, sum(map(list, self.do_split()), []))
                raise

    def alone(self):
        """Refuses a second training of the same fold; of several processes the first speaks for all."""
        if self.local_rank != 0:
            return contextlib.nullcontext()
        what = f"the training in {self.output_folder}"
        return locked(join(self.output_folder, WORK, "lock"), what, is_optional=True)

    def perform_actual_validation(self, save_probabilities: bool = False):
        """Names the folder if there is no room."""
        with naming_full_disk(join(self.output_folder, "validation", "a file of the validation")):
            super().perform_actual_validation(save_probabilities)

    def save_checkpoint(self, filename: str) -> None:
        """Writes nnU-Net's checkpoint and what `extra_state` adds, whole or not at all."""
        if self.local_rank != 0 or self.disable_checkpointing:
            return super().save_checkpoint(filename)
        extra = self.extra_state()
        with atomic(filename) as temporary:
            if not extra:
                return super().save_checkpoint(temporary)
            super().save_checkpoint(buffer := io.BytesIO())
            buffer.seek(0)
            torch.save({**torch.load(buffer, map_location="cpu", weights_only=True), **extra}, temporary)

    def extra_state(self) -> dict:
        """Returns what a subclass adds to the checkpoint."""
        return {}

    def load_checkpoint(self, filename_or_checkpoint: str) -> None:
        """Continues from a checkpoint; one that holds more than tensors and plain values is refused by name."""
        checkpoint = load_checkpoint(filename_or_checkpoint)
        super().load_checkpoint(filename_or_checkpoint)
        self.is_resumed = True
        self.restore(checkpoint)

    def restore(self, checkpoint: dict) -> None:
        """Takes back what `extra_state` added to the checkpoint, tensors on the CPU."""

    def autocast(self) -> torch.autocast:
        """Returns the context that the setting `mixed_precision` says: as it comes, nnU-Net's."""
        if self.mixed_precision == "bf16":
            return torch.autocast(self.device.type, torch.bfloat16)
        return torch.autocast(self.device.type, enabled=self.mixed_precision == "auto" and self.device.type == "cuda")

    def targets(self, batch: dict) -> list[torch.Tensor]:
        """Returns the target at each scale, on the device."""
        targets = batch["target"] if isinstance(batch["target"], list) else [batch["target"]]
        return [target.to(self.device, non_blocking=True) for target in targets]

    def output_and_loss(self, batch: dict, targets: list[torch.Tensor]) -> tuple:
        """Returns what the network makes of a batch, at each scale where it is deeply supervised, and its loss."""
        images = batch["data"].to(self.device, non_blocking=True)
        with self.autocast():
            output = self.network(images)
            return output, self.loss(output, targets if self.enable_deep_supervision else targets[0])

    def train_step(self, batch: dict) -> dict:
        """Takes one step."""
        # nnU-Net 2.8.1 train_step; changed: the precision
        targets = self.targets(batch)
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.output_and_loss(batch, targets)[1]
        self.optimize(loss, max_norm=12)
        return {"loss": loss.detach().cpu().numpy()}

    def is_annotated(self, batch: dict) -> torch.Tensor:
        """Returns (B, C) bool: whether somebody looked for an output's label in a case."""
        return torch.ones(len(batch["data"]), self.label_manager.num_segmentation_heads, dtype=torch.bool)

    def validation_step(self, batch: dict) -> dict:
        """Computes the loss, and counts hard predictions where somebody looked."""
        # nnU-Net 2.8.1 validation_step; changed: the precision, the counts
        targets = self.targets(batch)
        output, loss = self.output_and_loss(batch, targets)
        finest = output[0] if self.enable_deep_supervision else output
        tp, fp, fn = hard_counts(finest, targets[0], self.is_annotated(batch), self.label_manager)
        return {"loss": loss.detach().cpu().numpy(), "tp_hard": tp, "fp_hard": fp, "fn_hard": fn}

    def trained_networks(self) -> list[torch.nn.Module]:
        """Returns the networks that learn, each of which has its gradient's norm clipped."""
        return [self.network]

    def optimize(self, loss: torch.Tensor, max_norm: float) -> None:
        """Takes one optimizer step, as nnU-Net's train_step ends, with a gradient norm of the caller's choice."""
        self.backward(loss)
        self.update(max_norm)

    def backward(self, loss: torch.Tensor) -> None:
        """Adds to the gradients; the first half of `optimize`."""
        (loss if self.grad_scaler is None else self.grad_scaler.scale(loss)).backward()

    def update(self, max_norm: float) -> None:
        """Moves the weights; the second half of `optimize`."""
        if self.grad_scaler is not None:
            self.grad_scaler.unscale_(self.optimizer)
        for network in self.trained_networks():
            torch.nn.utils.clip_grad_norm_(network.parameters(), max_norm)
        if self.grad_scaler is None:
            self.optimizer.step()
            return
        self.grad_scaler.step(self.optimizer)
        self.grad_scaler.update()
