"""Samplers: functions from a denoiser and noise to images."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from nnunet_diffusion.pretraining.process import estimate


@torch.no_grad()
def ddim(
    predict: Callable[[Tensor, Tensor], Tensor],
    x_T: Tensor,
    alpha_bar: Tensor,
    prediction: str = "epsilon",
    steps: int = 50,
    eta: float = 0.0,
    clip: tuple[Tensor, Tensor] | None = None,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
) -> Tensor:
    """Draws images by DDIM (Song et al. 2021, Eq. 12 and 16); eta = 1 over all steps is DDPM's ancestral sampler.

    Args:
        predict: (x_t, t) -> what `prediction` names; x_t (B, C, X, Y[, Z]), t (B,) int64.
        x_T: (B, C, X, Y[, Z]) standard normal noise.
        alpha_bar: (T,) the schedule.
        prediction: "epsilon" or "v".
        steps: How many of the T noise levels are visited, evenly from the noisiest to 0.
        eta: Share of fresh noise, 0 is deterministic.
        clip: Lowest and highest value that estimates of x_0 may have, in units of x_0; each one number, or one a
            channel, (1, C, 1, 1[, 1]).
        generator: Source of the fresh noise; with one for each sample, its noise does not depend on the batch.

    Returns:
        x_0, of the shape of `x_T`.
    """
    alpha_bar = alpha_bar.to(x_T.device)
    visited = torch.linspace(len(alpha_bar) - 1, 0, steps, device=x_T.device).round().long()
    x = x_T
    for i, t in enumerate(visited):
        a = alpha_bar[t].expand(len(x))
        a_next = alpha_bar[visited[i + 1]] if i + 1 < steps else torch.ones_like(alpha_bar[0])
        x_0, noise = estimate(prediction, predict(x, t.expand(len(x))), x, a)
        if clip is not None:
            x_0 = x_0.clamp(*clip)
            noise = (x - alpha_bar[t].sqrt().to(x) * x_0) / (1 - alpha_bar[t]).sqrt().to(x)
        sigma = eta * ((1 - a_next) / (1 - alpha_bar[t]) * (1 - alpha_bar[t] / a_next)).clamp(min=0).sqrt()
        x = a_next.sqrt().to(x) * x_0 + (1 - a_next - sigma**2).clamp(min=0).sqrt().to(x) * noise
        if eta > 0 and i + 1 < steps:
            x = x + sigma.to(x) * _standard_normal(x, generator)
    return x


def _standard_normal(like: Tensor, generator: torch.Generator | Sequence[torch.Generator] | None) -> Tensor:
    if isinstance(generator, Sequence):
        return torch.stack([torch.randn(like.shape[1:], generator=each) for each in generator]).to(like)
    return torch.randn(like.shape, generator=generator, device=like.device, dtype=like.dtype)
