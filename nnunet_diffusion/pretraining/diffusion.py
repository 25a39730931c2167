"""A diffusion process and what is asked of a network in it: prediction, loss, samples."""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from nnunet_diffusion.pretraining import process
from nnunet_diffusion.pretraining.images import ImageStatistics
from nnunet_diffusion.pretraining.sampler import ddim

Network = Callable[[Tensor, Tensor], Tensor]


class Diffusion:
    """The functions of `process` under one choice of schedule, prediction and weighting.

    Attributes:
        prior: Mean and standard deviation of the mean of a patch of x_0, each (C,) or for all channels (1,); see
            `process.patch_mean`. `calibrate` measures them.
    """

    def __init__(
        self,
        schedule: str = "linear",
        timesteps: int = 1000,
        prediction: str = "epsilon",
        weighting: str = "uniform",
        gamma: float = 5.0,
        device: torch.device | str = "cpu",
        prior: Sequence[Sequence[float]] = ((0.0,), (1.0,)),
    ):
        """Takes what `process` calls them.

        Raises:
            ValueError: If a choice is unknown.
        """
        self.alpha_bar = process.alpha_bar_schedule(schedule, timesteps).float().to(device)
        process.loss_weight(weighting, prediction, self.alpha_bar)
        process.prediction_target(prediction, *[torch.zeros(1)] * 2, self.alpha_bar[:1])
        self.prediction, self.weighting, self.gamma = prediction, weighting, gamma
        self.prior = tuple(torch.tensor(values, device=device) for values in prior)
        self.choices = {"schedule": schedule, "timesteps": timesteps, "prediction": prediction}

    @property
    def description(self) -> dict:
        """Describes the process, as the plain values that make the same again."""
        return {**self.choices, "prior": [values.tolist() for values in self.prior]}

    def calibrate(
        self, networks: Sequence[nn.Module], statistics: ImageStatistics, patches: Iterable[Tensor], noise: float = 1.0
    ) -> None:
        """Measures noise in what varies inside the body, and learns what mean a patch has.

        Args:
            networks: Denoisers or pairs of pathways, which are told the units and the range.
            statistics: Of the images.
            patches: Batches (B, C, X, Y[, Z]) in the plan's normalization, as they are trained on.
            noise: Noise of unit variance is this many times the spread in the body.
        """
        scale = torch.as_tensor(statistics.spread, dtype=torch.float32) * noise
        for network in networks:
            network.calibrate(scale, torch.tensor([statistics.low, statistics.high]))
        means = torch.cat([batch.flatten(2).mean(2) for batch in patches]).float() / scale
        self.prior = tuple(value.to(self.alpha_bar.device) for value in (means.mean(0), means.std(0, correction=0)))

    def predict(self, network: Network, x_t: Tensor, timestep: Tensor) -> Tensor:
        """Returns the network's prediction in float32, with the mean that its instance norms cannot know."""
        mean = process.patch_mean(self.prediction, x_t, self.alpha_bar[timestep], self.prior)
        return network(x_t, timestep).float() + mean

    def loss(
        self, network: Network, x_0: Tensor, timestep: Tensor, noise: Tensor, is_scan: Tensor | None = None
    ) -> Tensor:
        """Computes the weighted mean squared error of the prediction.

        Args:
            network: (x_t, t) -> prediction.
            x_0: (B, C, X, Y[, Z]) images.
            timestep: (B,) int64.
            noise: Standard normal, of the shape of `x_0`.
            is_scan: (B, 1, X, Y[, Z]) bool, False where a patch was padded, which teaches nothing; None: all is scan.

        Returns:
            Scalar; a sample's error is the mean over its scan.
        """
        a = self.alpha_bar[timestep]
        output = self.predict(network, process.add_noise(x_0, noise, a), timestep)
        error = (output - process.prediction_target(self.prediction, x_0, noise, a)).square()
        weight = process.loss_weight(self.weighting, self.prediction, a, self.gamma)
        error = error.mean(1, keepdim=True)
        counts = torch.ones_like(error) if is_scan is None else is_scan.to(error)
        mean_error = (error * counts).flatten(1).sum(1) / counts.flatten(1).sum(1).clamp_min(1)
        return (weight * mean_error).mean()

    def sample(self, network: Network, x_T: Tensor, steps: int, **kwargs) -> Tensor:
        """Draws images by DDIM from standard normal x_T; for the arguments see `sampler.ddim`."""
        x_T = process.with_spread_means(x_T, self.alpha_bar[-1:].expand(len(x_T)), self.prior)
        return ddim(
            lambda x, t: self.predict(network, x, t), x_T, self.alpha_bar, self.prediction, steps=steps, **kwargs
        )
