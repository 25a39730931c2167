"""Which labels were annotated in which case: the tables `annotated_labels` and `union_labels` of dataset.json.

`annotated_labels`: `{case: [label name, ...]}`. Somebody looked for these labels in the whole scan: where they are not
in its label file, they are not in the body. A case that is not listed is fully annotated. Background always is.

`union_labels`: `{case: [[label name, name, ...], ...]}`. In this case's label file, voxels with the value of a group's
*first* name belong to any of the labels of that group, nobody said to which; the values of the other names do not
occur. Only the union is known, so its names are not in `annotated_labels` of the case; a case that is listed here
alone is annotated for all other labels. A label is in one group of a case at most.

In a region-based data set the names are those of regions, a region that contains others is such a union already, and
`union_labels` is refused. A region is annotated if each label in it belongs to a named region that it contains.
"""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from nnunetv2.utilities.label_handling.label_handling import LabelManager

from nnunet_diffusion.errors import UserError

TABLES = ("annotated_labels", "union_labels")
Channels = dict[str, frozenset[int]]  # name -> label values, in the order of the network's output


@dataclass(frozen=True)
class Annotation:
    """What is known of one case; names are those of `output_channels`."""

    labels: frozenset[str]  # background included, members of unions not
    unions: tuple[tuple[str, ...], ...] = ()  # the first name's value stands for all of them


def output_channels(label_manager: LabelManager) -> Channels:
    """Returns the name and the label values of each output of the network: labels, background first, or regions."""
    values = {
        name: frozenset(int(v) for v in value) if isinstance(value, (list, tuple)) else frozenset([int(value)])
        for name, value in label_manager.label_dict.items()
        if name != "ignore"
    }
    if label_manager.has_regions:
        return {name: value for name, value in values.items() if value != {0}}  # as LabelManager.foreground_regions
    return dict(sorted(values.items(), key=lambda item: min(item[1])))


def read_annotations(dataset_json: dict, cases: Collection[str], channels: Channels) -> dict[str, Annotation]:
    """Returns what was annotated in each labeled case.

    Args:
        dataset_json: The content of dataset.json.
        cases: The names of all labeled cases.
        channels: The `output_channels`.

    Returns:
        {case: annotation} of all `cases`.

    Raises:
        UserError: Listing every table, case and name that is wrong.
    """
    tables = {key: dataset_json.get(key, {}) for key in TABLES}
    wrong = [key for key, table in tables.items() if not isinstance(table, dict)]
    _refuse([f"{key!r} must be {{case: list}}, not a {type(tables[key]).__name__}" for key in wrong])
    annotated, unions = tables.values()
    problems = [
        f"{key} names case {case!r}, which is not a labeled case of the data set: correct its name or remove it"
        for key, table in tables.items()
        for case in table
        if case not in cases
    ]
    for case, names in annotated.items():
        problems += _name_problems(f"annotated_labels of case {case!r}", names, channels, {"background"})
    for case, groups in unions.items():
        problems += _union_problems(case, groups, annotated.get(case, []), channels)
    _refuse(problems)
    return {case: _annotation(annotated.get(case), unions.get(case, []), channels) for case in cases}


def annotated_mask(keys: Sequence[str], annotations: Mapping[str, Annotation], channels: Channels) -> torch.Tensor:
    """Returns which outputs of the network each case of a batch says something about, each for itself.

    Args:
        keys: The cases, `batch["keys"]`.
        annotations: From `read_annotations`.
        channels: The `output_channels`.

    Returns:
        (B, C) bool; the members of a union are False.
    """
    rows = {case: [is_annotated(name, annotations[case], channels) for name in channels] for case in set(keys)}
    return torch.tensor([rows[case] for case in keys])


