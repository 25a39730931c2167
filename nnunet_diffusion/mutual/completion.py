"""Completes partly annotated cases by the networks of other groups: true labels win, a gate filters what is added.

For `nnunet_diffusion mutual`; the steps are those of a round of pseudo labels, on the annotated cases themselves.
"""

import os
from collections.abc import Mapping, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from nnunetv2.utilities.crossval_split import generate_crossval_split
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from typing_extensions import TypedDict

from nnunet_diffusion.commands import MadeFrom
from nnunet_diffusion.errors import UserError
from nnunet_diffusion.files import read_json, write_json
from nnunet_diffusion.marks import mark, refuse_foreign
from nnunet_diffusion.partial.annotations import Channels, output_channels, read_annotations
from nnunet_diffusion.preprocessing.cases import fold_of
from nnunet_diffusion.records import Journal, made_from
from nnunet_diffusion.rounds.constrained import ignore_uncertain, keep_labels
from nnunet_diffusion.rounds.evidence import OrganPrior, organ_priors
from nnunet_diffusion.rounds.gate import GateSettings, filter_case
from nnunet_diffusion.rounds.prediction import (
    Case,
    annotated_evidence,
    is_predicted,
    load_confidence,
    load_prediction,
    network_spacing,
    predict,
)
from nnunet_diffusion.rounds.pseudo_labels import ignoring, pseudo_cases, remove_pseudo_labels, save_pseudo_label
from nnunet_diffusion.rounds.teacher import AT_ONCE, Model
from nnunet_diffusion.tables import text_table
from nnunet_diffusion.workers import HERE, Workers, work_on

REPORT = "completed.json"
PREDICTORS = Workers(at_once=AT_ONCE)  # one process


class Completed(TypedDict):
    """What became of one case."""

    added: list[str]  # labels
    reasons: dict[str, list[str]]  # why others were not
    ignored_voxels: int
    voxels: int


class Report(TypedDict):
    """completed.json."""

    made_from: MadeFrom
    cases: dict[str, Completed]


def training_cases_of(base: str, data_identifier: str, fold: str) -> list[str]:
    """Finds the preprocessed training cases of a fold, as nnU-Net splits them; it is split if it was not.

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


class Setup(NamedTuple):
    """Of the data: the folder, the plan, its configuration, and dataset.json."""

    base: str  # nnUNet_preprocessed/DatasetXXX_Name
    plans: PlansManager
    configuration: ConfigurationManager
    dataset_json: dict

    @property
    def label_manager(self) -> LabelManager:
        """Returns nnU-Net's."""
        return self.plans.get_label_manager(self.dataset_json)

    @property
    def channels(self) -> Channels:
        """Returns the `output_channels`."""
        return output_channels(self.label_manager)


def describe_cases(setup: Setup, names: Sequence[str]) -> dict[str, Case]:
    """Finds where preprocessed cases are, their spacing in the network's space, and what they annotate."""
    folder = os.path.join(setup.base, setup.configuration.data_identifier)
    everything = infer_dataset_class(folder).get_identifiers(folder)
    annotations = read_annotations(setup.dataset_json, everything, setup.channels)
    cases = {}
    for name in names:
        spacing = network_spacing(os.path.join(folder, name + ".pkl"), setup.plans, setup.configuration)
        cases[name] = Case(os.path.join(folder, name + ".b2nd"), spacing, annotations[name])
    return cases


def read_report(folder: str) -> Report | None:
    """Reads completed.json; None if there is none.

    Raises:
        UserError: If it is damaged.
    """
    path = os.path.join(folder, REPORT)
    return read_json(path, Report, "remove it: the cases are completed anew") if os.path.isfile(path) else None


