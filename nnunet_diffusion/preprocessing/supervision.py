"""What the label files hold of what was annotated: a check, and a table to look at before training."""

from collections.abc import Mapping
from functools import partial
from typing import NamedTuple

import numpy as np
import pandas as pd
from nnunetv2.imageio.reader_writer_registry import determine_reader_writer_from_dataset_json
from nnunetv2.utilities.label_handling.label_handling import LabelManager

from nnunet_diffusion.errors import UserError
from nnunet_diffusion.partial.annotations import (
    Annotation,
    Channels,
    annotated_mask,
    known_values,
    output_channels,
    read_annotations,
)
from nnunet_diffusion.preprocessing.cases import labeled_cases
from nnunet_diffusion.tables import text_table
from nnunet_diffusion.workers import HERE, Workers, work_on

Counts = dict[str, dict[int, int]]  # case -> label value -> voxels


class Supervision(NamedTuple):
    """What a data set says about one label or region."""

    name: str
    cases: int  # that annotate it
    cases_in_union: int  # that annotate a union with it only
    cases_with_voxels: int  # that annotate it and have it
    voxels: int


def check_annotations(dataset_name: str, workers: Workers = HERE) -> None:
    """Shows what each label is annotated in, and compares it with the label files; nothing where all is annotated.

    Args:
        dataset_name: DatasetXXX_Name, a folder in nnUNet_raw.
        workers: Where; each process holds one label file in memory.

    Raises:
        UserError: If dataset.json's tables are wrong, or a label file contradicts them.
    """
    dataset_json, dataset = labeled_cases(dataset_name)
    if not dataset_json.get("annotated_labels") and not dataset_json.get("union_labels"):
        return
    manager = LabelManager(dataset_json["labels"], dataset_json.get("regions_class_order"))
    channels = output_channels(manager)
    annotations = read_annotations(dataset_json, dataset, channels)
    counts = count_labels(dataset_json, {case: files["label"] for case, files in dataset.items()}, workers)
    check_counts(counts, annotations, channels, manager.ignore_label)
    print(table(summarize(counts, annotations, channels)))


def count_labels(dataset_json: dict, label_files: Mapping[str, str], workers: Workers = HERE) -> Counts:
    """Reads every label file once, with nnU-Net's reader.

    Args:
        dataset_json: The content of dataset.json.
        label_files: {case: path}.
        workers: Where; each process holds one label file in memory.

    Returns:
        {case: {label value: voxels}}.

    Raises:
        UserError: If a file cannot be read.
    """
    reader_class = determine_reader_writer_from_dataset_json(dataset_json, verbose=False)
    tasks = {case: (path,) for case, path in label_files.items()}
    found = dict(work_on(partial(count, reader_class), tasks, workers, "Counting labels"))
    return {case: found[case] for case in label_files}


def count(reader_class: type, path: str) -> dict[int, int]:
    """Counts the voxels of each value of a label file; errors as `count_labels`."""
    try:
        voxels = reader_class().read_seg(path)[0]
    except Exception as error:  # each of nnU-Net's readers has errors of its own
        raise UserError(f"{path}: nnU-Net cannot read this: {error}") from error
    found = pd.Series(np.ravel(voxels)).value_counts()  # hashing: much faster than np.unique on a scan
    if fractions := [float(value) for value in found.index if not float(value).is_integer()]:
        raise UserError(f"{path}: label values must be whole numbers, not {fractions[:10]}: is this an image?")
    return {int(value): int(number) for value, number in sorted(found.items())}


def check_counts(
    counts: Counts, annotations: Mapping[str, Annotation], channels: Channels, ignore_label: int | None = None
) -> None:
    """Refuses label files with values of labels that their cases do not declare annotated.

    Raises:
        UserError: Listing all such cases with the values and their names.
    """
    problems = []
    for case, found in counts.items():
        unknown = set(found) - known_values(annotations[case], channels) - {ignore_label}
        names = sorted(name for name, values in channels.items() if values & unknown)
        if unknown:
            problems.append(
                f"case {case!r} has voxels with the value(s) {sorted(unknown)} ({', '.join(names) or 'no label'}) but "
                "does not declare them annotated: add the name to its annotated_labels, or correct its label file"
            )
    if problems:
        raise UserError("\n  ".join([f"{len(problems)} label file(s) contradict dataset.json:", *problems]))


def summarize(counts: Counts, annotations: Mapping[str, Annotation], channels: Channels) -> list[Supervision]:
    """Cases and voxels of each label or region but background; only annotated pairs count."""
    cases = list(counts)
    mask = annotated_mask(cases, annotations, channels).numpy().reshape(len(cases), len(channels))
    rows = []
    for channel, (name, values) in enumerate(channels.items()):
        if values == {0}:
            continue
        known = [case for case, is_known in zip(cases, mask[:, channel], strict=True) if is_known]
        voxels = [sum(counts[case].get(value, 0) for value in values) for case in known]
        in_union = sum(any(name in union for union in annotations[case].unions) for case in cases)
        rows.append(Supervision(name, len(known), in_union, int(np.count_nonzero(voxels)), sum(voxels)))
    return rows


def table(rows: list[Supervision]) -> str:
    """Writes the rows as text, then warnings in capitals of what no case can teach."""
    heads = ("label", "annotated in", "in a union in", "seen in", "voxels")
    columns = dict(zip(heads, zip(*rows, strict=True), strict=True))
    return "\n".join([text_table(columns, has_footer=False), *lacking(rows)])


def lacking(rows: list[Supervision]) -> list[str]:
    """Writes a sentence for each kind of label that has no positive supervision."""
    groups = {
        "NO CASE ANNOTATES": [row.name for row in rows if not row.cases and not row.cases_in_union],
        "ONLY IN UNIONS, SO THAT NOTHING TELLS THEM FROM THE OTHERS": [
            row.name for row in rows if not row.cases and row.cases_in_union
        ],
        "ANNOTATED, BUT NO CASE HAS A VOXEL OF": [row.name for row in rows if row.cases and not row.voxels],
    }
    advice = "the network cannot learn them: add cases, or take them out of the labels"
    return [f"WARNING: {what}: {', '.join(names)}: {advice}" for what, names in groups.items() if names]
