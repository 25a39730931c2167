"""Linear classification of a planned network's features."""

from torch import Tensor, nn
from torch.nn import functional as F


class LinearClassifier(nn.Module):
    """A planned network in which only the 1x1 heads on all decoder stages learn.

    The heads' outputs are upsampled to full resolution and summed: a linear classifier on the concatenated features of
    all decoder stages. The heads are those that nnU-Net builds for deep supervision, so the keys are the planned
    network's own; what is computed is not, so this cannot be exported as stock nnU-Net.
    "Linear classification" is a strategy of Huang et al. 2024 (arXiv 2402.15216), abstract; the form is ours.
    """

    def __init__(self, network: nn.Module):
        super().__init__()
        self.encoder = network.encoder
        self.decoder = network.decoder
        self.decoder.deep_supervision = True
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name.startswith("decoder.seg_layers."))

    def train(self, mode: bool = True) -> nn.Module:
        """Keeps frozen layers in evaluation mode, so that their statistics do not move either."""
        super().train(mode)
        self.encoder.eval()
        self.decoder.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, C, X, Y[, Z]) images to (B, classes, X, Y[, Z]) logits."""
        finest, *coarser = self.decoder(self.encoder(x))
        mode = "bilinear" if finest.ndim == 4 else "trilinear"
        for logits in coarser:
            finest = finest + F.interpolate(logits, finest.shape[2:], mode=mode, align_corners=False)
        return finest


def freeze_encoder(network: nn.Module) -> None:
    """Keeps the encoder's parameters from learning; the caller keeps it in evaluation mode while training."""
    network.encoder.requires_grad_(False)
