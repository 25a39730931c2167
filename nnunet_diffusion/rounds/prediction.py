"""Predictions in the network's space: nnU-Net's sliding window on preprocessed scans, without export or resampling.

`predicted/<case>.b2nd` in a round's folder holds the label of each voxel and in its metadata the evidence for the gate;
`predicted_confidence/<case>.b2nd`, which is written before, holds how probable each label is, in 1/255, and goes when
the round is filtered. A prediction is there whole or not at all, and belongs to one teacher: many processes can predict
at the same time, and what is there is not predicted again.
"""

import json
import os
from typing import NamedTuple

import numpy as np
import torch
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from typing_extensions import TypedDict

from nnunet_diffusion.errors import UserError
from nnunet_diffusion.files import check_shape
from nnunet_diffusion.partial.annotations import Annotation, Channels
from nnunet_diffusion.preprocessing.case_files import REMEDY, load_properties, read_preprocessed
from nnunet_diffusion.rounds.constrained import most_probable, possible_classes
from nnunet_diffusion.rounds.evidence import Evidence, measure
from nnunet_diffusion.rounds.pseudo_labels import open_with_metadata, write_array
from nnunet_diffusion.rounds.teacher import Model, Teacher, loaded

LEVELS = 255  # of the stored confidence
ANEW = "remove it and run the same command again"


class Case(NamedTuple):
    """A preprocessed scan."""

    image: str  # its .b2nd
    spacing_mm: tuple[float, ...]  # of the network's space
    annotation: Annotation | None  # of a partly annotated case, whose label file lies beside the image


class Prediction(NamedTuple):
    """What a teacher said of one case."""

    labels: np.ndarray  # (X, Y, Z) int16
    evidence: dict[str, Evidence]
    teacher: str


def network_spacing(properties: str, plans: PlansManager, configuration: ConfigurationManager) -> tuple[float, ...]:
    """Finds the spacing of a preprocessed case in mm, in the plan's axis order; 2d keeps the distance between slices.

    Args:
        properties: The case's .pkl.
        plans: Which know the axis order.
        configuration: Which the case was preprocessed for.

    Raises:
        UserError: If the case's properties are damaged.
    """
    spacing = [float(value) for value in configuration.spacing]
    if len(spacing) == 2:
        original = load_properties(properties).get("spacing")
        try:
            spacing.insert(0, float(original[plans.transpose_forward[0]]))
        except (TypeError, IndexError, ValueError) as error:
            raise UserError(f"{properties}: spacing: is {original!r}, not three numbers: {REMEDY}") from error
    return tuple(spacing)


class PredictionContent(TypedDict):
    """The metadata of a prediction."""

    teacher: str
    evidence: dict[str, Evidence]


def predict(model: Model, name: str, case: Case, folder: str, before: str, channels: Channels) -> None:
    """Predicts one case in a worker, unless these weights did already; arguments and errors as `predict_case`."""
    if not is_predicted(folder, name, model.identity):
        predict_case(loaded(model), name, case, folder, before, channels)


