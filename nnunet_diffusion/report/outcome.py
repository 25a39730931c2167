"""Sections of the report about results: scores, cases, few labels, samples."""

import json
from collections.abc import Mapping, Sequence

import numpy as np

from nnunet_diffusion.report.charts import budget_chart, strip_chart
from nnunet_diffusion.report.collect import CASE_SCORES, Model, Results, Scores, evaluation_scores, model_scores
from nnunet_diffusion.report.html import Html, element, table
from nnunet_diffusion.report.slices import Plane
from nnunet_diffusion.report.training import organ_names, picture

Planes = Mapping[str, Sequence[Plane]]  # case -> its three planes


def case_mean(scores: CASE_SCORES, case: str) -> float:
    """Mean over the organs of one case; NaN if none counts."""
    return float(np.mean(list(scores[case].values()))) if scores[case] else float("nan")


def organ_mean(scores: CASE_SCORES, organs: Sequence[str]) -> float:
    """Mean over the organs of their means over the cases: every organ counts the same."""
    means = [np.mean(values) for organ in organs if (values := organ_values(scores, organ))]
    return float(np.mean(means)) if means else float("nan")


def organ_values(scores: CASE_SCORES, organ: str) -> list[float]:
    """The values of one organ in the cases where it counts."""
    return [organs[organ] for organs in scores.values() if organ in organs]


