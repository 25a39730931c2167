"""A diffusion process and what is asked of a network in it: prediction, loss, samples."""

from collections.abc import Callable

import torch
from torch import Tensor

from nnunet_diffusion.diffusion import process
from nnunet_diffusion.diffusion.sampler import ddim

Network = Callable[[Tensor, Tensor], Tensor]


class Diffusion:
    """The functions of `process` under one choice of schedule, prediction and weighting.

    Raises:
        ValueError: If a choice is unknown.
    """

    def __init__(
        self,
        schedule: str = "linear",
        timesteps: int = 1000,
        prediction: str = "epsilon",
        weighting: str = "uniform",
        gamma: float = 5.0,
        device: torch.device | str = "cpu",
    ):
        self.alpha_bar = process.alpha_bar_schedule(schedule, timesteps).float().to(device)
        process.loss_weight(weighting, prediction, self.alpha_bar)
        process.prediction_target(prediction, *[torch.zeros(1)] * 2, self.alpha_bar[:1])
        self.prediction, self.weighting, self.gamma = prediction, weighting, gamma
        self.description = {"schedule": schedule, "timesteps": timesteps, "prediction": prediction}

    def predict(self, network: Network, x_t: Tensor, timestep: Tensor) -> Tensor:
        """The network's prediction in float32, with the mean that its instance norms cannot know."""
        return network(x_t, timestep).float() + process.patch_mean(self.prediction, x_t, self.alpha_bar[timestep])

    def loss(self, network: Network, x_0: Tensor, timestep: Tensor, noise: Tensor) -> Tensor:
        """The weighted mean squared error of the prediction.

        Args:
            network: (x_t, t) -> prediction.
            x_0: (B, C, X, Y[, Z]) images with unit second moment.
            timestep: (B,) int64.
            noise: Standard normal, of the shape of `x_0`.

        Returns:
            Scalar.
        """
        a = self.alpha_bar[timestep]
        output = self.predict(network, process.add_noise(x_0, noise, a), timestep)
        error = (output - process.prediction_target(self.prediction, x_0, noise, a)).square()
        weight = process.loss_weight(self.weighting, self.prediction, a, self.gamma)
        return (weight * error.flatten(1).mean(1)).mean()

    def sample(self, network: Network, x_T: Tensor, steps: int, **kwargs) -> Tensor:
        """Images drawn by DDIM; for the arguments see `sampler.ddim`."""
        return ddim(
            lambda x, t: self.predict(network, x, t), x_T, self.alpha_bar, self.prediction, steps=steps, **kwargs
        )
