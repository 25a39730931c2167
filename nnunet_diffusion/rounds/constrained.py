"""What a prediction adds to what was annotated: true labels always win, and what is too uncertain is ignored.

The value of a voxel in the label file of a partly annotated case leaves some classes possible: an annotated label only
itself, the first label of a union any of its members, background the background and all that nobody looked for. The
prediction decides between these alone: its probabilities are those given the annotation. A scan of the pool leaves all
classes possible everywhere.
"""

import torch
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from torch import Tensor

from nnunet_diffusion.partial.annotations import Annotation, Channels

NOTHING_ANNOTATED = Annotation(frozenset({"background"}))


def possible_classes(annotation: Annotation, channels: Channels) -> Tensor:
    """Finds the classes that a voxel may have, by its value in the case's label file.

    Args:
        annotation: Of the case.
        channels: The `output_channels`, single labels and not regions.

    Returns:
        (V, C) bool, V being the highest label value plus one; row v says what a voxel of value v may be. Values that
        cannot occur in the case's label file leave nothing: such voxels stay what they are.
    """
    index = {name: channel for channel, name in enumerate(channels)}
    value = {name: next(iter(values)) for name, values in channels.items()}
    possible = torch.zeros(max(value.values()) + 1, len(channels), dtype=torch.bool)
    in_unions = {name for union in annotation.unions for name in union}
    for name in annotation.labels:
        possible[value[name], index[name]] = True
    for union in annotation.unions:
        possible[value[union[0]], [index[name] for name in union]] = True
    possible[0, [index[name] for name in channels if name not in annotation.labels | in_unions]] = True
    return possible


def most_probable(
    logits: Tensor, label_manager: LabelManager, annotated: Tensor | None = None, possible: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Finds the most probable label of each voxel, given what was annotated, and how probable it is.

    Args:
        logits: (C, X, Y, Z) output of the network before the softmax; computed slice by slice in float32.
        label_manager: nnU-Net's.
        annotated: (X, Y, Z) label file of a partly annotated case in the network's space; its -1 (outside the body) and
            its ignore label stay as they are.
        possible: The case's `possible_classes`.

    Returns:
        (X, Y, Z) int16 label values; (X, Y, Z) float32 probability of that label. With regions it is that of the most
        uncertain region being as the label map says. 1 where the annotation leaves no choice.

    Raises:
        NotImplementedError: If a region-based data set is to be completed.
    """
    if annotated is not None and label_manager.has_regions:
        raise NotImplementedError("partly annotated cases cannot be completed where regions are labels")
    shape = logits.shape[1:]
    labels, confidence = torch.empty(shape, dtype=torch.int16), torch.empty(shape, dtype=torch.float32)
    values = torch.tensor(label_manager.all_labels, dtype=torch.int16)  # of the outputs, in their order
    for x in range(shape[0]):
        here = logits[:, x].float()
        if label_manager.has_regions:
            p = here.sigmoid()
            labels[x] = label_manager.convert_probabilities_to_segmentation(p).to(torch.int16)
            confidence[x] = torch.maximum(p, 1 - p).amin(0)
            continue
        if annotated is not None:
            choice = _choice(annotated[x], possible)
            here = here.masked_fill(~choice.movedim(-1, 0), -torch.inf)
        confidence[x], channel = here.softmax(0).max(0)
        labels[x] = values[channel]
    if annotated is not None:
        is_fixed = _is_fixed(annotated, possible)
        labels[is_fixed], confidence[is_fixed] = annotated[is_fixed].to(torch.int16), 1
    return labels, confidence


def _is_fixed(annotated: Tensor, possible: Tensor) -> Tensor:
    """Says whether a voxel is outside the body or ignored, or has a value that the annotation does not know."""
    is_unknown = torch.cat([~possible.any(1), torch.tensor([True])])
    return is_unknown[torch.where(annotated < 0, len(possible), annotated.clamp_max(len(possible))).long()]


def _choice(annotated: Tensor, possible: Tensor) -> Tensor:
    """Returns (..., C) bool; everything is possible where nothing will be read."""
    is_fixed = _is_fixed(annotated, possible)
    choice = possible[torch.where(is_fixed, 0, annotated).long()]
    return choice | is_fixed[..., None]


def ignore_uncertain(labels: Tensor, confidence: Tensor, least: float | Tensor, ignore_label: int) -> Tensor:
    """Puts `ignore_label` where the confidence is below `least`, of all or of each voxel; not outside the body."""
    return torch.where((confidence < least) & (labels >= 0), ignore_label, labels).to(labels.dtype)


def keep_labels(
    labels: Tensor, kept: set[str], annotation: Annotation, channels: Channels
) -> tuple[Tensor, Annotation]:
    """Takes back what a prediction said of labels that are not accepted.

    Args:
        labels: (X, Y, Z) label values of `most_probable`.
        kept: Names of the predicted labels that are accepted. Those annotated are, anyway.
        annotation: What was annotated; `NOTHING_ANNOTATED` for a scan of the pool.
        channels: The `output_channels`.

    Returns:
        The label map, where voxels of labels that are not accepted have the value of the background, or of a union's
        first member if not all of its members are accepted; what it now says something about. Regions share voxels:
        with them the label map stays, and only what it says something about tells which of them are accepted.
    """
    if any(len(values) > 1 for values in channels.values()):
        return labels, Annotation(annotation.labels & set(channels) | kept)
    value = {name: next(iter(values)) for name, values in channels.items()}
    unions = tuple(union for union in annotation.unions if not kept.issuperset(union))
    in_unions = {name for union in unions for name in union}
    known = annotation.labels | kept - in_unions
    table = torch.arange(max(value.values()) + 1, dtype=labels.dtype)
    for name in set(channels) - known - in_unions:
        table[value[name]] = 0
    for union in unions:
        table[[value[name] for name in union]] = value[union[0]]
    is_label = (labels >= 0) & (labels < len(table))  # neither outside the body nor ignored
    return torch.where(is_label, table[torch.where(is_label, labels, 0).long()], labels), Annotation(known, unions)
