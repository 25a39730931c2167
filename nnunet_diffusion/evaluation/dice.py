"""Dice per case and organ by nnU-Net's own rule, and a table of several arms beside each other."""

import os
import warnings
from collections.abc import Mapping

import numpy as np

from nnunet_diffusion.errors import UserError
from nnunet_diffusion.evaluation.summary import text_table
from nnunet_diffusion.evaluation.targets import organ_labels

RULE = "an organ that a case has in neither reference nor prediction is left out of the mean, as nnU-Net does"

Scores = dict[str, dict[str, float]]  # case -> organ -> Dice


def dice_scores(prediction_folder: str, references: Mapping[str, str], dataset_json: dict) -> Scores:
    """Dice of every reference's prediction, by `nnunetv2.evaluation.evaluate_predictions.compute_metrics`.

    Args:
        prediction_folder: Holds a file named after each case, as `nnUNetv2_predict` leaves it.
        references: Case -> file of its reference labels.
        dataset_json: nnU-Net's description of the data set: labels or regions, ignore label, file ending, reader.

    Returns:
        Case -> organ -> Dice in [0, 1]; NaN where neither reference nor prediction has the organ.

    Raises:
        UserError: If a prediction is missing or is not on its reference's voxels.
    """
    from nnunetv2.evaluation.evaluate_predictions import compute_metrics
    from nnunetv2.imageio.reader_writer_registry import determine_reader_writer_from_dataset_json

    organs = organ_labels(dataset_json)
    some_reference = next(iter(references.values()), None)
    reader = determine_reader_writer_from_dataset_json(dataset_json, some_reference, verbose=False)()
    scores = {}
    for case, reference in references.items():
        prediction = os.path.join(prediction_folder, case + dataset_json["file_ending"])
        if not os.path.isfile(prediction):
            raise UserError(f"{prediction}: no prediction for case {case}: run nnUNetv2_predict on its image first")
        shapes = [reader.read_seg(path)[0].shape for path in (reference, prediction)]
        if shapes[0] != shapes[1]:
            raise UserError(f"{prediction}: {shapes[1]} voxels, but its reference {reference} has {shapes[0]}")
        ignore = dataset_json["labels"].get("ignore")
        metrics = compute_metrics(reference, prediction, reader, list(organs.values()), ignore)["metrics"]
        scores[case] = {name: float(metrics[value]["Dice"]) for name, value in organs.items()}
    return scores


def organ_means(scores: Scores) -> dict[str, float]:
    """Mean Dice of each organ over the cases, NaN left out; an organ that no case has is NaN."""
    organs = list(next(iter(scores.values()), {}))
    return {organ: _mean([case[organ] for case in scores.values()]) for organ in organs}


def mean_dice(scores: Scores) -> float:
    """Mean over the organs of their means over the cases: every organ counts the same, however rare."""
    return _mean(list(organ_means(scores).values()))


def case_mean(scores: Scores, case: str) -> float:
    """Mean Dice over the organs of one case."""
    return _mean(list(scores[case].values()))


def dice_table(arms: Mapping[str, Scores]) -> str:
    """The arms beside each other, a line for each organ and the mean; with two arms, their difference as well."""
    means = {arm: organ_means(scores) | {"mean": mean_dice(scores)} for arm, scores in arms.items()}
    rows = list(next(iter(means.values())))
    cells = {arm: [_cell(mean[row]) for row in rows] for arm, mean in means.items()}
    if len(means) == 2:
        first, second = means.values()
        cells["difference"] = [_cell(second[row] - first[row], "+") for row in rows]
    return text_table({"Dice": rows} | cells)


def _cell(value: float, sign: str = "") -> str:
    return "-" if np.isnan(value) else f"{value:{sign}.3f}"


def _mean(values: list[float]) -> float:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of nothing but NaN, the mean is NaN
        return float(np.nanmean(values))
