"""Time conditioning of a planned network through its normalization layers, and folding it away again.

Every normalization y = gamma z + beta, with z the normalized input, becomes y = gamma (1 + a(t)) z + beta (1 + a(t))
+ b(t). At one timestep a and b are constants for each channel, so they fold exactly into gamma and beta: what is left
is the planned network with other weights. Scale-and-shift conditioning is Dhariwal and Nichol 2021 (ADM); the folding
is ours.
"""

import math
from copy import deepcopy

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.instancenorm import _InstanceNorm


class TimeEmbedding(nn.Module):
    """Sinusoids of the timestep (Vaswani et al. 2017, Sec. 3.5), a two-layer perceptron on them, and a sum of one.

    The L1 norm of one is ours: an Adam step then moves a(t) and b(t) by the learning rate at most, as it moves gamma
    and beta. Unnormalized, their step is some 70 times larger: the shifts outgrow the features, most channels are
    folded into the linear or the dead part of their nonlinearity, and the convolutions hardly learn.
    """

    def __init__(self, frequencies: int = 64, features: int = 128):
        super().__init__()
        self.frequencies = frequencies
        self.perceptron = nn.Sequential(
            nn.Linear(2 * frequencies, features), nn.SiLU(), nn.Linear(features, features), nn.SiLU()
        )

    def forward(self, timestep: Tensor) -> Tensor:
        """Maps (B,) timesteps to (B, features)."""
        weight = self.perceptron[0].weight
        exponents = torch.arange(self.frequencies, device=weight.device, dtype=weight.dtype) / self.frequencies
        angles = timestep.to(weight)[:, None] * torch.exp(-math.log(10000) * exponents)
        return F.normalize(self.perceptron(torch.cat([angles.sin(), angles.cos()], 1)), p=1.0, dim=1)


class ConditionalNorm(nn.Module):
    """A planned normalization whose scale and shift follow the timestep; equal to it as long as nothing is learned."""

    def __init__(self, norm: _NormBase, features: int):
        super().__init__()
        self.norm = norm
        self.scale_shift = nn.Linear(features, 2 * norm.num_features)
        nn.init.zeros_(self.scale_shift.weight)
        nn.init.zeros_(self.scale_shift.bias)
        self.embedding: Tensor | None = None  # set by the denoiser for the length of one forward pass

    def affine(self, embedding: Tensor) -> tuple[Tensor, Tensor]:
        """Returns folded gamma and beta, each (B, channels), of embeddings (B, features)."""
        a, b = self.scale_shift(embedding).to(self.norm.weight.dtype).chunk(2, 1)
        return self.norm.weight * (1 + a), self.norm.bias * (1 + a) + b

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, C, X, Y[, Z]) to the same shape."""
        gamma, beta = self.affine(self.embedding)
        if isinstance(self.norm, _InstanceNorm) and not self.norm.track_running_stats:
            # One pass, as fast as the plain norm: samples become channels, so each may have its own gamma and beta.
            merged = x.reshape(1, -1, *x.shape[2:])
            y = F.batch_norm(merged, None, None, gamma.flatten(), beta.flatten(), True, 0.0, self.norm.eps)
            return y.reshape(x.shape)
        z = self._normalize(x)
        shape = (*gamma.shape, *[1] * (x.ndim - 2))
        return torch.addcmul(beta.reshape(shape).to(z), z, gamma.reshape(shape).to(z))

    def _normalize(self, x: Tensor) -> Tensor:
        # The norm itself, running statistics and all, without its own gamma and beta; their gradient flows above.
        return torch.func.functional_call(
            self.norm, {"weight": torch.ones_like(self.norm.weight), "bias": torch.zeros_like(self.norm.bias)}, (x,)
        )


class Denoiser(nn.Module):
    """A planned network that is told the timestep.

    Attributes:
        network: The planned network; its normalizations are `ConditionalNorm`s.
        input_scale: (C,) what noise of unit variance is in the plan's normalization, per channel: the process works
            on image / input_scale.
        image_range: (2,) lowest and highest value of these images, in the plan's normalization.
    """

    def __init__(self, network: nn.Module, input_channels: int, features: int = 128):
        super().__init__()
        self.time_embedding = TimeEmbedding(features=features)
        self.network = _replace(network, lambda m: ConditionalNorm(_checked(m), features), (_NormBase, nn.GroupNorm))
        self.register_buffer("input_scale", torch.ones(input_channels))
        self.register_buffer("image_range", torch.tensor([-math.inf, math.inf]))
        self._norms = [m for m in network.modules() if isinstance(m, ConditionalNorm)]
        if not self._norms:
            raise NotImplementedError("this network has no normalization layer: time cannot be made to enter it")

    def calibrate(self, scale: Tensor, image_range: Tensor) -> None:
        """Sets `input_scale` and `image_range`."""
        self.input_scale.copy_(scale)
        self.image_range.copy_(image_range)

    def scaled(self, images: Tensor) -> Tensor:
        """Scales images (B, C, X, Y[, Z]) in the plan's normalization to x_0 of the process."""
        return images / self.input_scale.reshape(1, -1, *[1] * (images.ndim - 2))

    def unscaled(self, x_0: Tensor) -> Tensor:
        """Inverts `scaled`."""
        return x_0 * self.input_scale.reshape(1, -1, *[1] * (x_0.ndim - 2))

    def forward(self, x_t: Tensor, timestep: Tensor) -> Tensor:
        """Predicts what the process defines, at full resolution.

        Args:
            x_t: (B, C, X, Y[, Z]) noised images, already divided by `input_scale`.
            timestep: (B,) integers.

        Returns:
            (B, C, X, Y[, Z]).
        """
        embedding = self.time_embedding(timestep)
        for norm in self._norms:
            norm.embedding = embedding
        output = self.network(x_t)
        for norm in self._norms:  # a graph left behind would break deepcopy and keep memory
            norm.embedding = None
        return output


