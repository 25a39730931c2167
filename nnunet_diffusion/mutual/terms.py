"""What networks of differently annotated data sets teach each other: difference first, similarity afterwards.

The terms are named in summaries of Liu et al. 2024 (arXiv 2407.12611): prediction and feature difference between
models of some organs each, prediction and dynamic feature similarity between models of all organs. Their formulas are
not public: these are our reconstruction, of deep mutual learning (Zhang et al. 2018), where every network learns from
what the others say and they are constant to it.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from nnunet_diffusion.partial.merged_softmax import MergedSoftmax


def ramp_up(epoch: int, start: float, length: float) -> float:
    """Weighs the mutual terms: 0 before `start`, then exp(-5 (1 - t)^2) of Laine and Aila 2017, and 1 at the end."""
    if epoch < start:
        return 0.0
    t = min(1.0, (epoch - start + 1) / length) if length > 0 else 1.0
    return math.exp(-5 * (1 - t) ** 2)


def prediction_difference(logits: Tensor, labels: Tensor, owned: Tensor) -> Tensor:
    """Computes a cross-entropy that says of another data set's organs that they are none of a network's own.

    In the background it says nothing, and pulls nowhere: what is not annotated may be one of the network's organs.

    Args:
        logits: (B, C, X, Y[, Z]); half precision is computed in float32.
        labels: (B, 1, X, Y[, Z]) of the label files; values from C on, such as an ignore label, are no organ.
        owned: (C,) bool, the network's organs; the cases annotate none of them.

    Returns:
        Mean over the cases of the mean over annotated voxels of -log(1 - q), with q the summed probability of the owned
        organs; 0 without cases.
    """
    z = logits.to(_precision(logits))
    is_owned = owned.to(z.device).reshape(1, -1, *[1] * (z.ndim - 2))
    log_rest = z.masked_fill(is_owned, -torch.inf).logsumexp(1) - z.logsumexp(1)
    is_other = ((labels > 0) & (labels < z.shape[1]))[:, 0]
    case = -torch.where(is_other, log_rest, 0).flatten(1).sum(1) / is_other.flatten(1).sum(1).clamp_min(1)
    return case.sum() / max(1, len(case))


class OrganFeatures(NamedTuple):
    """Mean features of the organs of each case."""

    means: Tensor  # (B, C, F), 0 for an organ that is not there
    is_present: Tensor  # (B, C) bool, background never


def organ_features(features: Tensor, labels: Tensor, classes: int) -> OrganFeatures:
    """Averages features over the voxels of each organ.

    Args:
        features: (B, F, x, y[, z]); half precision is averaged in float32.
        labels: (B, 1, X, Y[, Z]) label map, scaled to the features by nearest neighbor. Values from `classes` on, such
            as an ignore label, are no organ.
        classes: Number of outputs of the network, C.
    """
    labels = F.interpolate(labels.float(), features.shape[2:], mode="nearest").flatten(2)
    is_organ = labels == torch.arange(classes, device=labels.device)[:, None]  # (B, C, V)
    is_organ[:, 0] = False
    voxels = is_organ.sum(2)
    with torch.autocast(features.device.type, enabled=False):
        values = features.flatten(2)
        values = values if values.dtype == torch.float64 else values.float()
        means = torch.einsum("bcv,bfv->bcf", is_organ.to(values.dtype), values) / voxels.clamp_min(1)[..., None]
    return OrganFeatures(means, voxels > 0)


def feature_difference(own: OrganFeatures, other: OrganFeatures) -> Tensor:
    """Computes |cosine| of each organ that a network sees and each true organ, as the network that owns it sees that.

    Args:
        own: The network's features of the organs that it predicts.
        other: The owner's features of the annotated organs, constant here.

    Returns:
        Mean over all pairs of two organs of a case; 0 without one.
    """
    cosine = torch.einsum("bcf,bdf->bcd", F.normalize(own.means, dim=2), F.normalize(other.means.detach(), dim=2))
    is_pair = own.is_present[:, :, None] & other.is_present[:, None]
    return torch.where(is_pair, cosine.abs(), 0).sum() / is_pair.sum().clamp_min(1)


def prediction_similarity(logits: Tensor, other: Tensor) -> Tensor:
    """Computes KL(p_other || p) of (B, C, X, Y[, Z]) logits, the other constant: mean over voxels, in nats."""
    log_p, log_other = (z.log_softmax(1, dtype=_precision(z)) for z in (logits, other.detach()))
    divergence = F.kl_div(log_p, log_other, reduction="none", log_target=True).sum(1)
    return divergence.sum() / max(1, divergence.numel())


def organ_errors(merged: MergedSoftmax, smooth: float = 1e-5) -> Tensor:
    """Returns (B, C) one minus the soft Dice of each class in each case, constant; of use where it is annotated."""
    dice = (2 * merged.inside + smooth) / (merged.voxels + merged.mass + smooth)
    return 1 - dice.detach()


def feature_similarity(features: Sequence[OrganFeatures], errors: Tensor) -> list[Tensor]:
    """Computes one minus the cosine of a network's features of an organ and those of the network that sees it best.

    Dynamic: who is best is decided for each organ of each case. The best one's features are constant, and it learns
    nothing from this organ.

    Args:
        features: Of the K networks, of the annotated organs.
        errors: (K, B, C) of the networks, on the true labels.

    Returns:
        K scalars, each a mean over the organs that another network sees better; 0 without one.
    """
    best = errors.argmin(0)  # (B, C)
    means = torch.stack([seen.means.detach() for seen in features])
    target = means.gather(0, best[None, ..., None].expand(1, *means.shape[1:]))[0]
    losses = []
    for k, seen in enumerate(features):
        learns = seen.is_present & (best != k)
        distance = 1 - F.cosine_similarity(seen.means, target, dim=2)
        losses.append(torch.where(learns, distance, 0).sum() / learns.sum().clamp_min(1))
    return losses


def _precision(z: Tensor) -> torch.dtype:
    return torch.float64 if z.dtype == torch.float64 else torch.float32
