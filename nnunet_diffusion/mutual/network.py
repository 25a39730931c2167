"""Several planned networks in one: they train side by side, and predict as one."""

import math
from collections.abc import Iterable
from copy import deepcopy
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class MemberOutput(NamedTuple):
    """What a member computes in training."""

    logits: list[Tensor]  # (B, C, X, Y[, Z]) of each scale, the finest first; without deep supervision that one only
    features: Tensor  # (B, F, x, y[, z]) of one decoder stage


def decode(network: nn.Module, x: Tensor) -> list[Tensor]:
    """Returns the features that a planned network's output heads read, of each decoder stage, the finest first."""
    *skips, x = network.encoder(x)
    decoder, features = network.decoder, []
    for upsample, stage, skip in zip(decoder.transpconvs, decoder.stages, reversed(skips), strict=True):
        x = stage(torch.cat((upsample(x), skip), 1))
        features.append(x)
    return features[::-1]


def log_odds(logits: Tensor, owned: Tensor) -> Tensor:
    """Computes log odds of each owned class against all that is not owned: what a member that learned these only says.

    Args:
        logits: (B, C, X, Y[, Z]).
        owned: (C,) bool.

    Returns:
        (B, C, X, Y[, Z]), meaningless for classes that are not owned.
    """
    mask = owned.reshape(1, -1, *[1] * (logits.ndim - 2))
    return logits - logits.masked_fill(mask, -torch.inf).logsumexp(1, keepdim=True)


def predicted_labels(logits: Tensor, owned: Tensor) -> Tensor:
    """Returns (B, 1, X, Y[, Z]) the owned class of each voxel, 0 where everything else is more probable."""
    odds = log_odds(logits, owned).masked_fill(~owned.reshape(1, -1, *[1] * (logits.ndim - 2)), -torch.inf)
    best, label = odds.max(1, keepdim=True)
    return torch.where(best > 0, label, 0)


def alike(network: nn.Module, number: int) -> list[nn.Module]:
    """Returns so many networks with the same weights: features can be compared, as their directions mean the same."""
    return [network, *(deepcopy(network) for _ in range(number - 1))]


class Members(nn.Module):
    """Planned networks of one topology.

    In training it gives what every member computes. In evaluation it is a planned network: logits of what the members
    say together, or of the member `only`.

    Attributes:
        deep_supervision: As a planned decoder's.
        only: The one member that predicts; None: all.
        learner: The one member that has gradients in training; None: all have. torch.compile takes an attribute for a
            constant, an argument for a symbol.
        feature_stage: Decoder stage of the features, 0 is the finest.
        checkpointing: Keep no activations of a member but its outputs; the backward pass makes them again, member by
            member.
    """

    def __init__(self, members: Iterable[nn.Module], deep_supervision: bool = False):
        super().__init__()
        self.members = nn.ModuleList(members)
        self.deep_supervision = deep_supervision
        self.only: int | None = None
        self.learner: int | None = None
        self.feature_stage, self.checkpointing = 0, False

    def forward(self, x: Tensor) -> list[MemberOutput] | list[Tensor] | Tensor:
        """Maps images (B, C, X, Y[, Z]) to each member's output, or to logits."""
        if self.training:
            learn = torch.is_grad_enabled()
            return [self._train(k, x, learn and self.learner in (None, k)) for k in range(len(self))]
        chosen = range(len(self)) if self.only is None else [self.only]
        outputs = [self._member(k, x).logits for k in chosen]
        scales = outputs[0] if self.only is not None else [self.combine(scale) for scale in zip(*outputs, strict=True)]
        return scales if self.deep_supervision else scales[0]

    def combine(self, logits: tuple[Tensor, ...]) -> Tensor:
        """Returns the logits of all members, each (B, C, X, Y[, Z]), as one."""
        raise NotImplementedError

    def __len__(self) -> int:
        return len(self.members)

    def _train(self, k: int, x: Tensor, learns: bool) -> MemberOutput:
        with torch.set_grad_enabled(learns):
            if learns and self.checkpointing:
                return checkpoint(self._member, k, x, use_reentrant=False)
            return self._member(k, x)

    def _member(self, k: int, x: Tensor) -> MemberOutput:
        features = decode(self.members[k], x)
        scales = len(features) if self.deep_supervision else 1
        heads = self.members[k].decoder.seg_layers
        logits = [heads[-1 - scale](features[scale]) for scale in range(scales)]
        return MemberOutput(logits, features[min(self.feature_stage, len(features) - 1)])


class FullOrganMembers(Members):
    """Members that each know every class: together, the mean of their probabilities."""

    def combine(self, logits: tuple[Tensor, ...]) -> Tensor:
        """Computes the log of the mean probability: a softmax of it is that mean."""
        return torch.stack([z.log_softmax(1) for z in logits]).logsumexp(0) - math.log(len(logits))


class PartialOrganMembers(Members):
    """Members that each know some classes, and call everything else background; every class has one owner.

    Attributes:
        owned: (K, C) uint8, saved with the weights: which classes each member knows.
    """

    def __init__(self, members: Iterable[nn.Module], classes: int, deep_supervision: bool = False):
        super().__init__(members, deep_supervision)
        self.register_buffer("owned", torch.zeros(len(self), classes, dtype=torch.uint8))

    def combine(self, logits: tuple[Tensor, ...]) -> Tensor:
        """Returns each class's log odds by its owner, 0 for the background.

        Of independent members, given that two organs are never at one voxel, a softmax of it is the posterior: organ c
        of owner k has p_c prod_{j != k} b_j, the background prod_j b_j, all divided by the latter. An organ wins over
        the background where its owner sees it, over another organ where its odds are higher. Our reconstruction.
        """
        together = torch.zeros_like(logits[0])
        for z, owned in zip(logits, self.owned.bool(), strict=True):
            mask = owned.reshape(1, -1, *[1] * (z.ndim - 2))
            together = torch.where(mask, log_odds(z, owned), together)
        return together