def condition(network: nn.Module, input_channels: int) -> Denoiser:
    """Makes a planned network time-conditional, in place.

    Args:
        network: PlainConvUNet, ResidualEncoderUNet or any network whose normalizations are affine instance or batch
            norms, 2-D or 3-D.
        input_channels: Number of its input channels.

    Returns:
        A denoiser that computes, until it is trained, what the network computed, at every timestep.

    Raises:
        NotImplementedError: If a normalization is of another kind or has no affine parameters.
    """
    return Denoiser(network, input_channels)


@torch.no_grad()
def fold(denoiser: Denoiser, timestep: int) -> nn.Module:
    """Returns the planned network that computes exactly the denoiser at one timestep.

    Args:
        denoiser: Stays as it is.
        timestep: t*, the noise level to fold at.

    Returns:
        A stock network with the planned network's own keys: fold(denoiser, t)(image) equals
        denoiser(image / input_scale, t), for images in the plan's normalization. No gradient history.
    """
    embedding = denoiser.time_embedding(torch.tensor([timestep], device=denoiser.input_scale.device))

    def plain(conditional: ConditionalNorm) -> nn.Module:
        gamma, beta = conditional.affine(embedding)
        conditional.norm.weight.copy_(gamma[0])
        conditional.norm.bias.copy_(beta[0])
        return conditional.norm

    network = _replace(deepcopy(denoiser.network), plain, ConditionalNorm)
    first = first_convolution(network)
    shape = (1, -1, *[1] * (first.weight.ndim - 2))
    first.weight.div_(denoiser.input_scale.to(first.weight).reshape(shape))
    return network


def first_convolution(network: nn.Module) -> _ConvNd:
    """Returns the one convolution that sees the image.

    Raises:
        NotImplementedError: If several do (a residual encoder without a stem).
    """
    if getattr(network.encoder, "stem", "none needed") is None:
        raise NotImplementedError("residual encoders without a stem are not supported: the input enters them twice")
    return next(m for m in network.encoder.modules() if isinstance(m, _ConvNd))


def _checked(norm: nn.Module) -> _NormBase:
    if not isinstance(norm, _InstanceNorm | _BatchNorm) or not norm.affine:
        raise NotImplementedError(f"{norm} cannot be made conditional on time: only affine instance or batch norms can")
    return norm


def _replace(network: nn.Module, make, kind) -> nn.Module:
    """Replaces modules of a kind everywhere they are registered: nnU-Net's networks hold each of them several times."""
    made: dict[nn.Module, nn.Module] = {}
    for parent in list(network.modules()):
        for name, child in parent._modules.items():
            if isinstance(child, kind):
                if child not in made:
                    made[child] = make(child)
                parent._modules[name] = made[child]
    return network
