"""Stage 1 of mutual learning: one network for each group of cases, of the organs that the group annotates."""

import itertools

import torch
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.default_n_proc_DA import get_allowed_n_proc_DA

from nnunet_diffusion.errors import UserError
from nnunet_diffusion.model_folder import unwrap
from nnunet_diffusion.mutual.groups import KEY, GroupedLoader, find_groups, owned_channels, too_small
from nnunet_diffusion.mutual.losses import DifferenceLoss, GroupedBatch
from nnunet_diffusion.mutual.network import PartialOrganMembers, alike
from nnunet_diffusion.mutual.terms import ramp_up
from nnunet_diffusion.partial.annotations import group_map
from nnunet_diffusion.pretraining.images import in_background
from nnunet_diffusion.settings import at_least, between
from nnunet_diffusion.trainers.PartialLabelTrainer import PartialLabelTrainer


class MutualDifferenceTrainer(PartialLabelTrainer):
    """K planned networks, one for each group of cases with the same annotated labels, learn from their own group.

    From the other groups' labels and features they learn what their organs are not: mutual difference learning of Liu
    et al. 2024 (arXiv 2407.12611), abstract; the formulas are our reconstruction. The model folder predicts every
    organ with the network of its group.
    """

    exclusion_weight: float = 0.0  # the prediction difference says it, too
    balanced: bool = False  # batches are drawn from all groups alike
    groups: list = []  # [[label, ...], ...]; empty: every set of labels that a training case annotates is a group
    prediction_weight: float = 1.0  # of the term between predictions
    feature_weight: float = 0.1  # of the term between features
    supervised_share: float = 0.2  # of the epochs: before it a member learns nothing from others
    ramp_share: float = 0.2  # of the epochs, in which what it learns from others ramps up
    feature_stage: int = 1  # of the decoder, 0 is the finest
    checkpointing: bool = False  # keep no activations: K networks train in little more memory than one, and slower
    alternate: bool = False  # one member learns in a step, in turn: as little memory, a K-th of the steps for each
    allowed_values = {
        **dict.fromkeys(("prediction_weight", "feature_weight", "feature_stage"), at_least(0)),
        **dict.fromkeys(("supervised_share", "ramp_share"), between(0, 1)),
    }
    members_loss_class = DifferenceLoss

    def prepare(self):
        """Refuses regions, cascades, and `alternate` in several processes."""
        name = type(self).__name__
        if self.label_manager.has_regions:
            raise UserError(f"{name}: regions overlap, mutual learning is between labels that do not")
        if self.is_cascaded:
            raise UserError(f"{name}: {self.configuration_name} is a cascade's second stage: train another one")
        if self.is_ddp and self.alternate:
            raise UserError(f"{name}: alternate works in one process only: use the setting checkpointing")

    @staticmethod
    def build_network_architecture(
        plans_manager, configuration_manager, num_input_channels, num_output_channels, enable_deep_supervision=True
    ):
        """Builds a planned network for each group, all with the same first weights."""
        arguments = (plans_manager, configuration_manager, num_input_channels, num_output_channels)
        members = alike(nnUNetTrainer.build_network_architecture(*arguments, False), len(plans_manager.plans[KEY]))
        return PartialOrganMembers(members, num_output_channels, enable_deep_supervision)

    def initialize(self):
        """Marks who owns what."""
        super().initialize()
        network = unwrap(self.network)
        network.feature_stage, network.checkpointing = self.feature_stage, self.checkpointing
        owned = owned_channels(self.plans_manager.plans[KEY], self.channels)
        if isinstance(network, PartialOrganMembers):
            network.owned.copy_(owned)  # it predicts each organ with its owner
        weights = (self.prediction_weight, self.feature_weight)
        self.members_loss = self.members_loss_class(self.loss, owned, self.label_manager.ignore_label, *weights)

    def _set_batch_size_and_oversample(self):
        """Finds the groups; a batch holds every one."""
        super()._set_batch_size_and_oversample()
        training, _ = self.do_split()
        found = find_groups({case: self.annotations[case] for case in training}, self.channels, self.groups)
        self.cases_of_groups = [group.cases for group in found]
        self.group_of = {case: k for k, group in enumerate(found) for case in group.cases}
        self.plans_manager.plans[KEY] = [list(group.labels) for group in found]
        for k, group in enumerate(found):
            self.print_to_log_file(f"Member {k}: {len(group.cases)} cases annotated for {', '.join(group.labels)}")
        if self.batch_size < len(found):
            self.print_to_log_file(
                f"WARNING: a batch of {self.batch_size} patches cannot hold {len(found)} groups: it is raised to "
                f"{len(found)}, one of each group, and needs more memory: give the plan a batch_size of {len(found)} "
                "or more for each process"
            )
            self.batch_size = len(found)
        for problem in too_small(found, self.batch_size):
            self.print_to_log_file(f"WARNING: {problem}")

    def planned_networks(self) -> list:
        """Returns the members: every one can start from a denoiser."""
        return list(unwrap(self.network).members)

    def set_deep_supervision_enabled(self, enabled: bool):
        """Chooses the members' outputs at all scales, or the finest."""
        unwrap(self.network).deep_supervision = enabled

    def get_dataloaders(self):
        """Builds nnU-Net's loaders, but training batches hold cases of every group."""
        # nnU-Net 2.8.1 get_dataloaders; changed: the training loader, what regions and cascades need
        augmentation = self.configure_rotation_dummyDA_mirroring_and_inital_patch_size()
        rotation, dummy_2d, sampled_size, mirror_axes = augmentation
        patch_size, scales = self.configuration_manager.patch_size, self._get_deep_supervision_scales()
        ignore = self.label_manager.ignore_label
        train_transforms = self.get_training_transforms(
            patch_size, rotation, scales, mirror_axes, dummy_2d,
            use_mask_for_norm=self.configuration_manager.use_mask_for_norm, ignore_label=ignore,
        )  # fmt: skip
        transforms = self.get_validation_transforms(scales, ignore_label=ignore)
        train, validation = self.get_tr_and_val_datasets()
        sampling = {
            "oversample_foreground_percent": self.oversample_foreground_percent,
            "probabilistic_oversampling": self.probabilistic_oversampling,
        }
        loader = GroupedLoader(
            self.cases_of_groups, train, self.batch_size, sampled_size, patch_size, self.label_manager,
            transforms=train_transforms, **sampling,
        )  # fmt: skip
        validation_loader = nnUNetDataLoader(
            validation, self.batch_size, patch_size, patch_size, self.label_manager,
            transforms=transforms, **sampling,
        )  # fmt: skip
        workers, pin = get_allowed_n_proc_DA(), self.device.type == "cuda"
        loaders = in_background(loader, workers, 6, pin), in_background(validation_loader, (workers + 1) // 2, 3, pin)
        for batches in loaders:
            next(batches)  # starts the workers
        return loaders

    def on_train_epoch_start(self):
        """Says how strongly members teach each other."""
        super().on_train_epoch_start()
        self.turns = itertools.count(self.current_epoch * self.num_iterations_per_epoch)
        epochs = self.num_epochs
        self.strength = ramp_up(self.current_epoch, self.supervised_share * epochs, self.ramp_share * epochs)
        self.print_to_log_file(f"Strength of mutual learning: {self.strength:.3f}")

    def train_step(self, batch: dict) -> dict:
        """Takes one step of all members, or of the one whose turn it is."""
        # nnU-Net 2.8.1 train_step; changed: several networks
        data = batch["data"].to(self.device, non_blocking=True)
        grouped = self.describe(batch)
        members = len(self.cases_of_groups)
        learners = [next(self.turns) % members] if self.alternate else range(members)
        unwrap(self.network).learner = learners[0] if self.alternate else None
        self.optimizer.zero_grad(set_to_none=True)
        with self.autocast():
            outputs = self.network(data)
            loss = self.members_loss(outputs, grouped, learners, self.strength)
        self.optimize(loss, max_norm=12 * len(learners) ** 0.5)
        return {"loss": (loss.detach() / len(learners)).cpu().numpy()}

    def describe(self, batch: dict) -> GroupedBatch:
        """Describes a batch: its targets, what they say something about, and whose they are."""
        return GroupedBatch(
            self.targets(batch),
            group_map(batch["keys"], self.annotations, self.channels),
            torch.tensor([self.group_of[case] for case in batch["keys"]]),
        )
