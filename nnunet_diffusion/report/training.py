"""What the report says about the data and the trainings."""

import os
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from nnunet_diffusion.evaluation.folders import annotations_of
from nnunet_diffusion.partial.annotations import Annotation, Channels, is_annotated
from nnunet_diffusion.report.charts import Chart, chart, draw_lines
from nnunet_diffusion.report.collect import Fold, Model, Results

Kinds = Mapping[str, Mapping[str, str]]  # case -> organ -> "annotated", "union" or "not"
BESIDE_LABELS = {
    "PseudoLabelTrainer": ", and pseudo labels of the pool",
    "PseudoLabelMeanTeacherTrainer": ", and pseudo labels of the pool",
    "DiffusionCoTrainingTrainer": ", and images of the pool",
    "DiffusionCoTrainingTwinTrainer": ", and images of the pool",
}


def annotation_kinds(results: Results, cases: Collection[str], dataset_json: str) -> Kinds:
    """Returns how each case annotates each organ; nothing, which is noted, if dataset.json's tables are faulty."""

    def read(_: str) -> Kinds:
        annotations, channels = annotations_of(cases, results.dataset_json)
        return {
            case: {organ: annotation_kind(organ, annotation, channels) for organ in results.organs}
            for case, annotation in annotations.items()
        }

    return results.attempt(dataset_json, read) or {}


def annotation_kind(organ: str, annotation: Annotation, channels: Channels) -> str:
    """Returns how a case annotates an organ: "annotated", "union" with others, or "not"."""
    if any(organ in union for union in annotation.unions):
        return "union"
    return "annotated" if is_annotated(organ, annotation, channels) else "not"


def organ_rows(results: Results, kinds: Kinds, cases: Collection[str]) -> list[list]:
    """Counts the cases that annotate each organ, in a union with others, and not; the last cell is a bar of shares."""
    rows = []
    for organ in results.organs:
        found = [kinds[case][organ] for case in cases if case in kinds]
        counts = [found.count(kind) for kind in ("annotated", "union", "not")]
        names = ("annotated", "in a union only", "not annotated")
        rows.append([organ, *counts, list(zip(names, counts, ("full", "union", "none"), strict=True))])
    return rows


def partly_annotated(kinds: Kinds, cases: Iterable[str]) -> int:
    """Counts the cases that do not annotate every organ."""
    return sum(any(kind != "annotated" for kind in kinds.get(case, {}).values()) for case in cases)


def training(results: Results, kinds: Kinds, model: Model) -> dict[str, Any]:
    """Describes a model: what its folds were trained on, how they started, what is missing, and the curves."""
    there = {fold.name for fold in model.folds}
    missing = [str(number) for number in range(len(results.splits)) if str(number) not in there]
    is_cross_validated = "all" not in there and len(missing) < len(results.splits)
    charts = curves(model)
    pictures = [] if charts else [(os.path.join(f.folder, "progress.png"), f.name) for f in model.folds]
    return {
        "model": model,
        "folds": [fold_row(results, kinds, model, fold) for fold in model.folds],
        "missing": missing if is_cross_validated else [],
        "transfers": transfers(model),
        "charts": charts,
        "pictures": [
            found for p, name in pictures if (found := results.picture(p, f"nnU-Net's curves of fold {name}"))
        ],
    }


def fold_row(results: Results, kinds: Kinds, model: Model, fold: Fold) -> list[str]:
    """Describes a fold: name, what it was trained on, what it started from, epochs, state."""
    epochs = max((len(values) for values in fold.curves.values()), default=0)
    state = "finished" if fold.is_finished else "not finished"
    start = model.settings.get("start") or "not recorded"
    if fold.transfer:
        timestep = fold.transfer["timestep"]  # None of what is no denoiser
        start = fold.transfer["source"] + ("" if timestep is None else f", folded at t* = {timestep}")
    elif fold.denoiser is not None or start == "scratch" or model.settings.get("scratch"):
        start = "random weights"
    return [fold.name, trained_on(results, kinds, model, fold), short(str(start)), str(epochs or "no log"), state]


def trained_on(results: Results, kinds: Kinds, model: Model, fold: Fold) -> str:
    """Describes the cases of a training."""
    if fold.denoiser is not None:
        return f"{fold.denoiser.get('images', '?')} images, {fold.denoiser.get('of_the_pool', '?')} of them of the pool"
    if fold.name.isdigit() and int(fold.name) >= len(results.splits):
        return "its split is not known"
    everything = list(results.dataset_json.get("dataset", ()))  # nnU-Net's other layout does not name its cases
    cases = results.splits[int(fold.name)]["train"] if fold.name.isdigit() else everything
    labeled = f"{len(cases)} labeled cases" if cases else "all labeled cases"
    if model.trainer in ("DenoisingDiffusionTrainer", "DiffusionTeacherTrainer"):
        return f"images of {labeled}, and the pool"
    if partial := partly_annotated(kinds, cases):
        rows = organ_rows(results, kinds, cases)
        labeled += f", {partial} for some labels only ({', '.join(f'{row[0]} in {row[1]}' for row in rows)})"
    return labeled + BESIDE_LABELS.get(model.trainer, "")


def transfers(model: Model) -> list[dict[str, Any]]:
    """Returns the folds' transfers, those that say the same once, with the names of their folds."""
    alike: dict[str, list[Fold]] = {}
    for fold in (fold for fold in model.folds if fold.transfer):
        alike.setdefault(repr({**fold.transfer, "source": ""}), []).append(fold)
    return [{**folds[0].transfer, "folds": ", ".join(fold.name for fold in folds)} for folds in alike.values()]


def curves(model: Model) -> list[Chart]:
    """Draws the losses and the online Dice of all folds, as far as they were logged."""
    names = {"train_loss": "training", "val_loss": "validation"}
    if any(fold.denoiser is not None for fold in model.folds) or model.trainer.startswith("Denoising"):
        names["val_loss"] = "held-out images"
    losses = {name: lines for key, name in names.items() if (lines := _lines(model, key))}
    charts = [chart("Loss, a line for each fold", 2.5, draw_lines, losses, "epoch", "loss")] if losses else []
    if dice := _lines(model, "pseudo_dice"):
        title, of = "Online Dice on validation patches", "mean over labels"
        charts.append(chart(title, 2.5, draw_lines, {of: dice}, "epoch", "Dice", (0, 1)))
    return charts


def _lines(model: Model, key: str) -> list[list[tuple[float, float]]]:
    found = [sorted(fold.curves.get(key, {}).items()) for fold in model.folds]
    return [[(epoch + 1, value) for epoch, value in line] for line in found if line]


def short(path: str) -> str:
    """Returns the end of a path: enough to recognize it, nothing of whose machine it was."""
    return "/".join(path.replace("\\", "/").split("/")[-3:])
