"""Puts the report together."""

import os
from collections.abc import Mapping
from datetime import date

import numpy as np

from nnunet_diffusion import __version__
from nnunet_diffusion.report.collect import Model, Results, model_scores
from nnunet_diffusion.report.html import Html, element, join, page
from nnunet_diffusion.report.outcome import (
    benchmark_section,
    best_median_worst,
    cases_section,
    organ_mean,
    results_section,
    samples_section,
    seen,
)
from nnunet_diffusion.report.rounds import Round, rounds_section
from nnunet_diffusion.report.slices import Plane, case_planes, organ_colors
from nnunet_diffusion.report.training import data_section, organ_names, tile_list, training_section, warning

MOST_SLICES = 24  # a plane
BUDGET = 12_000_000  # bytes for all slices
BYTES_PER_SLICE = 10_000  # all layers, mean over the planes of an abdominal CT with 13 organs
Files = Mapping[str, Mapping]  # case -> {"images": [path], "label": path}


def build_report(
    results: Results, cases: Files, pool: list[str], references: str, is_ct: bool, rounds: Mapping[str, list[Round]]
) -> str:
    """The page.

    Args:
        results: From `collect`; what cannot be shown is added to its problems.
        cases: Files of the labelled cases, as far as they are there.
        pool: Names of the unlabelled cases.
        references: Folder of reference labels, named as nnU-Net names predictions.
        is_ct: Whether the first channel holds Hounsfield units.
        rounds: Of pseudo labels, by run.
    """
    labels = results.dataset_json["labels"]
    sections = {"Data": data_section(results, list(cases), pool), "Trainings": training_section(results)}
    sections["Results"] = results_section(results)
    shown = [model for model in results.models if any(model_scores(model).measures["DSC"].values())]
    most = int(np.clip(BUDGET / (BYTES_PER_SLICE * 9 * max(len(shown), 1)), 4, MOST_SLICES))
    for number, model in enumerate(shown):
        planes = model_planes(results, model, cases, references, is_ct, most)
        if planes:
            heading = "Cases" if len(shown) == 1 else f"Cases {number + 1}"
            sections[heading] = cases_section(model, model_scores(model), planes, organ_colors(labels), number)
    if rounds:
        sections["Rounds"] = rounds_section(results, rounds)
    if results.benchmarks:
        sections["Few and partial labels"] = benchmark_section(results)
    if any(fold.denoiser is not None for model in results.models for fold in model.folds):
        sections["Samples"] = samples_section(results)
    ids = {name: section.split('id="', 1)[1].split('"', 1)[0] for name, section in sections.items()}
    links = [element("li", element("a", name, href=f"#{target}")) for name, target in ids.items()]
    first = [warning("Not everything could be read", results.problems)] if results.problems else []
    version = f"nnunet_diffusion {__version__}, {date.today():%d %B %Y}. For research; not a medical device."
    body = join(
        element("header", element("h1", results.dataset), element("p", _subtitle(results)), class_="top"),
        element("nav", element("ul", *links), aria_label="Sections"),
        element("main", *first, _at_a_glance(results, cases, pool), *sections.values()),
        element("footer", version),
    )
    return page(f"{results.dataset}: report", body)


def model_planes(
    results: Results, model: Model, cases: Files, references: str, is_ct: bool, most: int
) -> dict[str, list[Plane]]:
    """The pictures of a model's best, median and worst case, of which image, reference and prediction are there."""
    ending, found = results.dataset_json["file_ending"], {}
    for case in best_median_worst(model_scores(model).measures["DSC"]):
        predictions = [os.path.join(fold.folder, "validation", case + ending) for fold in model.folds]
        prediction = next(filter(os.path.isfile, predictions), None)
        files = [cases.get(case, {}).get("images", [""])[0], os.path.join(references, case + ending), prediction or ""]
        absent = [what for what, file in zip(("image", "reference", "prediction"), files, strict=True)
                  if not os.path.isfile(file)]  # fmt: skip
        if absent:
            results.problems.append(f"{model.name}: case {case} is not shown, its {' and '.join(absent)} is not there")
            continue
        try:
            found[case] = case_planes(*files, results.dataset_json["labels"], is_ct, most)
        except (ValueError, RuntimeError) as error:
            results.problems.append(f"{model.name}: case {case} cannot be shown: {str(error).splitlines()[0][:200]}")
    return found


def _subtitle(results: Results) -> str:
    organs = organ_names(results.dataset_json)
    return f"{len(organs)} label{'s' * (len(organs) != 1)}: {', '.join(organs)}"


def _at_a_glance(results: Results, cases: Files, pool: list[str]) -> Html:
    best, score = None, float("nan")
    for model in results.models:
        mean = organ_mean(model_scores(model).measures["DSC"], organ_names(results.dataset_json))
        if not np.isnan(mean) and not mean <= score:
            best, score = model, mean
    trained = sum(fold.is_finished for model in results.models for fold in model.folds)
    begun = sum(len(model.folds) for model in results.models)
    tiles = {
        "scans": (len(cases) + len(pool), f"{len(cases)} labelled, {len(pool)} not"),
        "trainings": (trained, f"finished, of {begun} begun"),
        "highest validation DSC": (f"{score:.3f}", best.name + seen(best)) if best else ("–", "no validation yet"),
    }
    return element("section", element("h2", "At a glance"), tile_list(tiles), id="glance")
