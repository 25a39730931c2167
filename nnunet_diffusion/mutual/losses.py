"""The loss of a network of several members, on a batch with cases of every group."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from torch import Tensor, nn

from nnunet_diffusion.mutual.network import MemberOutput, predicted_labels
from nnunet_diffusion.mutual.terms import (
    OrganFeatures,
    feature_difference,
    feature_similarity,
    organ_errors,
    organ_features,
    prediction_difference,
    prediction_similarity,
)
from nnunet_diffusion.partial.losses import annotated
from nnunet_diffusion.partial.merged_softmax import merged_softmax


class GroupedBatch(NamedTuple):
    """What is known of the cases of a batch."""

    targets: list[Tensor]  # of each scale, (B, 1 or 2, X, Y[, Z]): the label file and, in stage 2, the completed one
    annotation: Tensor  # (B, C) int64 on the CPU: the group map of what each label file says
    group: Tensor  # (B,) int64 on the CPU: the group of each case
    completed_annotation: Tensor | None = None  # as annotation, of the completed labels

    def of(self, chosen: Tensor) -> "GroupedBatch":
        """Returns some of the cases, by a (B,) mask."""
        known = (None if about is None else about[chosen] for about in self[1:])
        return GroupedBatch([target[chosen] for target in self.targets], *known)

    @property
    def true(self) -> list[Tensor]:
        """What the label files say, at each scale."""
        return [target[:, :1] for target in self.targets]

    @property
    def completed(self) -> list[Tensor]:
        """The completed labels, at each scale."""
        return [target[:, 1:] for target in self.targets]


class MembersLoss(nn.Module):
    """Every member's supervision by its own group, and what it learns from the others, which are constant to it.

    Args:
        supervision: nnU-Net's loss with a `PartialLabelLoss` in it, with deep supervision around it or not.
        owned: (K, C) bool: the labels of each group.
        ignore_label: The label manager's.
        prediction_weight: Of the term between predictions.
        feature_weight: Of the term between features.
    """

    def __init__(
        self,
        supervision: nn.Module,
        owned: Tensor,
        ignore_label: int | None = None,
        prediction_weight: float = 1.0,
        feature_weight: float = 1.0,
    ):
        super().__init__()
        self.supervision, self.owned, self.ignore_label = supervision, owned, ignore_label
        self.prediction_weight, self.feature_weight = prediction_weight, feature_weight

    def forward(
        self, outputs: Sequence[MemberOutput], batch: GroupedBatch, learners: Iterable[int], strength: float
    ) -> Tensor:
        """Sums the losses of some members.

        Args:
            outputs: Of all members, on all cases.
            batch: Cases of every group.
            learners: The members whose losses are summed.
            strength: Ramps up what members learn from each other.
        """
        raise NotImplementedError

    def supervised(self, logits: Sequence[Tensor], targets: Sequence[Tensor], annotation: Tensor) -> Tensor:
        """Returns the supervised loss on some cases."""
        with annotated(self.supervision, annotation):
            if isinstance(self.supervision, DeepSupervisionWrapper):
                return self.supervision(logits, targets)
            return self.supervision(logits[0], targets[0])

    def over_scales(self, loss: Callable[[Tensor, Tensor], Tensor], first: list, second: list) -> Tensor:
        """Returns a loss between two lists of scales, which weigh what they weigh in the supervised one."""
        if isinstance(self.supervision, DeepSupervisionWrapper):
            return DeepSupervisionWrapper(loss, self.supervision.weight_factors)(first, second)
        return loss(first[0], second[0])


class DifferenceLoss(MembersLoss):
    """Stage 1: a member knows its group's labels, and learns from the other groups what these are not."""

    def forward(self, outputs, batch, learners, strength):
        """Sums as `MembersLoss` says."""
        learners = list(learners)
        total = sum(self._own_group(k, outputs[k], batch) for k in learners)
        if (batch.group == batch.group[0]).all():
            return total
        if strength * self.prediction_weight > 0:
            terms = sum(self._prediction_difference(k, outputs[k], batch) for k in learners)
            total = total + strength * self.prediction_weight * terms
        if strength * self.feature_weight > 0:
            features = of_owners([output.features for output in outputs], batch.group)
            true = organ_features(features, batch.true[0], self.owned.shape[1])
            terms = sum(self._feature_difference(k, outputs[k], true, batch) for k in learners)
            total = total + strength * self.feature_weight * terms
        return total

    def _own_group(self, k: int, output: MemberOutput, batch: GroupedBatch) -> Tensor:
        is_own = batch.group == k
        own = batch.of(is_own)
        return self.supervised([z[is_own] for z in output.logits], own.true, own.annotation)

    def _prediction_difference(self, k: int, output: MemberOutput, batch: GroupedBatch) -> Tensor:
        is_other = batch.group != k
        difference = partial(prediction_difference, owned=self.owned[k])
        return self.over_scales(difference, [z[is_other] for z in output.logits], batch.of(is_other).true)

    def _feature_difference(self, k: int, output: MemberOutput, true: OrganFeatures, batch: GroupedBatch) -> Tensor:
        is_other = batch.group != k
        logits = output.logits[0].detach()[is_other]
        labels = predicted_labels(logits, self.owned[k].to(logits.device))
        seen = organ_features(output.features[is_other], labels, self.owned.shape[1])
        return feature_difference(seen, OrganFeatures(true.means[is_other], true.is_present[is_other]))


