"""Two views of a patch without labels: as it is, for the teacher, and with strongly changed intensities.

FixMatch's pair of views (Sohn et al. 2020, arXiv 2001.07685), with nnU-Net's own augmentation of intensities.
"""

from copy import deepcopy

import torch
from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform, ImageOnlyTransform
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from batchgeneratorsv2.transforms.utils.nnunet_masking import MaskImageTransform
from batchgeneratorsv2.transforms.utils.random import RandomTransform
from torch import Tensor


class AddStrongView(ImageOnlyTransform):
    """Turns an image (C, X, Y[, Z]) into itself and its strong view (2C, X, Y[, Z]).

    Args:
        intensities: What changes the strong view.
    """

    def __init__(self, intensities: list[BasicTransform]):
        super().__init__()
        self.intensities = ComposeTransforms(intensities)

    def _apply_to_image(self, img: Tensor, **params) -> Tensor:
        return torch.cat([img, self.intensities(image=img.clone())["image"]])


def with_strong_view(transforms: ComposeTransforms, channels: int, probability: float) -> ComposeTransforms:
    """Returns nnU-Net's augmentation with intensities changed in a second view only, and there more often.

    Args:
        transforms: nnU-Net's for training.
        channels: Of an image.
        probability: Of each change of intensities; nnU-Net's are 0.1 to 0.3.

    Returns:
        The transforms, after which an image has twice the channels; both views are at the same place.
    """
    transforms, both, intensities = deepcopy(transforms), [], []
    for transform in transforms.transforms:
        if isinstance(transform, RandomTransform):
            transform.apply_probability = probability
            intensities.append(transform)
            continue
        if intensities:  # the changes of intensities stand in a row
            both.append(AddStrongView(intensities))
            intensities = []
        if isinstance(transform, MaskImageTransform):
            transform.apply_to_channels = [c + n for n in (0, channels) for c in transform.apply_to_channels]
        both.append(transform)
    assert any(isinstance(transform, AddStrongView) for transform in both), "nnU-Net changes no intensities"
    return ComposeTransforms(both)
