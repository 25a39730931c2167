"""Puts the report together."""

import os
from collections.abc import Mapping
from datetime import date
from importlib.resources import files
from typing import Any

import numpy as np
from jinja2 import Environment, StrictUndefined
from matplotlib.colors import to_hex

from nnunet_diffusion import __version__
from nnunet_diffusion.names import safe_name
from nnunet_diffusion.preprocessing.scan_checks import read_geometry
from nnunet_diffusion.report.collect import Model, Results, model_scores
from nnunet_diffusion.report.outcome import (
    benchmark_view,
    best_median_worst,
    best_model,
    case_heading,
    comparison_row,
    samples_view,
    scores_view,
    validated_on,
    validation_title,
)
from nnunet_diffusion.report.rounds import Round, describe_run
from nnunet_diffusion.report.slices import Plane, case_planes, organ_colors
from nnunet_diffusion.report.training import annotation_kinds, organ_rows, partly_annotated, short, training
from nnunet_diffusion.tables import Scores

MOST_SLICES = 24  # a plane
BUDGET = 12_000_000  # bytes for all slices
BYTES_PER_SLICE = 10_000  # all layers, mean over the planes of an abdominal CT with 13 organs
Files = Mapping[str, Mapping]  # case -> {"images": [path], "label": path}


def build_report(
    results: Results, cases: Files, pool: list[str], raw: str, references: str, rounds: Mapping[str, list[Round]]
) -> str:
    """Builds the page.

    Args:
        results: From `collect`; what cannot be shown is added to its problems.
        cases: Files of the labeled cases, as far as they are there.
        pool: Names of the unlabeled cases.
        raw: The data set's folder in nnUNet_raw.
        references: Folder of reference labels, named as nnU-Net names predictions.
        rounds: Of pseudo labels, by run.
    """
    trained = [case for split in results.splits for case in (*split["train"], *split["val"])]
    kinds = annotation_kinds(results, {*cases, *trained}, os.path.join(raw, "dataset.json"))
    scores = {model.name: model_scores(model) for model in results.models}
    validated = [model for model in results.models if any(scores[model.name].measures["DSC"].values())]
    views = [(m.name + validated_on(m), validation_title(m), scores[m.name]) for m in validated]
    views += [(short(path), short(path), evaluated) for path, evaluated in results.evaluations.items()]
    most = int(np.clip(BUDGET / (BYTES_PER_SLICE * 9 * max(len(validated), 1)), 4, MOST_SLICES))
    dice = {model.name: scores[model.name].measures["DSC"] for model in validated}
    shown = [(model, model_cases(results, model, dice[model.name], cases, references, most)) for model in validated]
    context = {
        "results": results,
        "cases": cases,
        "partial": partly_annotated(kinds, cases),
        "pool": pool,
        "organs": organ_rows(results, kinds, cases) if kinds or not cases else [],
        "trainings": [training(results, kinds, model) for model in results.models],
        "best": best_model(results, scores),
        "comparison": [comparison_row(results.organs, name, s) for name, _, s in views] if len(views) > 1 else [],
        "scores": [scores_view(results.organs, title, s, results.dataset_json.get("sources")) for _, title, s in views],
        "shown": [(model, found) for model, found in shown if found],
        "colors": [(name, to_hex(color)) for name, color in organ_colors(results.dataset_json["labels"]).values()],
        "rounds": {name: describe_run(results, run) for name, run in rounds.items()},
        "benchmarks": [benchmark_view(name, content) for name, content in results.benchmarks.items()],
        "samples": [
            samples_view(results, m, fold) for m in results.models for fold in m.folds if fold.denoiser is not None
        ],
        "problems": results.problems,
        "version": f"nnunet_diffusion {__version__}, {date.today():%d %B %Y}",
    }
    return render(context)


def render(context: Mapping[str, Any]) -> str:
    """Fills the page's template, which escapes all text; styles and script are in the page."""
    folder = files("nnunet_diffusion.report")
    page, style, script = (folder.joinpath(f"page.{ending}").read_text("utf-8") for ending in ("html", "css", "js"))
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(page).render(context, style=style, script=script).lstrip()


def model_cases(
    results: Results, model: Model, scores: Scores, cases: Files, references: str, most: int
) -> list[tuple[tuple[str, str], str, list[Plane]]]:
    """Cuts a model's best, median and worst case, of which image, reference and prediction are there.

    Args:
        results: Gets the problems.
        model: Whose predictions are shown.
        scores: Its validation Dice.
        cases: Files of the labeled cases.
        references: Folder of reference labels.
        most: Slices a plane.
    """
    is_ct = next(iter(results.dataset_json["channel_names"].values())).lower() == "ct"
    ending, found = results.dataset_json["file_ending"], []
    for case, rank in best_median_worst(scores).items():
        predictions = (os.path.join(fold.folder, "validation", case + ending) for fold in model.folds)
        files = {
            "image": cases.get(case, {}).get("images", [""])[0],
            "reference": os.path.join(references, case + ending),
            "prediction": next(filter(os.path.isfile, predictions), ""),
        }
        if absent := [what for what, file in files.items() if not os.path.isfile(file)]:
            results.note(f"{model.name}: case {case} is not shown, its {' and '.join(absent)} is not there")
            continue

        def read(_: str, case=case, files=files) -> list[Plane]:
            safe_name(case, model.name)
            for file in files.values():
                read_geometry(file)  # refuses what image readers end the process for
            return case_planes(*files.values(), results.dataset_json["labels"], is_ct, most)

        if planes := results.attempt(f"{model.name}: case {case}", read):
            found.append((case_heading(case, rank, scores), case, planes))
    return found