def group_map(keys: Sequence[str], annotations: Mapping[str, Annotation], channels: Channels) -> torch.Tensor:
    """Returns the channel that each class is merged into, as `losses.PartialLabelLoss` wants it; not for regions.

    Args:
        keys: The cases, `batch["keys"]`.
        annotations: From `read_annotations`.
        channels: The `output_channels`.

    Returns:
        (B, C) int64: an annotated class is itself, a member of a union its first name, any other background, 0.
    """
    index = {name: channel for channel, name in enumerate(channels)}
    rows = {}
    for case in set(keys):
        target = {name: name for name in annotations[case].labels}
        target.update({name: union[0] for union in annotations[case].unions for name in union})
        rows[case] = [index[target[name]] if name in target else 0 for name in channels]
    return torch.tensor([rows[case] for case in keys])


def balanced_cases(cases: Sequence[str], annotations: Mapping[str, Annotation]) -> list[str]:
    """Repeats cases so that each label is the reason for equally many draws, however few cases annotate it.

    A uniform draw from the result is, but for rounding, a uniform draw of a label and then of a case that annotates it.
    Ours. Cases that annotate nothing are left out, unless all are such. Where all annotate the same, they are returned
    as they are.
    """
    labels = {case: annotations[case].labels - {"background"} for case in cases}
    count = Counter(label for case in cases for label in labels[case])
    weight = {case: sum(1 / count[label] for label in labels[case]) for case in cases}
    if not count:
        return list(cases)
    least = min(value for value in weight.values() if value > 0)
    repeats = {case: round(10 * weight[case] / least) for case in cases}
    if len(set(repeats.values())) == 1:
        return list(cases)
    return [case for case in cases for _ in range(repeats[case])]


def known_values(annotation: Annotation, channels: Channels) -> set[int]:
    """Returns the label values that may occur in a case's label file, but for the ignore label."""
    names = [*annotation.labels, *(union[0] for union in annotation.unions)]
    return {0}.union(*(channels[name] for name in names))


def is_annotated(name: str, annotation: Annotation, channels: Channels) -> bool:
    """Says whether a label, or all of a region, is annotated by itself: members of a union are not."""
    parts = [channels[label] for label in annotation.labels if channels[label] <= channels[name]]
    return frozenset().union(*parts) == channels[name]


def _annotation(names: list[str] | None, unions: list[list[str]], channels: Channels) -> Annotation:
    in_union = {name for union in unions for name in union}
    labels = set(channels) - in_union if names is None else {*names, "background"} & set(channels)
    return Annotation(frozenset(labels), tuple(tuple(union) for union in unions))


def _name_problems(what: str, names: object, channels: Channels, also: Collection[str] = ()) -> list[str]:
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        return [f"{what} must be a list of label names, not {names!r}"]
    if unknown := sorted({name for name in names if name not in channels and name not in also}):
        return [f"{what} names {unknown}, not among the labels {list(channels)}: correct the name or declare the label"]
    return []


def _union_problems(case: str, groups: object, annotated: object, channels: Channels) -> list[str]:
    what = f"union_labels of case {case!r}"
    if not all(len(values) == 1 for values in channels.values()):
        return [f"{what}: this data set has regions: name a region that is the union in annotated_labels instead"]
    if not isinstance(groups, list):
        return [f"{what} must be a list of lists of label names, not {groups!r}"]
    problems = [problem for group in groups for problem in _name_problems(what, group, channels)]
    if problems:
        return problems
    names = [name for group in groups for name in group]
    problems = [f"{what}: {group} must be two labels or more" for group in groups if len(set(group)) < 2]
    if "background" in names:
        problems.append(f"{what}: background cannot be in a union: name labels only")
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        problems.append(f"{what}: {repeated} occur more than once: a label is in one union at most")
    if both := sorted(set(names) & set(annotated if isinstance(annotated, list) else [])):
        problems.append(f"{what}: {both} are in annotated_labels of the case as well: take them out of one of them")
    return problems


def _refuse(problems: list[str]) -> None:
    if problems:
        raise UserError("\n  ".join([f"dataset.json: {len(problems)} problem(s) with what was annotated:", *problems]))
