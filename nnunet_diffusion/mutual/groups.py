"""Groups of cases with the same annotated labels: the partially labeled data sets that teach each other.

A group is what `annotated_labels` of dataset.json makes it, or what a setting names. No label is in two groups, every
label is in one, and a case belongs to the group that has all its labels.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader

from nnunet_diffusion.errors import UserError
from nnunet_diffusion.partial.annotations import Annotation, Channels
from nnunet_diffusion.records import some

KEY = "nnunet_diffusion_groups"  # in plans.json of a model folder: the labels of each group, for prediction
SHOWN = 3  # cases in a message


class Group(NamedTuple):
    """Labels in the order of the network's outputs, and the cases that annotate them or some of them."""

    labels: tuple[str, ...]
    cases: tuple[str, ...]


def find_groups(
    annotations: Mapping[str, Annotation], channels: Channels, named: Sequence[Sequence[str]] = ()
) -> list[Group]:
    """Finds the groups of some cases, in the order of their first labels.

    Args:
        annotations: {case: annotation} of the training cases.
        channels: The `output_channels`.
        named: The labels of each group; none: every set of labels that a case annotates is one.

    Raises:
        UserError: If there are fewer than two groups, if a label is in two or in none, if a case fits into none, or if
            none fits into a group.
    """
    labels = {case: _foreground(annotation.labels, channels) for case, annotation in annotations.items()}
    _refuse_unions(annotations)
    if problem := _problem_of_names(named, channels):
        raise UserError(f"setting groups is {[list(names) for names in named]}: {problem}")
    place = list(channels).index
    sets = [_foreground(names, channels) for names in named]
    sets = sets or sorted(set(labels.values()), key=lambda own: [place(label) for label in own])
    _refuse_overlap(sets, labels, bool(named))
    homeless = [case for case, own in labels.items() if not own or not any(set(own) <= set(group) for group in sets)]
    if homeless:
        raise UserError(
            f"case(s) {some(map(repr, homeless), SHOWN)}: annotated for {list(labels[homeless[0]]) or 'nothing'}, "
            "which no group of labels has: correct annotated_labels or the setting groups, or take the cases out"
        )
    groups = [Group(group, tuple(case for case in labels if set(labels[case]) <= set(group))) for group in sets]
    _refuse_unusable(groups, channels)
    return groups


def owned_channels(groups: Sequence[Sequence[str]], channels: Channels) -> torch.Tensor:
    """Returns (K, C) bool: which outputs of the network each group's labels are; background is nobody's."""
    return torch.tensor([[name in group for name in channels] for group in groups])


def too_small(groups: Sequence[Group], batch_size: int) -> list[str]:
    """Names in a sentence each group that has fewer cases than a `GroupedLoader` takes from it for a batch."""
    patches = -(-batch_size // len(groups))
    return [
        f"group {list(group.labels)} has {len(group.cases)} training case(s) and gives up to {patches} of the "
        f"{batch_size} patches of a batch, so batches hold the same case several times: add cases that annotate these "
        f"labels, or give the plan a batch_size of {len(group.cases) * len(groups)} or less for each process"
        for group in groups
        if len(group.cases) < patches
    ]


def _foreground(names, channels: Channels) -> tuple[str, ...]:
    return tuple(name for name, values in channels.items() if name in names and values != {0})


def _problem_of_names(named: Sequence[Sequence[str]], channels: Channels) -> str:
    if not all(isinstance(group, (list, tuple)) and group for group in named):
        return "it must be a list of lists of label names"
    known = _foreground(channels, channels)
    unknown = [name for group in named for name in group if name not in known]
    return f"{unknown} are not among the labels {list(known)}" if unknown else ""


def _refuse_unions(annotations: Mapping[str, Annotation]) -> None:
    unions = [case for case, annotation in annotations.items() if annotation.unions]
    if unions:
        raise UserError(
            f"case(s) {some(map(repr, unions), SHOWN)}: union_labels: mutual learning needs each label by itself: "
            "take the cases or their unions out, or train PartialLabelTrainer"
        )


def _refuse_overlap(sets: Sequence[tuple], labels: Mapping[str, tuple], is_named: bool) -> None:
    for i, first in enumerate(sets):
        for second in sets[i + 1 :]:
            shared = [label for label in first if label in second]
            if shared and is_named:
                raise UserError(f"setting groups: {shared} are in two groups: a label is in one group")
            if shared:
                examples = [next(case for case, own in labels.items() if own == group) for group in (first, second)]
                raise UserError(
                    f"groups overlap: case {examples[0]!r} annotates {list(first)}, case {examples[1]!r} "
                    f"{list(second)}: mutual learning is between cases with no label in common. Name the groups in "
                    "the setting groups (a case may annotate a part of its group), leave one kind of cases out, or "
                    "train PartialLabelTrainer"
                )


def _refuse_unusable(groups: Sequence[Group], channels: Channels) -> None:
    owned = {label for group in groups for label in group.labels}
    if lacking := [name for name in _foreground(channels, channels) if name not in owned]:
        raise UserError(f"no group of training cases annotates {lacking}: add cases, or take them out of the labels")
    if len(groups) < 2:
        raise UserError(
            f"all {len(groups[0].cases)} training cases annotate the same labels {list(groups[0].labels)}: mutual "
            "learning needs two groups or more: train PartialLabelTrainer"
        )
    for group in groups:
        if not group.cases:
            raise UserError(
                f"no training case annotates {list(group.labels)}: every batch needs a case of each group: add cases "
                "to this fold, or correct the setting groups"
            )


class GroupedLoader(nnUNetDataLoader):
    """nnU-Net's loader whose batches hold equally many cases of every group, or one more of some, in random order."""

    def __init__(self, groups: Sequence[Sequence[str]], *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.groups = groups

    def get_indices(self) -> np.ndarray:
        """Draws the cases of a batch."""
        first = np.random.randint(len(self.groups))
        places = [(first + i) % len(self.groups) for i in range(self.batch_size)]
        drawn = [self.groups[group][np.random.randint(len(self.groups[group]))] for group in places]
        return np.random.permutation(drawn)  # nnU-Net centers the last places of a batch on foreground
