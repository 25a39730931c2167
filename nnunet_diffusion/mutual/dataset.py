"""Training cases with two label maps: what somebody annotated, and what networks of other groups made of it."""

from collections.abc import Mapping

import numpy as np
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetBaseDataset

from nnunet_diffusion.errors import UserError
from nnunet_diffusion.partial.annotations import Annotation
from nnunet_diffusion.rounds.pseudo_labels import PseudoLabelDataset, pseudo_folder, usable_pseudo_labels


def completed_folder(base: str, data_identifier: str, plans: str, configuration: str, fold: int | str) -> str:
    """Says where the completed labels of a fold's training cases are.

    Args:
        base: The data set's folder in nnUNet_preprocessed.
        data_identifier: Of the configuration; several plans and configurations may share preprocessed data.
        plans: Name of the plans.
        configuration: Its name.
        fold: A number, or all.
    """
    return pseudo_folder(base, data_identifier, f"mutual__{plans}__{configuration}__fold_{fold}")


class Stacked:
    """Arrays of one channel as one of several, (N, X, Y, Z), read when it is indexed."""

    def __init__(self, *arrays):
        self.arrays, self.shape = arrays, (len(arrays), *arrays[0].shape[1:])

    def __getitem__(self, index) -> np.ndarray:
        """Returns a part of all of them; the first index is not theirs."""
        return np.concatenate([array[(slice(None), *index[1:])] for array in self.arrays])


class CompletedDataset(PseudoLabelDataset):
    """nnU-Net's data set of training cases, whose labels have two channels: true and completed.

    Attributes:
        completed: {case: what its completed labels say something about}.
    """

    def __init__(self, annotated: nnUNetBaseDataset, folder: str, annotations: Mapping[str, Annotation]):
        """Puts them together.

        Args:
            annotated: nnU-Net's data set of the training cases.
            folder: Of their completed labels.
            annotations: What was annotated in each case.

        Raises:
            UserError: If a case was not completed, or completed when its annotation was another one.
        """
        super().__init__(annotated, dict.fromkeys(annotated.identifiers, annotated.source_folder), folder)
        self.completed = usable_pseudo_labels(folder, annotations)
        if lacking := sorted(set(self.identifiers) - set(self.completed)):
            raise UserError(
                f"{folder}: no completed labels of {len(lacking)} training case(s), such as {lacking[0]}, as they are "
                "annotated now: make them with `nnunet_diffusion mutual`"
            )

    def load_case(self, identifier: str) -> tuple:
        """Loads a case as nnU-Net does, with labels (2, X, Y, Z); foreground is drawn from the completed ones."""
        image, completed, _, properties = super().load_case(identifier)
        return image, Stacked(self.annotated.load_case(identifier)[1], completed), None, properties