@torch.inference_mode()
def predict_case(teacher: Teacher, name: str, case: Case, folder: str, before: str, channels: Channels) -> None:
    """Predicts one case and saves it.

    Args:
        teacher: The model.
        name: Of the case.
        case: Where its image is, and what was annotated.
        folder: Of the predictions of this round.
        before: Of the round before; evidence compares with it where it has the case.
        channels: The `output_channels`.

    Raises:
        UserError: If the image does not fit the plan, or a file is damaged.
        OSError: If the prediction cannot be written.
    """
    image = torch.from_numpy(read_preprocessed(case.image))
    expected = len(teacher.predictor.dataset_json["channel_names"])
    if image.ndim != 4 or len(image) != expected:
        raise UserError(
            f"{case.image} is {tuple(image.shape)}: the plan holds (channel, x, y, z) with {expected} channel(s): "
            "preprocess the pool again for this plan"
        )
    logits, members = teacher.logits(image)
    annotated = possible = None
    if case.annotation is not None:
        annotated = torch.from_numpy(read_annotated(case).astype(np.int16))
        possible = possible_classes(case.annotation, channels)
    labels, confidence = most_probable(logits, teacher.label_manager, annotated, possible)
    if annotated is None and any(teacher.predictor.configuration_manager.use_mask_for_norm):
        labels[(image == 0).all(0)] = -1  # outside the body: nnU-Net's preprocessing marks it, its masking needs it
    previous = load_prediction(before, name).labels if has_prediction(before, name) else None
    labels, confidence = labels.numpy(), confidence.numpy()
    evidence = measure(labels, channels, case.spacing_mm, confidence, members, previous)
    about = {"teacher": teacher.identity, "evidence": {organ: e._asdict() for organ, e in evidence.items()}}
    patch_size = teacher.predictor.configuration_manager.patch_size
    levels = np.round(confidence * LEVELS).astype(np.uint8)
    write_array(os.path.join(confidence_folder(folder), name + ".b2nd"), levels[None], patch_size, "")
    write_array(os.path.join(folder, name + ".b2nd"), labels[None], patch_size, json.dumps(about))


def confidence_folder(folder: str) -> str:
    """Names where the confidence of a folder's predictions lies."""
    return folder + "_confidence"


def has_prediction(folder: str, name: str) -> bool:
    """Says whether any teacher predicted the case there."""
    return os.path.isfile(os.path.join(folder, name + ".b2nd"))


def is_predicted(folder: str, name: str, teacher: str) -> bool:
    """Says whether this teacher predicted the case there."""
    return has_prediction(folder, name) and read_evidence(folder, name)[1] == teacher


def read_evidence(folder: str, name: str) -> tuple[dict[str, Evidence], str]:
    """Reads the evidence for a prediction and its teacher, without the maps.

    Raises:
        UserError: If the file is damaged.
    """
    path = os.path.join(folder, name + ".b2nd")
    return _about(open_with_metadata(path)[1], path)


def load_prediction(folder: str, name: str) -> Prediction:
    """Loads a prediction with its label map.

    Raises:
        UserError: If the file is damaged.
    """
    path = os.path.join(folder, name + ".b2nd")
    labels, text = open_with_metadata(path)
    return Prediction(_map(labels, path), *_about(text, path))


def load_confidence(folder: str, name: str) -> np.ndarray:
    """Loads how probable the labels of a prediction are, (X, Y, Z) float32; it is there until the round is filtered.

    Raises:
        UserError: If the file is damaged or not there.
    """
    path = os.path.join(confidence_folder(folder), name + ".b2nd")
    if not os.path.isfile(path):
        raise UserError(
            f"{path}: is not there: remove {os.path.join(folder, name)}.b2nd and run the same command again"
        )
    return _map(open_with_metadata(path)[0], path).astype(np.float32) / LEVELS


def _map(array, path: str) -> np.ndarray:
    if array.ndim != 4 or len(array) != 1:
        raise UserError(f"{path}: is {array.shape}, not one map: {ANEW}")
    return array[:][0]


def _about(text: str, path: str) -> tuple[dict[str, Evidence], str]:
    try:
        content = json.loads(text)
    except (TypeError, ValueError) as error:
        raise UserError(f"{path}: is no prediction ({error}): {ANEW}") from error
    check_shape(content, PredictionContent, path, ANEW)
    return {name: Evidence(**entry) for name, entry in content["evidence"].items()}, content["teacher"]


def read_annotated(case: Case) -> np.ndarray:
    """Reads the (X, Y, Z) label file of an annotated case."""
    return read_preprocessed(case.image.removesuffix(".b2nd") + "_seg.b2nd")[0]


def annotated_evidence(case: Case, channels: Channels) -> dict[str, Evidence]:
    """Measures the organs that a case annotates."""
    evidence = measure(read_annotated(case), channels, case.spacing_mm)
    return {name: found for name, found in evidence.items() if name in case.annotation.labels}
