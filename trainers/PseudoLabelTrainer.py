"""Trains on annotated cases and on those that a round of pseudo labels kept."""

from batchgenerators.utilities.file_and_folder_operations import isfile, join

from nnunet_diffusion.errors import UserError
from nnunet_diffusion.partial.annotations import balanced_cases
from nnunet_diffusion.preprocessing.cases import pool_folder, pool_identifiers, read_splits
from nnunet_diffusion.rounds.pseudo_labels import (
    PseudoLabelDataset,
    ignoring,
    pseudo_folder,
    usable_pseudo_labels,
    with_annotated_share,
)
from nnunet_diffusion.trainers.DiffusionPretrainedTrainer import DiffusionPretrainedTrainer


class PseudoLabelTrainer(DiffusionPretrainedTrainer):
    """nnU-Net on true labels and pseudo labels; what a pseudo label says nothing about, it does not teach.

    Cases with pseudo labels are never validated on.
    """

    pseudo_labels: str = ""  # folder below <data_identifier>_pseudo, such as nnUNetPlans__2d__fold_{fold}/round_1
    annotated_share: float = 0.5  # of the training cases that are drawn; 0: every case equally often
    balanced: bool = False  # in the place of annotated_share

    def initialize(self):
        """Reads what the pseudo labels say something about."""
        if self.is_cascaded:
            raise UserError(
                f"{self.configuration_name} is a cascade's second stage, and the pool has no prediction of the first: "
                "train pseudo labels in a configuration without a previous stage"
            )
        self.label_manager = ignoring(self.label_manager)
        super().initialize()
        self.pseudo = {}
        if self.pseudo_labels:
            names = self.pseudo_labels.replace("{fold}", str(self.fold)).split("/")
            identifier = self.configuration_manager.data_identifier
            self.pseudo_folder = pseudo_folder(self.preprocessed_dataset_folder_base, identifier, *names)
            self.pseudo = usable_pseudo_labels(self.pseudo_folder, self.annotations)
            if not self.pseudo:
                raise UserError(f"{self.pseudo_folder} has no pseudo labels: make them with nnunet_diffusion rounds")

    def do_split(self):
        """Splits as nnU-Net; annotated cases that came after the splits were made are trained on, in every fold."""
        train, validation = super().do_split()
        splits = join(self.preprocessed_dataset_folder_base, "splits_final.json")
        split = {*train, *validation}
        if self.fold != "all" and isfile(splits):
            split.update(case for parts in read_splits(splits) for part in ("train", "val") for case in parts[part])
        return [*train, *sorted(set(self.annotations) - split)], validation

    def find_images(self) -> dict[str, str]:
        """Finds the folder of each image that has a pseudo label: a partly annotated case lies with its true labels."""
        pool = pool_folder(self.preprocessed_dataset_folder_base, self.configuration_manager.data_identifier)
        if missing := sorted(set(self.pseudo) - set(self.annotations) - set(pool_identifiers(pool))):
            raise UserError(f"{self.pseudo_folder} has labels of {missing}, whose images are not in {pool}: preprocess")
        return {case: self.preprocessed_dataset_folder if case in self.annotations else pool for case in self.pseudo}

    def get_tr_and_val_datasets(self):
        """Adds the cases with pseudo labels to those trained on."""
        train, validation = super().get_tr_and_val_datasets()
        if not self.pseudo:
            return train, validation
        if self.fold != "all" and (seen := sorted(set(self.pseudo) & set(validation.identifiers))):
            raise UserError(f"{self.pseudo_folder} has labels of {seen}, which fold {self.fold} is validated on")
        annotated = set(train.identifiers)
        train = PseudoLabelDataset(train, self.find_images(), self.pseudo_folder)
        if self.balanced:
            train.identifiers = balanced_cases(train.identifiers, self.annotations | self.pseudo)
        else:
            train.identifiers = with_annotated_share(train.identifiers, annotated, self.annotated_share)
        self.print_to_log_file(f"{len(annotated)} annotated cases, {len(self.pseudo)} cases with pseudo labels")
        return train, validation

    def train_step(self, batch: dict) -> dict:
        """Takes one step on annotations and pseudo labels; validation goes by the annotations alone."""
        annotations, self.annotations = self.annotations, self.annotations | self.pseudo
        try:
            return super().train_step(batch)
        finally:
            self.annotations = annotations
