"""nnU-Net's validation figures, restricted to what was annotated: online counts and summary.json."""

import os
from collections.abc import Mapping

import numpy as np
import torch
from nnunetv2.evaluation.evaluate_predictions import label_or_region_to_key, load_summary_json
from nnunetv2.training.loss.dice import get_tp_fp_fn_tn
from nnunetv2.utilities.json_export import recursive_fix_for_json_export
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from torch import Tensor

from nnunet_diffusion.files import write_json
from nnunet_diffusion.partial.annotations import Annotation, Channels, annotated_mask
from nnunet_diffusion.tables import mean


def hard_counts(
    output: Tensor, target: Tensor, is_annotated: Tensor, label_manager: LabelManager
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Counts true positive, false positive and false negative voxels over the cases that annotate a label or region.

    Args:
        output: (B, C, X, Y[, Z]) logits.
        target: (B, 1, X, Y[, Z]) labels, or (B, R [+ 1], X, Y[, Z]) regions and the ignore mask.
        is_annotated: (B, C) bool.
        label_manager: Knows about regions and the ignore label.

    Returns:
        Three arrays, one value per foreground label or region.
    """
    axes = list(range(2, output.ndim))
    mask = None
    if label_manager.has_regions:
        predicted = (output > 0).long()
        if label_manager.ignore_label is not None:
            mask, target = 1 - target[:, -1:].float(), target[:, :-1]
    else:
        predicted = torch.zeros_like(output, dtype=torch.float32).scatter_(1, output.argmax(1, keepdim=True), 1)
        if label_manager.ignore_label is not None:
            is_known = target != label_manager.ignore_label
            mask, target = is_known.float(), torch.where(is_known, target, 0)
    counts = torch.stack(get_tp_fp_fn_tn(predicted, target, axes=axes, mask=mask)[:3])  # (3, B, C)
    counts = torch.where(is_annotated.to(counts.device), counts, 0).sum(1).cpu().numpy()
    tp, fp, fn = counts if label_manager.has_regions else counts[:, 1:]
    return tp, fp, fn


def restrict_summary(path: str, file_ending: str, annotations: Mapping[str, Annotation], channels: Channels) -> dict:
    """Rewrites nnU-Net's summary.json so that only annotated (case, label) pairs have figures and enter the means.

    A member of a union is no such pair: which voxels are its own is not known.

    Args:
        path: The summary.json, replaced.
        file_ending: Of the predictions that it names.
        annotations: From `read_annotations`.
        channels: The `output_channels`.

    Returns:
        The new summary; its `counted_pairs` says for each label how many cases annotate it, and how many of them have a
        Dice (nnU-Net has none where prediction and reference are both empty).
    """
    summary = load_summary_json(path)
    cases = summary["metric_per_case"]
    keys = [os.path.basename(entry["prediction_file"]).removesuffix(file_ending) for entry in cases]
    mask = annotated_mask(keys, annotations, channels)
    column = {values: channel for channel, values in enumerate(channels.values())}
    names = {values: name for name, values in channels.items()}
    counted = {}
    for label in list(summary["mean"]):
        values = frozenset([label] if np.isscalar(label) else label)
        known = mask[:, column[values]].tolist()
        for entry, is_known in zip(cases, known, strict=True):
            if not is_known:
                entry["metrics"][label] = {}
        figures = [entry["metrics"][label] for entry in cases if entry["metrics"][label]]
        keys = figures[0] if figures else summary["mean"][label]
        summary["mean"][label] = {key: mean(figure[key] for figure in figures) for key in keys}
        dice = [figure["Dice"] for figure in figures]
        counted[names[values]] = {"annotated": len(figures), "with_dice": int(np.isfinite(dice).sum())}
    foreground = [figures for label, figures in summary["mean"].items() if label != 0]
    summary["foreground_mean"] = {key: mean(figures[key] for figures in foreground) for key in foreground[0]}
    summary["counted_pairs"] = counted
    for part in (summary["mean"], summary["foreground_mean"]):
        recursive_fix_for_json_export(part)
    for part in (summary["mean"], *(entry["metrics"] for entry in cases)):
        for label in list(part):
            part[label_or_region_to_key(label)] = part.pop(label)
    write_json(path, summary)
    return summary
