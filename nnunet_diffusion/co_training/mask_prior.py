"""A diffusion model of true masks on the condition of the image: it learns what shapes organs have.

    mask pathway S    [noised mask || image] -> logits of the mask, at any timestep

As A&D (Wang and Li 2023, arXiv 2310.11320) trains its diffusion decoder: on noised true masks, to predict the mask;
samples of it are averaged with a plain prediction. A mask is 2 p - 1 in every class, so that the blank mask, 0, is as
far from yes as from no. The network is the planned topology, conditioned through its norms, as the denoiser is.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nnunet_diffusion.co_training.mask_diffusion import Draw, scale_images
from nnunet_diffusion.pretraining.conditioning import Denoiser
from nnunet_diffusion.pretraining.process import add_noise, alpha_bar_schedule, per_sample
from nnunet_diffusion.pretraining.sampler import ddim


class MaskPrior(nn.Module):
    """Mask pathway and process.

    Args:
        pathway: Its input channels are those of the mask, then those of the image.
        classes: Background included.
        schedule: Of the noise.
    """

    def __init__(self, pathway: Denoiser, classes: int, schedule: str = "sigmoid"):
        super().__init__()
        self.pathway, self.classes = pathway, classes
        self.register_buffer("alpha_bar", alpha_bar_schedule(schedule).float())

    def calibrate(self, scale: Tensor, image_range: Tensor) -> None:
        """Sets the units of the images, (C,)."""
        scale_images(self.pathway, scale)

    def draw(self, images: Tensor) -> Draw:
        """Draws timesteps, and noise for the masks of images (B, C, X, Y[, Z])."""
        noise = torch.randn((len(images), self.classes, *images.shape[2:]), device=images.device)
        return Draw(torch.randint(len(self.alpha_bar), (len(images),), device=images.device), noise)

    def encode(self, labels: Tensor) -> Tensor:
        """Returns the mask (B, classes, X, Y[, Z]) of labels (B, 1, X, Y[, Z]); other values than classes are blank."""
        is_known = (labels >= 0) & (labels < self.classes)
        one_hot = F.one_hot(torch.where(is_known, labels, 0)[:, 0].long(), self.classes).movedim(-1, 1).float()
        return torch.where(is_known, 2 * one_hot - 1, 0)

    def denoise(self, images: Tensor, labels: Tensor, draw: Draw) -> Tensor:
        """Returns the logits (B, classes, X, Y[, Z]) that it makes of noised true labels (B, 1, X, Y[, Z])."""
        x_t = add_noise(self.encode(labels), draw.noise, self.alpha_bar[draw.timestep])
        return self.logits(x_t, images, draw.timestep)

    def logits(self, x_t: Tensor, images: Tensor, timestep: Tensor) -> Tensor:
        """Maps noised masks and normalized images to logits of the mask."""
        return self.pathway(self.pathway.scaled(torch.cat([x_t, images], 1)), timestep)

    @torch.no_grad()
    def sample(self, images: Tensor, steps: int) -> Tensor:
        """Draws masks of images by DDIM.

        Args:
            images: (B, C, X, Y[, Z]).
            steps: Noise levels visited.

        Returns:
            (B, classes, X, Y[, Z]) probabilities, of the last step.
        """

        def noise_in(x_t: Tensor, timestep: Tensor) -> Tensor:
            mask = 2 * self.logits(x_t, images, timestep).float().softmax(1) - 1
            a = per_sample(self.alpha_bar[timestep], x_t)
            return (x_t - a.sqrt() * mask) / (1 - a).sqrt()

        return (ddim(noise_in, self.draw(images).noise, self.alpha_bar, steps=steps) + 1) / 2
