"""Predictions in the network's space: nnU-Net's sliding window on preprocessed scans, without export or resampling.

`predicted/<case>.b2nd` in a round's folder holds two int16 maps, the label of each voxel and how probable it is in
1/255, and in its metadata the evidence for the gate. It is there whole or not at all, and belongs to one teacher: parts
of the pool can be predicted at the same time by many processes, and what is there is not predicted again.
"""

import contextlib
import io
import json
import os
from typing import NamedTuple

import numpy as np
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from typing_extensions import TypedDict

from nnunet_diffusion.errors import UserError
from nnunet_diffusion.files import check_shape
from nnunet_diffusion.model_folder import PLAIN_VALUES_ONLY, find_folds, load_checkpoint, trainers_of
from nnunet_diffusion.partial.annotations import Annotation, Channels
from nnunet_diffusion.preprocessing.case_files import REMEDY, load_properties, read_preprocessed
from nnunet_diffusion.rounds.constrained import most_probable, possible_classes
from nnunet_diffusion.rounds.evidence import Evidence, measure
from nnunet_diffusion.rounds.pseudo_labels import open_with_metadata, write_array

CHECKPOINT = "checkpoint_final.pth"
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
    confidence: np.ndarray  # (X, Y, Z) float32
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


class Teacher:
    """A trained model folder, one or several folds, as nnU-Net's own predictor loads it."""

    def __init__(self, folder: str, folds: list[str], identity: str, device: torch.device, mirroring: bool = True):
        """Loads it.

        Args:
            folder: Model folder.
            folds: Such as ["0"]; several are an ensemble, whose mean logits are taken, as nnU-Net does.
            identity: A name for these very weights; predictions of others are made anew.
            device: Where to predict.
            mirroring: Whether to average over mirrored images, along the axes that the model allows.

        Raises:
            UserError: If a checkpoint is missing, holds more than plain values, or its trainer cannot be found.
        """
        from nnunet_diffusion.installation import environment, ext_trainer_folders, with_our_trainers

        self.identity = identity
        folds = find_folds(folder, folds, CHECKPOINT)
        for fold in folds:
            load_checkpoint(os.path.join(folder, f"fold_{fold}", CHECKPOINT))  # says what is wrong with it
        on_cuda = device.type == "cuda"
        with trainers_of(with_our_trainers(ext_trainer_folders())), environment(PLAIN_VALUES_ONLY):
            self.predictor = nnUNetPredictor(
                use_mirroring=mirroring, device=device, perform_everything_on_device=on_cuda, allow_tqdm=False
            )
            self.predictor.initialize_from_trained_model_folder(folder, tuple(folds), CHECKPOINT)
        self.label_manager = self.predictor.label_manager

    @torch.inference_mode()
    def logits(self, image: torch.Tensor) -> tuple[torch.Tensor, list[np.ndarray]]:
        """Computes mean logits (C, X, Y, Z) of an image, on the CPU, and each model's labels if there are several."""
        total, members, models = None, [], self.predictor.list_of_parameters
        for weights in models:
            getattr(self.predictor.network, "_orig_mod", self.predictor.network).load_state_dict(weights)
            with contextlib.redirect_stdout(io.StringIO()):
                logits = self.predictor.predict_sliding_window_return_logits(image).cpu()
            if len(models) > 1:
                members.append(most_probable(logits, self.label_manager)[0].numpy())
            total = logits if total is None else total.add_(logits)
        return total.div_(len(models)), members


@torch.inference_mode()
def predict_case(teacher: Teacher, name: str, case: Case, folder: str, before: str, channels: Channels) -> None:
    """Predicts one case and saves it, unless this teacher did already.

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
    if is_predicted(folder, name, teacher.identity):
        return
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
    maps = np.stack([labels, np.round(confidence * LEVELS).astype(np.int16)])
    patch_size = teacher.predictor.configuration_manager.patch_size
    write_array(os.path.join(folder, name + ".b2nd"), maps, patch_size, json.dumps(about))


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
    """Loads a prediction with its maps.

    Raises:
        UserError: If the file is damaged.
    """
    path = os.path.join(folder, name + ".b2nd")
    maps, text = open_with_metadata(path)
    if maps.ndim != 4 or len(maps) != 2:
        raise UserError(f"{path}: is {maps.shape}, not a map of labels and one of confidence: {ANEW}")
    labels, confidence = maps[:]
    return Prediction(labels, confidence.astype(np.float32) / LEVELS, *_about(text, path))


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
