"""Linear classification of a planned network's features."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nnunet_diffusion.model_folder import HEADS


class LinearClassifier(nn.Module):
    """A planned network in which only 1x1 heads learn, on every stage of encoder and decoder.

    The heads' outputs are upsampled to full resolution and summed: a linear classifier on the concatenated features of
    all stages, the bottleneck's among them, as those who read features of a frozen diffusion network take them from
    several blocks (Baranchuk et al. 2022, arXiv 2112.03126). The heads of the decoder are those that nnU-Net builds for
    deep supervision, those of the encoder are like them; what is computed is not what nnU-Net computes, so this cannot
    be exported as stock nnU-Net.
    "Linear classification" is a strategy of Huang et al. 2024 (arXiv 2402.15216), abstract; the form is ours.
    """

    def __init__(self, network: nn.Module):
        super().__init__()
        self.encoder = network.encoder
        self.decoder = network.decoder
        self.decoder.deep_supervision = True
        heads = self.decoder.seg_layers
        channels = self.encoder.output_channels
        added = nn.ModuleList(type(heads[0])(number, heads[0].out_channels, 1) for number in channels)
        self.of_encoder = nn.ModuleDict({"seg_layers": added})  # not the encoder's own: the decoder holds that as well
        for head in added:  # as nnU-Net's
            nn.init.kaiming_normal_(head.weight, a=1e-2)
            nn.init.zeros_(head.bias)
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(HEADS in name)
        self.register_load_state_dict_pre_hook(_without_heads_of_the_encoder)

    def train(self, mode: bool = True) -> nn.Module:
        """Keeps frozen layers in evaluation mode, so that their statistics do not move either."""
        super().train(mode)
        self.encoder.eval()
        self.decoder.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, C, X, Y[, Z]) images to (B, classes, X, Y[, Z]) logits."""
        skips = self.encoder(x)
        finest, *coarser = self.decoder(skips)
        coarser += [head(features) for head, features in zip(self.of_encoder["seg_layers"], skips, strict=True)]
        mode = "bilinear" if finest.ndim == 4 else "trilinear"
        for logits in coarser:
            if logits.shape != finest.shape:
                logits = F.interpolate(logits, finest.shape[2:], mode=mode, align_corners=False)
            finest = finest + logits
        return finest


def freeze_encoder(network: nn.Module) -> None:
    """Keeps the encoder's parameters from learning; the caller keeps it in evaluation mode while training."""
    network.encoder.requires_grad_(False)


def _without_heads_of_the_encoder(classifier: nn.Module, state: dict[str, Tensor], prefix: str, *_) -> None:
    """Takes heads of the encoder for zero in a model that was trained when there were none: it computes the same."""
    for name, parameter in classifier.of_encoder.state_dict(prefix=f"{prefix}of_encoder.").items():
        state.setdefault(name, torch.zeros_like(parameter))
