"""Feature extractors for generated images; each has a name that goes with its figures."""

import os
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nnunet_diffusion.errors import UserError
from nnunet_diffusion.pretraining.conditioning import Denoiser, fold
from nnunet_diffusion.records import sha256

INCEPTION_FILE = "inception_v3_google-0cc3c7bd.pth"  # torchvision's name for its weights
SPATIAL_CHANNELS = 7  # the first ones, as in sFID (Nash et al. 2021)
GRID = {2: (8, 8), 3: (4, 4, 4)}  # of spatial features of an encoder; ours


@dataclass(frozen=True)
class Extractor:
    """What images are compared by.

    Attributes:
        name: Says all that decides the figures.
        extract: (B, C, X, Y[, Z]) images in the plan's normalization -> pooled (B, d) and spatial (B, s) features.
    """

    name: str
    extract: Callable[[Tensor], tuple[Tensor, Tensor]]


def encoder_features(denoiser: Denoiser, timestep: int, identity: str) -> Extractor:
    """Takes the denoiser's own encoder, folded at a timestep: needs no download, knows CT; our choice.

    Pooled: the mean over space of its deepest stage. Spatial: the first seven channels of its middle stage, averaged to
    a grid of 8 x 8 or 4 x 4 x 4. It was trained on such images as it judges, so it may be lenient with its own faults.

    Args:
        denoiser: Stays as it is.
        timestep: To fold at.
        identity: Says which denoiser, for the name.
    """
    encoder = fold(denoiser, timestep).encoder.eval()
    device = denoiser.input_scale.device

    @torch.no_grad()
    def extract(images: Tensor) -> tuple[Tensor, Tensor]:
        stages = encoder(images.to(device))
        axes = tuple(range(2, images.ndim))
        pool = F.adaptive_avg_pool2d if len(axes) == 2 else F.adaptive_avg_pool3d
        middle = pool(stages[len(stages) // 2][:, :SPATIAL_CHANNELS], GRID[len(axes)])
        return stages[-1].mean(axes).cpu(), middle.flatten(1).cpu()

    return Extractor(f"encoder of denoiser {identity}, folded at timestep {timestep}", extract)


def inception_features(path: str | None, value_range: tuple[float, float], device: torch.device | str) -> Extractor:
    """Takes torchvision's Inception v3: pooled features (2048) and, spatial, seven channels of Mixed_6d (17 x 17 x 7).

    Published FIDs use another training of it (TensorFlow's of 2015) with other resizing: not the same figures. The
    first channel is shown to it in gray levels, of 3-D patches the middle slice of the first axis.

    Args:
        path: State dict; None looks into torch's cache.
        value_range: Of the plan's normalization, shown from black to white.
        device: To compute on.

    Raises:
        UserError: If there are no such weights.
    """
    from torchvision.models import inception_v3

    path = path or os.path.join(torch.hub.get_dir(), "checkpoints", INCEPTION_FILE)
    if not os.path.isfile(path):
        raise UserError(
            f"there is no {path}: give torchvision's weights ({INCEPTION_FILE} on download.pytorch.org/models) with "
            "--inception_weights, or take --features encoder, which needs no download"
        )
    network = inception_v3(weights=None, aux_logits=False, transform_input=False, init_weights=False)
    network.fc = nn.Identity()
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
        network.load_state_dict({k: v for k, v in weights.items() if not k.startswith(("AuxLogits.", "fc."))})
    except Exception as error:  # any file may have been given
        message = str(error).splitlines()[0]
        raise UserError(f"{path} holds no state dict of torchvision's inception_v3 ({message})") from error
    network.to(device).eval()
    spatial = []
    network.Mixed_6d.register_forward_hook(lambda module, inputs, output: spatial.append(output[:, :SPATIAL_CHANNELS]))

    @torch.no_grad()
    def extract(images: Tensor) -> tuple[Tensor, Tensor]:
        pooled = network(_gray_levels(images.to(device), *value_range))
        return pooled.cpu(), spatial.pop().flatten(1).cpu()

    return Extractor(f"torchvision Inception v3, weights {sha256(path)[:12]}", extract)


def _gray_levels(images: Tensor, low: float, high: float) -> Tensor:
    """Maps (B, C, X, Y[, Z]) to (B, 3, 299, 299) in [-1, 1], as these weights were trained."""
    images = images[:, :1] if images.ndim == 4 else images[:, :1, images.shape[2] // 2]
    images = ((images - low) / (high - low)).clamp(0, 1) * 2 - 1
    images = F.interpolate(images, size=(299, 299), mode="bilinear", align_corners=False, antialias=True)
    return images.expand(-1, 3, -1, -1)
