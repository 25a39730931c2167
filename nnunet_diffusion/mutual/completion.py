"""Completes partly annotated cases by the networks of other groups: true labels win, a gate judges what is added.

For `nnunet_diffusion mutual`; the steps are those of a round of pseudo labels, on the annotated cases themselves.
"""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from batchgenerators.utilities.file_and_folder_operations import load_json
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from nnunetv2.utilities.crossval_split import generate_crossval_split
from tqdm import tqdm

from nnunet_diffusion.errors import UserError
from nnunet_diffusion.evaluation.summary import text_table
from nnunet_diffusion.files import write_json
from nnunet_diffusion.partial.annotations import Channels, output_channels, read_annotations
from nnunet_diffusion.preprocessing.cases import fold_of
from nnunet_diffusion.rounds.constrained import ignore_uncertain, keep_labels
from nnunet_diffusion.rounds.evidence import Anatomy, Evidence, anatomy, measure
from nnunet_diffusion.rounds.gate import GateSettings, judge
from nnunet_diffusion.rounds.prediction import (
    Case,
    Teacher,
    load_prediction,
    network_spacing,
    predict_case,
    read_preprocessed,
)
from nnunet_diffusion.rounds.pseudo_labels import ENDING, ignoring, pseudo_cases, save_pseudo_label

REPORT = "completed.json"


def training_cases_of(base: str, data_identifier: str, fold: str) -> list[str]:
    """The preprocessed training cases of a fold, as nnU-Net splits them; it is split if it was not.

    Args:
        base: The data set's folder in nnUNet_preprocessed.
        data_identifier: Of the configuration.
        fold: A number, or all.

    Raises:
        UserError: If nothing is preprocessed, or splits_final.json has no such fold.
    """
    folder = os.path.join(base, data_identifier)
    if not os.path.isdir(folder):
        raise UserError(f"{folder}: no preprocessed cases: run nnunet_diffusion plan_and_preprocess first")
    names = sorted(infer_dataset_class(folder).get_identifiers(folder))
    if fold == "all":
        return names
    path = os.path.join(base, "splits_final.json")
    if not os.path.isfile(path) and len(names) < 5:
        raise UserError(f"{folder}: nnU-Net splits 5 cases or more, not {len(names)}: write {path}, or take -f all")
    if not os.path.isfile(path):
        write_json(path, generate_crossval_split(names, seed=12345, n_splits=5))  # as nnU-Net's do_split
    return sorted(fold_of(path, fold)[0])


def describe_cases(base: str, teacher: Teacher, names: Sequence[str]) -> dict[str, Case]:
    """Where preprocessed cases are, their spacing in the network's space, and what they annotate."""
    predictor = teacher.predictor
    configuration, channels = predictor.configuration_manager, output_channels(teacher.label_manager)
    folder = os.path.join(base, configuration.data_identifier)
    everything = infer_dataset_class(folder).get_identifiers(folder)
    annotations = read_annotations(load_json(os.path.join(base, "dataset.json")), everything, channels)
    cases = {}
    for name in names:
        spacing = network_spacing(os.path.join(folder, name + ".pkl"), predictor.plans_manager, configuration)
        cases[name] = Case(os.path.join(folder, name + ".b2nd"), spacing, annotations[name])
    return cases


def complete_cases(teacher: Teacher, cases: Mapping[str, Case], folder: str, settings: GateSettings) -> dict[str, Any]:
    """Completes cases, and saves what can be believed.

    In each case the networks decide about the labels that nobody looked for there, where the case has no label. Killed
    at any moment, it continues with the case at which it was.

    Args:
        teacher: The model of stage 1.
        cases: With their annotations.
        folder: Gets `<case>_seg.b2nd`, `predicted/` and `completed.json`; completed labels of other cases are removed.
        settings: Of the gate; voxels below `voxel_confidence` are ignored.

    Returns:
        The content of completed.json: of each case the labels that were added and why others were not, the voxels that
        are ignored, and of how many there are.
    """
    channels = output_channels(teacher.label_manager)
    predicted = os.path.join(folder, "predicted")
    for name, case in tqdm(cases.items(), "completing", unit="case"):
        predict_case(teacher, name, case, predicted, os.path.join(folder, "before"), channels)
    if os.path.isfile(os.path.join(folder, REPORT)):
        os.remove(os.path.join(folder, REPORT))  # it says that everything is there
    for name in set(pseudo_cases(folder)) - set(cases):
        os.remove(os.path.join(folder, name + ENDING))
    shown = anatomy([annotated_evidence(case, channels) for case in cases.values()])
    entries = {name: _complete(teacher, name, case, folder, settings, shown) for name, case in cases.items()}
    report = {"teacher": teacher.identity, "gate": settings.as_dict(), "cases": entries}
    write_json(os.path.join(folder, REPORT), report)
    return report


def annotated_evidence(case: Case, channels: Channels) -> dict[str, Evidence]:
    """How the organs that a case annotates look in it."""
    labels = read_preprocessed(case.image.removesuffix(".b2nd") + ENDING)[0]
    return {k: v for k, v in measure(labels, channels, case.spacing_mm).items() if k in case.annotation.labels}


def _complete(
    teacher: Teacher, name: str, case: Case, folder: str, settings: GateSettings, shown: Mapping[str, Anatomy]
) -> dict[str, Any]:
    manager, channels = ignoring(teacher.label_manager), output_channels(teacher.label_manager)
    prediction = load_prediction(os.path.join(folder, "predicted"), name)
    added = {organ: found for organ, found in prediction.evidence.items() if organ not in case.annotation.labels}
    verdict = judge(added, shown, settings, is_partly_annotated=True)
    labels, annotation = keep_labels(
        torch.from_numpy(prediction.labels), set(verdict.organs), case.annotation, channels
    )
    least = 0.0 if settings.is_open else settings.voxel_confidence
    is_uncertain = ignore_uncertain(labels, torch.from_numpy(prediction.confidence), least, manager.ignore_label)
    entry = {
        "added": sorted(verdict.organs),
        "reasons": verdict.reasons,
        "ignored_voxels": int(np.count_nonzero((is_uncertain != labels).numpy())),
        "voxels": labels.numel(),
    }
    patch_size = teacher.predictor.configuration_manager.patch_size
    info = {"teacher": teacher.identity, **entry}
    label = is_uncertain.numpy()
    save_pseudo_label(folder, name, label, annotation, manager, patch_size, completes=case.annotation, info=info)
    return entry


def completion_table(report: Mapping[str, Any], cases: Mapping[str, Case], channels: Channels) -> str:
    """A line for each label: where it was annotated, lacking, and added; then how much is ignored."""
    names = [name for name, values in channels.items() if values != {0}]
    annotated = [sum(name in case.annotation.labels for case in cases.values()) for name in names]
    added = [sum(name in entry["added"] for entry in report["cases"].values()) for name in names]
    entries = report["cases"].values()
    ignored = sum(entry["ignored_voxels"] for entry in entries) / max(1, sum(entry["voxels"] for entry in entries))
    rows = {
        "label": [*names, "ignored voxels"],
        "annotated in": [*map(str, annotated), ""],
        "added in": [*map(str, added), f"{ignored:.2%}"],
        "of": [*(str(len(cases) - number) for number in annotated), ""],
    }
    return text_table(rows)
