"""Stage 2 of mutual learning: one network of all organs for each group of cases, from completed labels."""

import torch
from batchgenerators.utilities.file_and_folder_operations import join
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunet_diffusion.model_folder import unwrap
from nnunet_diffusion.mutual.dataset import CompletedDataset, completed_folder
from nnunet_diffusion.mutual.groups import KEY
from nnunet_diffusion.mutual.losses import GroupedBatch, SimilarityLoss
from nnunet_diffusion.mutual.network import FullOrganMembers, alike
from nnunet_diffusion.mutual.validation import add_members, patient_group
from nnunet_diffusion.partial.annotations import group_map
from nnunet_diffusion.rounds.pseudo_labels import ignoring
from nnunet_diffusion.trainers.MutualDifferenceTrainer import MutualDifferenceTrainer


class MutualSimilarityTrainer(MutualDifferenceTrainer):
    """K planned networks, one for each group of cases, all learn every organ.

    Each learns from its own group's cases, completed by the networks of stage 1, from the other groups' true labels,
    and from what the other networks predict and see: mutual similarity learning of Liu et al. 2024 (arXiv 2407.12611),
    abstract; the formulas are our reconstruction. The model folder predicts with the mean of their probabilities.
    """

    supervised_share: float = 0.0  # the predictions of the others ramp up from the first epoch on
    validate_members: bool = True  # the final validation predicts with every member as well
    members_loss_class = SimilarityLoss

    def prepare(self):
        """Ignores what a completed label says nothing about."""
        super().prepare()
        self.label_manager = ignoring(self.label_manager)

    @staticmethod
    def build_network_architecture(
        plans_manager, configuration_manager, num_input_channels, num_output_channels, enable_deep_supervision=True
    ):
        """Builds a planned network for each group, all with the same first weights."""
        arguments = (plans_manager, configuration_manager, num_input_channels, num_output_channels)
        members = alike(nnUNetTrainer.build_network_architecture(*arguments, False), len(plans_manager.plans[KEY]))
        return FullOrganMembers(members, enable_deep_supervision)

    def get_tr_and_val_datasets(self):
        """Gives training cases their completed labels beside the true ones."""
        train, validation = super().get_tr_and_val_datasets()
        base, identifier = self.preprocessed_dataset_folder_base, self.configuration_manager.data_identifier
        folder = completed_folder(base, identifier, self.plans_manager.plans_name, self.configuration_name, self.fold)
        train = CompletedDataset(train, folder, self.annotations)
        self.completed = train.completed
        return train, validation

    def describe(self, batch: dict) -> GroupedBatch:
        """Adds what the completed labels say, which is more than the true ones do."""
        about = group_map(batch["keys"], self.completed, self.channels)
        return super().describe(batch)._replace(completed_annotation=about)

    def perform_actual_validation(self, save_probabilities: bool = False):
        """Validates the mean; then each member, into a folder of its own."""
        super().perform_actual_validation(save_probabilities)
        if not self.validate_members:
            return
        network, output_folder = unwrap(self.network), self.output_folder
        together = patient_group() if self.is_ddp else None
        try:
            for member in range(len(network)):
                if together is not None:  # the first process still evaluates what all have predicted
                    torch.distributed.barrier(together)
                network.only, self.output_folder = member, join(output_folder, f"member_{member}")
                self.print_to_log_file(f"Validation of member {member} alone")
                super().perform_actual_validation()
        finally:
            network.only, self.output_folder = None, output_folder
        if self.local_rank == 0:
            self.print_to_log_file(add_members(output_folder, self.plans_manager.plans[KEY]))
