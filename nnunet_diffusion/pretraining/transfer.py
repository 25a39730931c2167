"""Transfer of weights into the planned segmentation network, with a report that hides nothing."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from nnunet_diffusion.errors import UserError
from nnunet_diffusion.model_folder import HEADS
from nnunet_diffusion.pretraining.conditioning import first_convolution

ENTRIES_IN_LOG = 12  # of each kind; transfer_report.json has all


@dataclass
class TransferReport:
    """What became of every parameter, by its name in the network.

    Attributes:
        matched: Copied.
        adapted: Copied into another shape, with how.
        missing: Left as they were initialized, with why.
        unexpected: In the file, but not used.
        source: The file.
        timestep: t*, at which a denoiser was folded here; None for other weights.
        warnings: Differences between the two plans that do not prevent the transfer.
        citations: What the file asks to be cited.
    """

    matched: list[str] = field(default_factory=list)
    adapted: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    source: str = ""
    timestep: int | None = None
    warnings: list[str] = field(default_factory=list)
    citations: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        """Writes a few lines for the log."""
        folded = "" if self.timestep is None else f", folded at timestep {self.timestep}"
        lines = [f"Starts from {self.source}{folded}:"]
        for name in ("matched", "adapted", "missing", "unexpected"):
            entries = getattr(self, name)
            shown = [] if name == "matched" else entries[:ENTRIES_IN_LOG]
            if shown and len(shown) < len(entries):
                shown = [*shown, f"{len(entries) - len(shown)} more in transfer_report.json"]
            lines.append(f"  {name:<10} {len(entries):>4}{': ' * bool(shown)}{', '.join(shown)}")
        lines += [f"  WARNING: {warning}" for warning in self.warnings]
        return "\n".join(lines + [f"  Please cite {citation}" for citation in self.citations])


def new_head(name: str) -> str:
    """Says why a parameter of a segmentation network is not taken from a denoiser; empty if it is."""
    return "new output head" if HEADS in name else ""


@torch.no_grad()
def transfer(
    network: nn.Module,
    weights: dict[str, Tensor],
    image_channels: int,
    stays: Callable[[str], str] = new_head,
    what: str = "denoiser",
    adapts_kernels: bool = False,
) -> TransferReport:
    """Copies weights into a segmentation network; its output heads stay as nnU-Net initialized them.

    Args:
        network: The planned network, changed in place.
        weights: By the network's own names, such as the state dict of a folded denoiser.
        image_channels: How many of the input channels are images; the others (a cascade's previous segmentation) stay
            as they were initialized.
        stays: Of a name: why that parameter stays as it was initialized; empty if it must be in `weights`.
        what: The weights are of, for messages.
        adapts_kernels: Whether a kernel is averaged along axes where the network's has one voxel.

    Returns:
        The report, without source and timestep.

    Raises:
        UserError: If what does not stay is missing or has a shape that cannot be adapted; nothing is copied then.
    """
    report = TransferReport()
    stem_weight = first_convolution(network).weight
    wrong, copies = [], []
    for name, tensor in [*network.named_parameters(), *network.named_buffers()]:  # each once, by its first name
        if reason := stays(name):
            report.missing.append(f"{name} ({reason})")
            continue
        source, part, how = weights.get(name), tensor, []
        if source is not None and source.shape != tensor.shape:
            channels = image_channels if tensor is stem_weight else None
            source, part, how = adapt(source, tensor, channels, adapts_kernels)
        if source is None or source.shape != part.shape:
            came = "missing" if name not in weights else tuple(weights[name].shape)
            wrong.append(f"  {name}: {what} {came}, network {tuple(tensor.shape)}")
            continue
        copies.append((part, source))
        (report.adapted if how else report.matched).append(f"{name} ({', '.join(how)})" if how else name)
    if wrong:
        shown = wrong[:20] + [f"  and {len(wrong) - 20} more"] * (len(wrong) > 20)
        raise UserError(f"the {what} does not fit the planned network:\n" + "\n".join(shown))
    for part, source in copies:
        part.copy_(source)
    report.unexpected = unused(network, weights, stays, what)
    return report


def unused(network: nn.Module, weights: dict[str, Tensor], stays: Callable[[str], str], what: str) -> list[str]:
    """Lists what of the weights goes nowhere; for the arguments see `transfer`."""
    own = {name for name, _ in [*network.named_parameters(), *network.named_buffers()]}
    aliases = network.state_dict().keys() - own
    names = [name for name in weights if name not in aliases and (name not in own or stays(name))]
    return [f"{name} (the {what}'s own output)" if HEADS in name else name for name in names]


def adapt(
    source: Tensor, tensor: Tensor, image_channels: int | None, adapts_kernels: bool
) -> tuple[Tensor, Tensor, list[str]]:
    """Adapts weights of a convolution to a planned one, as far as that can be done.

    Args:
        source: (out, in, ...).
        tensor: The planned weights.
        image_channels: Of the first convolution, how many of its input channels are images; None for any other.
        adapts_kernels: As `transfer` has it.

    Returns:
        The adapted weights, the part of `tensor` that they are for, and what was done, in words.
    """
    part, how = tensor, []
    if source.ndim != tensor.ndim:
        return source, part, how
    if image_channels is not None and source.shape[1] != tensor.shape[1]:
        how.append(f"{source.shape[1]} to {image_channels} of {tensor.shape[1]} input channels")
        source, part = adapt_input_channels(source, image_channels), tensor[:, :image_channels]
    if adapts_kernels and source.shape[2:] != part.shape[2:]:
        how.append(f"kernel of {_size(source)} averaged to {_size(part)}")
        source = average_kernel(source, part.shape)
    return source, part, how


def _size(weight: Tensor) -> str:
    return " x ".join(map(str, weight.shape[2:]))


def average_kernel(weight: Tensor, shape: torch.Size) -> Tensor:
    """Averages convolution weights along the axes where a kernel of this shape has one voxel, as nnU-Net's head does.

    Args:
        weight: (out, in, ...).
        shape: Of the planned convolution's weights, as many axes.

    Returns:
        The weights; of `shape`, if nothing else differs.
    """
    axes = [axis for axis in range(2, weight.ndim) if shape[axis] == 1 < weight.shape[axis]]
    return weight.mean(axes, keepdim=True) if axes else weight


def adapt_input_channels(weight: Tensor, channels: int) -> Tensor:
    """Adapts convolution weights to another number of input channels, which share the mean over the old ones.

    The response to an image whose channels are all equal stays what it was.

    Args:
        weight: (out, in, ...).
        channels: The new number of input channels.

    Returns:
        (out, channels, ...).
    """
    if channels == weight.shape[1]:
        return weight
    total = weight.sum(1, keepdim=True)
    return (total / channels).expand(-1, channels, *[-1] * (weight.ndim - 2)).clone()


def plan_differences(trained: dict, now: dict) -> list[str]:
    """Lists differences of two plan identities that change what an intensity or a voxel means.

    Args:
        trained: `plan_identity` of the pre-training.
        now: `plan_identity` of this training.

    Returns:
        One sentence each, naming both sides; empty if there is none.
    """
    keys = ("spacing", "normalization_schemes", "channel_names")
    differences = [
        f"{key} differs: pre-trained with {trained[key]}, now {now[key]}" for key in keys if trained[key] != now[key]
    ]
    if "CTNormalization" in now["normalization_schemes"]:
        for channel, values in now["intensities"].items():
            before = trained["intensities"].get(channel, {})
            for key in ("mean", "std", "percentile_00_5", "percentile_99_5"):
                if abs(before.get(key, float("inf")) - values[key]) > 0.1 * max(abs(values["std"]), 1e-8):
                    differences.append(
                        f"CT normalization of channel {channel} differs in its {key}: pre-trained with "
                        f"{before.get(key)}, now {values[key]}"
                    )
    return differences


def parameter_sums(network: nn.Module) -> dict[str, float]:
    """Returns the sum of each parameter, by which weights are known that somebody else has loaded since."""
    return {name: parameter.detach().double().sum().item() for name, parameter in network.named_parameters()}


def report_loaded(network: nn.Module, before: dict[str, float]) -> TransferReport | None:
    """Reports the weights that nnU-Net loaded (`-pretrained_weights`), which it does not tell its trainers.

    Args:
        network: As it is now.
        before: Its `parameter_sums` as it was initialized.

    Returns:
        The report, or None if nothing was loaded.
    """
    now = parameter_sums(network)
    loaded = [name for name in now if now[name] != before[name]]
    kept = [f"{name} (as initialized, or loaded with the same values)" for name in now if name not in loaded]
    return TransferReport(matched=loaded, missing=kept, source="-pretrained_weights") if loaded else None
