"""Transfer of a denoiser's weights into the planned segmentation network, with a report that hides nothing."""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from nnunet_diffusion.errors import UserError
from nnunet_diffusion.model_folder import HEADS
from nnunet_diffusion.pretraining.conditioning import first_convolution


@dataclass
class TransferReport:
    """What became of every parameter, by its name in the network.

    Attributes:
        matched: Copied.
        adapted: Copied into another shape, with how.
        missing: Left as they were initialized.
        unexpected: In the denoiser, but not used.
        source: The file.
        timestep: t*, at which a denoiser was folded here; None for other weights.
        warnings: Differences between the two plans that do not prevent the transfer.
    """

    matched: list[str] = field(default_factory=list)
    adapted: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    source: str = ""
    timestep: int | None = None
    warnings: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        """Writes a few lines for the log."""
        folded = "" if self.timestep is None else f", folded at timestep {self.timestep}"
        lines = [f"Starts from {self.source}{folded}:"]
        for name in ("matched", "adapted", "missing", "unexpected"):
            entries = getattr(self, name)
            detail = "" if name == "matched" or not entries else ": " + ", ".join(entries)
            lines.append(f"  {name:<10} {len(entries):>4}{detail}")
        return "\n".join(lines + [f"  WARNING: {warning}" for warning in self.warnings])


@torch.no_grad()
def transfer(network: nn.Module, folded: dict[str, Tensor], image_channels: int) -> TransferReport:
    """Copies a folded denoiser into a segmentation network; its output heads stay as nnU-Net initialized them.

    Args:
        network: The planned network, changed in place.
        folded: State dict of the folded denoiser.
        image_channels: How many of the input channels are images; the others (a cascade's previous segmentation) stay
            as they were initialized.

    Returns:
        The report, without source and timestep.

    Raises:
        UserError: If anything but the heads and the number of input channels differs.
    """
    report = TransferReport()
    stem_weight = first_convolution(network).weight
    wrong = []
    for name, tensor in [*network.named_parameters(), *network.named_buffers()]:  # each once, by its first name
        source = folded.get(name)
        if HEADS in name:
            report.missing.append(f"{name} (new output head)")
        elif source is not None and source.shape == tensor.shape:
            tensor.copy_(source)
            report.matched.append(name)
        elif source is not None and tensor is stem_weight and source.shape[0] == tensor.shape[0]:
            tensor[:, :image_channels] = adapt_input_channels(source, image_channels)
            report.adapted.append(f"{name} ({source.shape[1]} to {image_channels} of {tensor.shape[1]} input channels)")
        else:
            came = "missing" if source is None else tuple(source.shape)
            wrong.append(f"  {name}: denoiser {came}, network {tuple(tensor.shape)}")
    if wrong:
        raise UserError("the denoiser does not fit the planned network:\n" + "\n".join(wrong[:20]))
    report.unexpected = [f"{name} (the denoiser's own output)" for name in folded if HEADS in name]
    return report


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