def complete_cases(
    model: Model,
    setup: Setup,
    cases: Mapping[str, Case],
    folder: str,
    settings: GateSettings,
    predictors: Workers = PREDICTORS,
    workers: Workers = HERE,
) -> Report:
    """Completes cases, and saves what is accepted.

    In each case the networks decide about the labels that nobody looked for there, where the case has no label. Killed
    at any moment, it continues with the cases at which it was.

    Args:
        model: The model of stage 1.
        setup: Of the data.
        cases: With their annotations.
        folder: Gets `<case>_seg.b2nd`, `predicted/`, `completed.jsonl` and `completed.json`; completed labels of other
            cases are removed.
        settings: Of the gate; voxels below `voxel_confidence` are ignored.
        predictors: Where networks predict; never in this process.
        workers: Where the rest is done.

    Returns:
        The content of completed.json.

    Raises:
        UserError: If the folder, or a label in it that is to go, was not made by this program.
    """
    refuse_foreign(folder, completed="by nnunet_diffusion mutual")
    mark(folder, completed="by nnunet_diffusion mutual")
    predicted, before, channels = os.path.join(folder, "predicted"), os.path.join(folder, "before"), setup.channels
    todo = {
        name: (model, name, case, predicted, before, channels)
        for name, case in cases.items()
        if not is_predicted(predicted, name, model.identity)
    }
    for _ in work_on(predict, todo, predictors, "predicting"):
        pass
    remove_pseudo_labels(folder, sorted(set(pseudo_cases(folder)) - set(cases)))
    tasks = {name: (case, channels) for name, case in cases.items()}
    found = dict(work_on(annotated_evidence, tasks, workers, "measuring annotated cases"))
    priors = organ_priors([found[name] for name in cases])
    origin = made_from({"teacher": model.identity, "gate": settings.as_dict()})
    journal = Journal(os.path.join(folder, "completed.jsonl"), {"origin": origin, "priors": priors})
    left = sorted(set(cases) - (journal.entries.keys() & set(pseudo_cases(folder))))
    work = partial(_complete, model.identity, setup, folder, settings, priors)
    for name, entry in work_on(work, {name: (name, cases[name]) for name in left}, workers, "completing"):
        journal.add(name, entry)
    report = Report(made_from=origin, cases={name: journal.entries[name] for name in cases})
    write_json(os.path.join(folder, REPORT), report)
    return report


def _complete(
    teacher: str,
    setup: Setup,
    folder: str,
    settings: GateSettings,
    priors: Mapping[str, OrganPrior],
    name: str,
    case: Case,
) -> Completed:
    manager, predicted = ignoring(setup.label_manager), os.path.join(folder, "predicted")
    prediction, confidence = load_prediction(predicted, name), load_confidence(predicted, name)
    added = {organ: found for organ, found in prediction.evidence.items() if organ not in case.annotation.labels}
    verdict = filter_case(added, priors, settings, is_partly_annotated=True)
    labels, annotation = keep_labels(
        torch.from_numpy(prediction.labels), set(verdict.organs), case.annotation, setup.channels
    )
    least = 0.0 if settings.is_open else settings.voxel_confidence
    is_uncertain = ignore_uncertain(labels, torch.from_numpy(confidence), least, manager.ignore_label)
    entry = Completed(
        added=sorted(verdict.organs),
        reasons=verdict.reasons,
        ignored_voxels=int(np.count_nonzero((is_uncertain != labels).numpy())),
        voxels=labels.numel(),
    )
    info, label = {"teacher": teacher, **entry}, is_uncertain.numpy()
    patch_size = setup.configuration.patch_size
    save_pseudo_label(folder, name, label, annotation, manager, patch_size, completes=case.annotation, info=info)
    return entry


def completion_table(report: Report, cases: Mapping[str, Case], channels: Channels) -> str:
    """Makes a line for each label: where it was annotated, lacking, and added; then how much is ignored."""
    names = [name for name, values in channels.items() if values != {0}]
    annotated = [sum(name in case.annotation.labels for case in cases.values()) for name in names]
    entries = report["cases"].values()
    added = [sum(name in entry["added"] for entry in entries) for name in names]
    ignored = sum(entry["ignored_voxels"] for entry in entries) / max(1, sum(entry["voxels"] for entry in entries))
    columns = {
        "label": [*names, "ignored voxels"],
        "annotated in": [*annotated, ""],
        "added in": [*added, f"{ignored:.2%}"],
        "of": [*(len(cases) - number for number in annotated), ""],
    }
    return text_table(columns)