def best_median_worst(scores: CASE_SCORES) -> dict[str, str]:
    """Case -> "best", "median" or "worst" by mean Dice; fewer entries if there are fewer cases."""
    means = {case: mean for case in scores if not np.isnan(mean := case_mean(scores, case))}
    order = sorted(means, key=lambda case: (means[case], case))
    if not order:
        return {}
    chosen = {order[-1]: "best", order[(len(order) - 1) // 2]: "median", order[0]: "worst"}
    return dict(sorted(chosen.items(), key=lambda item: -means[item[0]]))


def seen(model: Model) -> str:
    """What must be said of validation scores: nnU-Net validates fold `all` on the cases that it trained on."""
    return " (cases that it was trained on)" if any(fold.name == "all" for fold in model.folds) else ""


def results_section(results: Results) -> Html:
    """DSC and NSD of every model and of every evaluation that was given, by organ."""
    parts = [element("h2", "Results")]
    found = {model.name: model_scores(model) for model in results.models}
    found = {name: scores for name, scores in found.items() if any(scores.measures["DSC"].values())}
    if len(found) > 1:
        parts.append(_comparison(results, found))
    for model in results.models:
        if scores := found.get(model.name):
            folds = [fold.name for fold in model.folds if fold.validation or fold.evaluations]
            title = f"{model.name}: validation cases of fold {', '.join(folds)}{seen(model)}"
            parts += _scores(results, title, scores)
    for path, content in results.evaluations.items():
        parts += _scores(results, path, evaluation_scores(content))
    if len(parts) == 1:
        parts.append(element("p", "Nothing was validated or evaluated yet.", class_="soft"))
    return element("section", *parts, id="results")


def _comparison(results: Results, found: Mapping[str, Scores]) -> Html:
    organs = organ_names(results.dataset_json)
    rows = []
    for name, scores in found.items():
        dsc = scores.measures["DSC"]
        means = [float(np.mean(values)) if (values := organ_values(dsc, organ)) else float("nan") for organ in organs]
        rows.append([name, str(len(dsc)), *map(_number, means), element("strong", _number(organ_mean(dsc, organs)))])
    caption = "Mean DSC of every model on its validation cases; where these differ, so may the figures"
    return table(caption, ["model", "cases", *organs, "mean"], rows)


def _scores(results: Results, title: str, scores: Scores) -> list[Html]:
    dsc = scores.measures["DSC"]
    found = dict.fromkeys(organ for organs in dsc.values() for organ in organs)
    organs = [organ for organ in organ_names(results.dataset_json) if organ in found] or list(found)
    head = ["label", "cases"] + [f"{measure} {what}" for measure in scores.measures for what in ("mean ± sd", "median")]
    rows = []
    for organ in organs:
        values = [organ_values(cases, organ) for cases in scores.measures.values()]
        rows.append([organ, str(len(values[0])), *(cell for each in values for cell in (_spread(each), _median(each)))])
    means = [cell for cases in scores.measures.values() for cell in (_number(organ_mean(cases, organs)), "")]
    rows.append([element("strong", cell) for cell in ["mean over labels", "", *means]])
    charts = [
        strip_chart(f"{measure} of {len(cases)} cases", {o: organ_values(cases, o) for o in organs}, measure)
        for measure, cases in scores.measures.items()
    ]
    by_label = table("By label; sd: standard deviation over the cases", head, rows)
    explained = f"{scores.source}. A dot is a case, the red bar the mean, the line one standard deviation to each side."
    return [
        element("h3", title),
        element("p", explained, class_="soft"),
        element("div", *charts, *([by_label] if len(charts) == 1 else []), class_="charts"),
        by_label if len(charts) > 1 else Html(""),
        _all_cases(scores, organs),
    ]


def _all_cases(scores: Scores, organs: Sequence[str]) -> Html:
    dsc = scores.measures["DSC"]
    order = sorted(dsc, key=lambda case: -np.nan_to_num(case_mean(dsc, case), nan=-1))
    rows = [[c, _number(case_mean(dsc, c)), *(_number(dsc[c].get(organ, np.nan)) for organ in organs)] for c in order]
    summary = element("summary", f"DSC of all {len(rows)} cases")
    return element("details", summary, table("DSC by case, best first", ["case", "mean", *organs], rows))


def cases_section(model: Model, scores: Scores, planes: Planes, colors: Mapping, number: int) -> Html:
    """The best, the median and the worst case of a model, to look at.

    Args:
        model: Whose predictions are shown.
        scores: Its validation scores.
        planes: Of the cases that can be shown.
        colors: Label value -> name and RGB.
        number: Of the section, for its name.
    """
    dsc = scores.measures["DSC"]
    boxes = [
        element("label", element("input", type="checkbox", checked=True, data_layer=layer), f" {text}")
        for layer, text in (("prediction", "prediction (filled)"), ("reference", "reference (outline)"))
    ]
    legend = []
    for name, color in colors.values():
        shade = "#" + "".join(f"{round(255 * c):02x}" for c in color)
        legend.append(element("span", element("span", class_="key", style=f"background:{shade}"), name))
    cases = [
        _case(f"{rank.capitalize()}: {case}, mean DSC {case_mean(dsc, case):.3f}", case, dsc[case], planes[case])
        for case, rank in best_median_worst(dsc).items()
        if case in planes
    ]
    return element(
        "section",
        element("h2", f"Cases of {model.trainer}"),
        element("p", f"{model.name}. Best, median and worst by mean DSC. The patient's right is on the left of axial "
                "and coronal pictures.", class_="soft"),
        element("div", *boxes, class_="controls"),
        element("div", *legend, class_="organs"),
        *cases,
        id=f"cases{number}",
    )  # fmt: skip


def _case(heading: str, case: str, dice: Mapping[str, float], planes: Sequence[Plane]) -> Html:
    said = ", ".join(f"{organ} {value:.2f}" for organ, value in dice.items())
    return element(
        "div",
        element("h3", heading),
        element("p", said, class_="soft"),
        element("div", *(_plane(case, plane) for plane in planes), class_="planes"),
        class_="case",
    )


def _plane(case: str, plane: Plane) -> Html:
    start, place = plane.start, f"{plane.positions[plane.start]} of {plane.total}"
    width, height = plane.size
    alt = f"{plane.name.capitalize()} slice {place} of {case} with the prediction filled and the reference outlined"
    images = [
        element("img", src=plane.layers[layer][start], alt=alt if layer == "scan" else "", class_=layer, width=width,
                height=height)
        for layer in ("scan", "prediction", "reference")
    ]  # fmt: skip
    sides = [element("span", side, class_=f"side {where}", aria_hidden="true")
             for side, where in zip(plane.sides, "lrtb", strict=True)]  # fmt: skip
    slider = element("input", type="range", min=0, max=len(plane.positions) - 1, value=start, step=1,
                     aria_label=f"{plane.name} slice of {case}")  # fmt: skip
    content = json.dumps({"positions": plane.positions, "total": plane.total, "layers": plane.layers})
    return element(
        "figure",
        element("div", *images, *sides, class_="stack"),
        element("label", plane.name.capitalize(), slider, element("output", place)),
        element("script", Html(content.replace("<", "\\u003c")), type="application/json"),
        class_="plane",
        style=f"flex:{width}",
    )


def benchmark_section(results: Results) -> Html:
    """Label efficiency and partial labels, as their benchmarks wrote them."""
    parts = [element("h2", "Few and partial labels")]
    for name, content in results.benchmarks.items():
        remark = f"{len(content['test_cases'])} test cases, which chose nothing; a dot is a seed, the line a standard "
        parts += [
            element("h3", name),
            element("p", remark + "deviation over the seeds to each side.", class_="soft"),
            budget_chart("Dice, mean over labels and test cases", content["summary"], content["runs"],
                         "labelled cases (or per cent, or slices)", "Dice"),
            table("By arm and budget", ["arm", "labels", "seeds", "Dice mean ± sd"], [
                [g["arm"], g["budget"], str(len(g.get("seeds", []))), _mean_sd(g["mean"], g["sd"])]
                for g in content["summary"]
            ]),
        ]  # fmt: skip
    return element("section", *parts, id="labels")


def samples_section(results: Results) -> Html:
    """What the denoisers draw, and how near to real images it was measured to be."""
    parts = [element("h2", "Samples of the denoiser")]
    for model in results.models:
        for fold in (fold for fold in model.folds if fold.denoiser is not None):
            name = f"{model.name}, fold {fold.name}"
            alt = f"Images drawn from the denoiser of {name}, below real ones where the sheet has any"
            parts += [element("h3", name), picture(results, fold.samples["picture"], alt)]
            for quality in fold.samples["qualities"]:
                rows = [[key, f"{value:.4g}"] for key, value in quality["values"].items()]
                numbers = f"{quality['samples']} samples, {quality['real']} real patches, {quality['k']} neighbours"
                caption = f"Features: {quality['features']}. {numbers}."
                parts.append(table(caption, ["figure", "value"], rows))
                parts += [element("p", warning, class_="warn") for warning in quality["warnings"]]
            if not fold.samples["qualities"]:
                hint = "Not measured: nnunet_diffusion sample, then nnunet_diffusion evaluate_samples."
                parts.append(element("p", hint, class_="soft"))
    return element("section", *parts, id="samples")


def _spread(values: list[float]) -> str:
    if not values:
        return "–"
    return _mean_sd(float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else None)


def _mean_sd(mean: float, sd: float | None) -> str:
    return f"{mean:.3f}" if sd is None else f"{mean:.3f} ± {sd:.3f}"


def _median(values: list[float]) -> str:
    return _number(float(np.median(values)) if values else float("nan"))


def _number(value: float) -> str:
    return "–" if np.isnan(value) else f"{value:.3f}"