class SimilarityLoss(MembersLoss):
    """Stage 2: a member knows all labels, from its group's completed ones, the other groups' true ones, and members."""

    def forward(self, outputs, batch, learners, strength):
        """Sums as `MembersLoss` says."""
        learners = list(learners)
        total = sum(self._completed(k, outputs[k], batch) for k in learners)
        if self.prediction_weight > 0:
            owners = [of_owners(list(scale), batch.group) for scale in zip(*(o.logits for o in outputs), strict=True)]
            terms = sum(self._other_groups(k, outputs[k], owners, batch, strength) for k in learners)
            total = total + self.prediction_weight * terms
        if strength * self.feature_weight > 0:
            terms = self._features(outputs, batch)
            total = total + strength * self.feature_weight * sum(terms[k] for k in learners)
        return total

    def _completed(self, k: int, output: MemberOutput, batch: GroupedBatch) -> Tensor:
        is_own = batch.group == k
        own = batch.of(is_own)
        return self.supervised([z[is_own] for z in output.logits], own.completed, own.completed_annotation)

    def _other_groups(
        self, k: int, output: MemberOutput, owners: list[Tensor], batch: GroupedBatch, strength: float
    ) -> Tensor:
        is_other = batch.group != k
        others, logits = batch.of(is_other), [z[is_other] for z in output.logits]
        loss = self.supervised(logits, others.true, others.annotation)
        if strength > 0:
            similarity = self.over_scales(prediction_similarity, logits, [z[is_other] for z in owners])
            loss = loss + strength * similarity
        return loss

    def _features(self, outputs: Sequence[MemberOutput], batch: GroupedBatch) -> list[Tensor]:
        target, classes = batch.true[0], self.owned.shape[1]
        features = [organ_features(output.features, target, classes) for output in outputs]
        with torch.no_grad():
            merged = [merged_softmax(o.logits[0], target, batch.annotation, self.ignore_label) for o in outputs]
        return feature_similarity(features, torch.stack([organ_errors(sums) for sums in merged]))


def of_owners(tensors: Sequence[Tensor], group: Tensor) -> Tensor:
    """Takes from K tensors (B, ...), of each case, what the member of its group computed: (B, ...), constant."""
    owned = torch.empty_like(tensors[0])
    for k, tensor in enumerate(tensors):
        owned[group == k] = tensor.detach()[group == k]
    return owned
