"""The diffusion process: schedules, noising, targets and loss weights, each a pure function.

Symbols follow Ho et al. 2020 (DDPM, arXiv 2006.11239): x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps.
`alpha_bar` arguments hold one value a sample and broadcast over channels and space.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

SCHEDULES = ("linear", "cosine", "sigmoid")
PREDICTIONS = ("epsilon", "v")
WEIGHTINGS = ("uniform", "min_snr")


def alpha_bar_schedule(schedule: str, timesteps: int = 1000) -> Tensor:
    """Returns the signal power alpha_bar_t that is left at each timestep.

    Args:
        schedule: "linear" (Ho et al. 2020, Sec. 4: beta 1e-4..0.02 at 1000 steps, scaled for other lengths),
            "cosine" (Nichol and Dhariwal 2021, Eq. 17, s = 0.008, beta at most 0.999) or
            "sigmoid" (Jabri et al. 2022, arXiv 2212.11972, start -3, end 3, tau 1; beta at most 0.999).
        timesteps: T, the number of noise levels.

    Returns:
        (T,) float64, falling, in (0, 1).

    Raises:
        ValueError: If the schedule is unknown or T is not positive.
    """
    if timesteps < 1:
        raise ValueError(f"timesteps is {timesteps}: it must be at least 1")
    u = torch.linspace(0, 1, timesteps + 1, dtype=torch.float64)
    if schedule == "linear":
        scale = 1000 / timesteps
        betas = torch.linspace(1e-4 * scale, min(0.02 * scale, 0.999), timesteps, dtype=torch.float64)
        return torch.cumprod(1 - betas, 0)
    if schedule == "cosine":
        power = torch.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
    elif schedule == "sigmoid":
        power = torch.sigmoid(3 - 6 * u) - torch.sigmoid(torch.tensor(-3.0, dtype=torch.float64))
    else:
        raise ValueError(f"schedule is {schedule!r}: it must be one of {SCHEDULES}")
    betas = (1 - power[1:] / power[:-1]).clamp(max=0.999)
    return torch.cumprod(1 - betas, 0)


def per_sample(values: Tensor, like: Tensor) -> Tensor:
    """Reshapes (B,) values to (B, 1, ..., 1) in the type of `like`, so that they broadcast over it."""
    return values.to(like).reshape(-1, *[1] * (like.ndim - 1))


def per_channel(prior: tuple[Tensor, Tensor], like: Tensor) -> list[Tensor]:
    """Reshapes (C,) values to (1, C, 1, ..., 1) in the type of `like`, so that they broadcast over it."""
    return [values.to(like).reshape(1, -1, *[1] * (like.ndim - 2)) for values in prior]


def add_noise(x_0: Tensor, noise: Tensor, alpha_bar: Tensor) -> Tensor:
    """Computes x_t of Ho et al. 2020, Eq. 4; all (B, C, X, Y[, Z]), `alpha_bar` (B,)."""
    a = per_sample(alpha_bar, x_0)
    return a.sqrt() * x_0 + (1 - a).sqrt() * noise


def prediction_target(prediction: str, x_0: Tensor, noise: Tensor, alpha_bar: Tensor) -> Tensor:
    """Returns the target: the noise, or v = sqrt(a) eps - sqrt(1 - a) x_0 (Salimans and Ho 2022, Sec. 4)."""
    if prediction == "epsilon":
        return noise
    if prediction == "v":
        a = per_sample(alpha_bar, x_0)
        return a.sqrt() * noise - (1 - a).sqrt() * x_0
    raise ValueError(f"prediction is {prediction!r}: it must be one of {PREDICTIONS}")


def patch_mean(prediction: str, x_t: Tensor, alpha_bar: Tensor, prior: tuple[Tensor, Tensor]) -> Tensor:
    """Computes the patch mean of what is predicted, estimated from that of the noised image; our reconstruction.

    Instance normalization removes the mean of a patch, so a normalized network can neither see nor predict it; samples
    would keep the brightness of the noise that they started from. mean(x_t) = sqrt(a) mean(x_0) + sqrt(1 - a)
    mean(eps), where mean(eps) has variance 1 / N over N voxels and mean(x_0) is taken to be normally distributed over
    patches, with mean m and standard deviation s: the Wiener estimate of mean(eps) follows, and with it that of
    v = (eps - sqrt(1 - a) x_t) / sqrt(a).

    Args:
        prediction: "epsilon" or "v".
        x_t: (B, C, X, Y[, Z]) noised images.
        alpha_bar: (B,).
        prior: m and s, each (C,).

    Returns:
        (B, C, 1, 1[, 1]), to be added to the network's output.
    """
    a, (m, s) = per_sample(alpha_bar, x_t), per_channel(prior, x_t)
    mean = x_t.mean(dim=tuple(range(2, x_t.ndim)), keepdim=True)
    noise_variance = (1 - a) / x_t[0, 0].numel()
    mean_of_noise = noise_variance / (a * s**2 + noise_variance) * (mean - a.sqrt() * m) / (1 - a).sqrt()
    if prediction == "epsilon":
        return mean_of_noise
    return (mean_of_noise - (1 - a).sqrt() * mean) / a.sqrt()


def with_spread_means(noise: Tensor, alpha_bar: Tensor, prior: tuple[Tensor, Tensor]) -> Tensor:
    """Spreads the patch means of the noise that sampling starts from as those of images noised to the last timestep.

    What is left of an image there is nothing to a voxel, but the mean over a patch shows it: drawn from noise alone,
    samples would all have the brightness of 0.

    Args:
        noise: (B, C, X, Y[, Z]) standard normal; its means are spread by 1 / N over N voxels.
        alpha_bar: (B,) of the last timestep.
        prior: Mean and standard deviation of the images' patch means, each (C,).

    Returns:
        (B, C, X, Y[, Z]).
    """
    a, (m, s) = per_sample(alpha_bar, noise), per_channel(prior, noise)
    mean = noise.mean(dim=tuple(range(2, noise.ndim)), keepdim=True)
    return noise + a.sqrt() * m + mean * ((a * s**2 * noise[0, 0].numel() + 1 - a).sqrt() - 1)


def estimate(prediction: str, output: Tensor, x_t: Tensor, alpha_bar: Tensor) -> tuple[Tensor, Tensor]:
    """Computes the image and the noise that a prediction implies.

    Args:
        prediction: What `output` is, "epsilon" or "v".
        output: (B, C, X, Y[, Z]).
        x_t: The noised images that it was made from, of the same shape.
        alpha_bar: (B,).

    Returns:
        x_0 and eps, each of the shape of `x_t`.
    """
    a = per_sample(alpha_bar, x_t)
    if prediction == "epsilon":
        return (x_t - (1 - a).sqrt() * output) / a.sqrt(), output
    if prediction == "v":
        return a.sqrt() * x_t - (1 - a).sqrt() * output, (1 - a).sqrt() * x_t + a.sqrt() * output
    raise ValueError(f"prediction is {prediction!r}: it must be one of {PREDICTIONS}")


def loss_weight(weighting: str, prediction: str, alpha_bar: Tensor, gamma: float = 5.0) -> Tensor:
    """Computes the weight of each sample's squared error.

    "min_snr" is Hang et al. 2023 (arXiv 2303.09556): min(SNR, gamma) on x_0, divided by SNR for epsilon and by
    SNR + 1 for v, with SNR = a / (1 - a).

    Returns:
        (B,) weights.
    """
    if weighting == "uniform":
        return torch.ones_like(alpha_bar)
    if weighting == "min_snr":
        snr = alpha_bar / (1 - alpha_bar)
        return snr.clamp(max=gamma) / (snr if prediction == "epsilon" else snr + 1)
    raise ValueError(f"weighting is {weighting!r}: it must be one of {WEIGHTINGS}")


def draw_timesteps(batch_size: int, timesteps: int, antithetic: bool, device: torch.device | str = "cpu") -> Tensor:
    """Returns uniform timesteps; antithetic ones come in pairs t, T - 1 - t, which lowers the variance of the loss.

    Returns:
        (batch_size,) int64.
    """
    if not antithetic:
        return torch.randint(timesteps, (batch_size,), device=device)
    half = torch.randint(timesteps, ((batch_size + 1) // 2,), device=device)
    return torch.stack([half, timesteps - 1 - half], 1).flatten()[:batch_size]


def held_out_draw(shape: Sequence[int], number: int, count: int, timesteps: int) -> tuple[Tensor, Tensor]:
    """Returns timesteps spread over the schedule, and noise: the same for a batch whenever the loss is measured on it.

    Args:
        shape: Of the batch, (B, C, X, Y[, Z]).
        number: Of the batch.
        count: How many batches there are.
        timesteps: T.

    Returns:
        (B,) int64 and standard normal noise, on the CPU.
    """
    timestep = ((torch.arange(shape[0]) * count + number + 0.5) / (shape[0] * count) * timesteps).long()
    return timestep, torch.randn(shape, generator=torch.Generator().manual_seed(number))
