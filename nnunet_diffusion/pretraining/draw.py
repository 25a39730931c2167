"""Images drawn from a denoiser, each from a noise of its own: the n-th is the same in a batch of any size."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, autocast
from tqdm import tqdm

from nnunet_diffusion.errors import UserError
from nnunet_diffusion.pretraining.conditioning import Denoiser
from nnunet_diffusion.pretraining.diffusion import Diffusion

ETA = {"ddim": 0.0, "ddpm": 1.0}  # share of fresh noise; ddpm over all timesteps is Ho et al. 2020, Algorithm 2


def number_of_steps(sampler: str, steps: int | None, timesteps: int) -> int:
    """Returns how many noise levels a sampler visits: those asked for, else 50 (ddim) or all (ddpm).

    Raises:
        UserError: If there are not so many.
    """
    default = min(50, timesteps) if sampler == "ddim" else timesteps
    steps = default if steps is None else steps
    if not 1 <= steps <= timesteps:
        raise UserError(f"--steps {steps}: the denoiser knows {timesteps} noise levels: give 1 to {timesteps}")
    return steps


def generators(seed: int, numbers: Sequence[int]) -> list[torch.Generator]:
    """Returns a source of noise for each number, which depends on that and the seed alone; on the CPU, always."""
    states = [np.random.SeedSequence([seed, number]).generate_state(1, np.uint64)[0] for number in numbers]
    return [torch.Generator().manual_seed(int(state)) for state in states]


def draw_images(
    denoiser: Denoiser,
    diffusion: Diffusion,
    patch_size: Sequence[int],
    numbers: Sequence[int],
    sampler: str = "ddim",
    steps: int = 50,
    seed: int = 0,
    batch_size: int = 8,
    progress: bool = False,
) -> Iterator[Tensor]:
    """Yields images in batches.

    Args:
        denoiser: In evaluation mode, on the device to draw on.
        diffusion: Its process, on the same device.
        patch_size: (X, Y[, Z]) voxels.
        numbers: Which samples, for instance `range(8)`.
        sampler: "ddim" or "ddpm".
        steps: Noise levels visited.
        seed: Of all samples.
        batch_size: Samples at a time.
        progress: Whether to show a bar of all steps.

    Yields:
        (B, C, X, Y[, Z]) on the CPU, in the plan's normalization.
    """
    device = denoiser.input_scale.device
    # the range of the images, for each channel in its own units of x_0
    clip = tuple(denoiser.scaled(bound.reshape([1] * (2 + len(patch_size)))) for bound in denoiser.image_range)
    batches = [numbers[i : i + batch_size] for i in range(0, len(numbers), batch_size)]
    with tqdm(total=len(batches) * steps, desc="sampling", unit="step", disable=not progress) as bar:

        def counted(x_t: Tensor, timestep: Tensor) -> Tensor:
            bar.update()
            return denoiser(x_t, timestep)

        for batch in batches:
            sources = generators(seed, batch)
            shape = (len(denoiser.input_scale), *patch_size)
            noise = torch.stack([torch.randn(shape, generator=source) for source in sources]).to(device)
            with torch.no_grad(), autocast(device.type, enabled=device.type == "cuda"):
                x_0 = diffusion.sample(counted, noise, steps, eta=ETA[sampler], clip=clip, generator=sources)
            yield denoiser.unscaled(x_0).float().cpu()
