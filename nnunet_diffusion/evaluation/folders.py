"""Compares a folder of predictions with one of references, case by case; what cannot be compared is named."""

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import chain

import numpy as np
import SimpleITK as sitk
from nnunetv2.utilities.label_handling.label_handling import LabelManager

from nnunet_diffusion.errors import UserError
from nnunet_diffusion.evaluation.rules import Rules, Score, Target, score
from nnunet_diffusion.evaluation.targets import Targets, case_targets, organ_targets
from nnunet_diffusion.names import why_unsafe
from nnunet_diffusion.partial.annotations import TABLES, Annotation, Channels, output_channels, read_annotations
from nnunet_diffusion.preprocessing.scan_checks import (
    GEOMETRIC_ENDINGS,
    check_label,
    check_same_geometry,
    label_values,
    read_geometry,
)
from nnunet_diffusion.workers import HERE, Workers, work_on


@dataclass
class Evaluation:
    """What was compared, and what was not."""

    rules: Rules
    organs: Targets
    scores: dict[str, dict[str, Score]]  # case -> target -> score, for the pairs that count
    unions: Targets = field(default_factory=dict)
    left_out: dict[str, list[str]] = field(default_factory=dict)  # case -> organs that it does not annotate
    missing: list[str] = field(default_factory=list)  # references without a prediction
    failed: dict[str, str] = field(default_factory=dict)  # case -> why it could not be compared
    unexpected: list[str] = field(default_factory=list)  # predictions without a reference


def evaluate_folders(
    predictions: str,
    references: str,
    dataset_json: Mapping,
    rules: Rules,
    tolerance_mm: float | None = None,
    workers: Workers = HERE,
) -> Evaluation:
    """Compares each CASE.nii.gz (or the data set's file ending) of `references` with its namesake in `predictions`.

    Args:
        predictions: Folder, as `nnUNetv2_predict` leaves it.
        references: Folder of reference labels.
        dataset_json: nnU-Net's description of the data set; `annotated_labels` and `union_labels` decide what counts.
        rules: FLARE22 or NNUNET.
        tolerance_mm: For NSD, see `organ_targets`.
        workers: Where; each process holds one case in memory. Of those that are killed the cases are named.

    Raises:
        UserError: If there is nothing to compare, or dataset.json is faulty.
    """
    ending = dataset_json["file_ending"]
    if ending not in GEOMETRIC_ENDINGS:
        raise UserError(f"file ending {ending}: distances in mm need files with a spacing: {GEOMETRIC_ENDINGS}")
    references, predictions = os.path.abspath(references), os.path.abspath(predictions)  # for workers elsewhere
    expected, found = (cases_in(folder, ending) for folder in (references, predictions))
    if not expected:
        raise UserError(f"{references}: holds no file that ends with {ending}: give the folder of reference labels")
    organs = organ_targets(dataset_json, rules, tolerance_mm)
    annotations, channels = annotations_of(expected, dataset_json)
    targets = {case: case_targets(annotations[case], channels, organs) for case in expected}
    files = {c: (os.path.join(references, c + ending), os.path.join(predictions, c + ending)) for c in expected}
    labels = dataset_json["labels"]
    work = partial(evaluate_case, rules=rules, labels=label_values(labels), ignore=labels.get("ignore"))
    there = [case for case in expected if case in found]
    failed = {case: f"its name {reason}: rename its files" for case in there if (reason := why_unsafe(case))}
    tasks = {case: (*files[case], list(targets[case].values())) for case in there if case not in failed}
    results = dict(work_on(work, tasks, workers, "evaluating", failed)) | failed
    scores = {case: results[case] for case in there if not isinstance(results[case], str)}
    return Evaluation(
        rules,
        organs,
        scores,
        {name: target for case in scores for name, target in targets[case].items() if name not in organs},
        {case: absent for case in scores if (absent := [name for name in organs if name not in targets[case]])},
        [case for case in expected if case not in found],
        {case: results[case] for case in there if isinstance(results[case], str)},
        [case for case in found if case not in expected],
    )


def annotations_of(cases: Collection[str], dataset_json: Mapping) -> tuple[dict[str, Annotation], Channels]:
    """Returns what was annotated in each case, and the `output_channels`; the tables may name more cases.

    Raises:
        UserError: If the tables are faulty.
    """
    channels = output_channels(LabelManager(dataset_json["labels"], dataset_json.get("regions_class_order")))
    tables = [table for key in TABLES if isinstance(table := dataset_json.get(key), Mapping)]
    return read_annotations(dataset_json, {*cases, *chain(*tables)}, channels), channels


def cases_in(folder: str, ending: str) -> list[str]:
    """Lists the names of a folder's files without their ending, sorted.

    Raises:
        UserError: If it is not a folder.
    """
    if not os.path.isdir(folder):
        raise UserError(f"{folder}: is not a folder: give one of label maps, CASE{ending}")
    return sorted(n.removesuffix(ending) for n in os.listdir(folder) if n.endswith(ending) and not n.startswith("."))


def evaluate_case(
    reference_file: str,
    prediction_file: str,
    targets: list[Target],
    rules: Rules,
    labels: Collection[int],
    ignore: int | None = None,
) -> dict[str, Score] | str:
    """Returns the scores of one case by target, or why there are none.

    Args:
        reference_file: A label map.
        prediction_file: A label map on the same voxels.
        targets: What is compared.
        rules: FLARE22 or NNUNET.
        labels: The values that may occur in the files, background and ignore label included.
        ignore: Voxels of the reference with this value are background in both.
    """
    try:
        reference, spacing_mm = read_labels(reference_file, labels)
        prediction, _ = read_labels(prediction_file, labels, like=reference_file)
    except UserError as error:
        return str(error)
    if ignore is not None:
        prediction[reference == ignore] = 0
    masks = ([np.isin(label_map, target.labels) for label_map in (reference, prediction)] for target in targets)
    return {t.name: score(*pair, spacing_mm, t, rules) for t, pair in zip(targets, masks, strict=True)}


def read_labels(path: str, labels: Collection[int], like: str | None = None) -> tuple[np.ndarray, tuple[float, ...]]:
    """Reads a label map and its spacing in mm, both along (z, y, x).

    Args:
        path: The file.
        labels: The values that may occur.
        like: A file on whose voxels it must lie.

    Raises:
        UserError: If the file is unreadable, holds other values or lies elsewhere.
    """
    geometry = check_label(path, labels)
    if like is not None:
        check_same_geometry(path, geometry, like, read_geometry(like))
    return sitk.GetArrayFromImage(sitk.ReadImage(path)), geometry.spacing[::-1]
