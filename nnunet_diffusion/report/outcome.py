"""What the report says about results: scores, cases, few labels, samples."""

import os
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from nnunet_diffusion.report.charts import chart, draw_budgets, draw_strips
from nnunet_diffusion.report.collect import Evaluated, Fold, Model, Results
from nnunet_diffusion.tables import Scores, defined, deviation, figure, mean, mean_over_organs, organ_means


def best_median_worst(scores: Scores) -> dict[str, str]:
    """Chooses cases by mean Dice: case -> "best", "median" or "worst"; fewer entries if there are fewer cases."""
    means = {case: mean(organs.values()) for case, organs in scores.items() if defined(organs.values())}
    order = sorted(means, key=lambda case: (means[case], case))
    if not order:
        return {}
    chosen = {order[-1]: "best", order[(len(order) - 1) // 2]: "median", order[0]: "worst"}
    return dict(sorted(chosen.items(), key=lambda item: -means[item[0]]))


def validated_on(model: Model) -> str:
    """Adds a warning to validation scores of fold `all`: nnU-Net validates it on the cases that it trained on."""
    return " (cases that it was trained on)" if any(fold.name == "all" for fold in model.folds) else ""


def validation_title(model: Model) -> str:
    """Returns the heading of a model's validation scores."""
    folds = ", ".join(fold.name for fold in model.folds if fold.validation or fold.evaluations)
    return f"{model.name}: validation cases of fold {folds}{validated_on(model)}"


def comparison_row(organs: Sequence[str], name: str, scores: Evaluated) -> list[str]:
    """Returns a line of the table of all models and evaluations: cases, mean DSC of each organ, and of all."""
    means = organ_means(scores.measures["DSC"])
    values = [means.get(organ) for organ in organs]
    return [name, str(len(scores.measures["DSC"])), *map(figure, values), figure(mean(values))]


def scores_view(
    organs: Sequence[str], title: str, scores: Evaluated, source_of: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Describes scores: charts of every case, tables by organ, by source if there are several, and by case, best first.

    Args:
        organs: Of the data set, in its order.
        title: Above them.
        scores: Of a model or an evaluation.
        source_of: {case: source}, of those that are joined from several.
    """
    dsc = scores.measures["DSC"]
    found = organ_means(dsc)
    organs = [organ for organ in organs if organ in found] or list(found)
    values = {measure: {organ: defined(case.get(organ) for case in cases.values()) for organ in organs}
              for measure, cases in scores.measures.items()}  # fmt: skip
    means, height = {case: mean(organs.values()) for case, organs in dsc.items()}, 0.7 + 0.27 * len(organs)
    order = sorted(dsc, key=lambda case: -means[case] if defined([means[case]]) else 1)
    return {
        "title": title,
        "source": scores.source,
        "measures": list(scores.measures),
        "charts": [chart(f"{m} of {len(dsc)} cases", height, draw_strips, rows, m) for m, rows in values.items()],
        "organs": organs,
        "rows": [[organ, len(values["DSC"][organ]), *_cells(values, organ)] for organ in organs],
        "sources": source_rows(organs, dsc, source_of or {}),
        "means": [figure(mean(map(mean, rows.values()))) for rows in values.values()],
        "cases": [[c, figure(means[c]), *(figure(dsc[c].get(organ)) for organ in organs)] for c in order],
    }


def source_rows(organs: Sequence[str], dsc: Scores, source_of: Mapping[str, str]) -> list[list[str]]:
    """Returns source, cases, mean DSC and that of each organ; nothing if all cases are of one source."""
    sources: dict[str, Scores] = {}
    for case in sorted(dsc):
        sources.setdefault(source_of.get(case, "-"), {})[case] = dsc[case]
    means = {source: organ_means(cases) for source, cases in sources.items()}
    rows = [[name, str(len(cases)), figure(mean_over_organs(cases)), *(figure(means[name].get(o)) for o in organs)]
            for name, cases in sorted(sources.items())]  # fmt: skip
    return rows if len(rows) > 1 else []


def _cells(values: Mapping[str, Mapping[str, list[float]]], organ: str) -> list[str]:
    found = [rows[organ] for rows in values.values()]
    return [cell for v in found for cell in (figure(mean(v), deviation(v)), figure(median(v)) if v else "-")]


def case_heading(case: str, rank: str, scores: Scores) -> tuple[str, str]:
    """Returns the heading of a case in the pictures, and its Dice by organ."""
    by_organ = ", ".join(f"{organ} {figure(value, digits=2)}" for organ, value in scores[case].items())
    return f"{rank.capitalize()}: {case}, mean DSC {figure(mean(scores[case].values()))}", by_organ


def benchmark_view(name: str, content: Mapping) -> dict[str, Any]:
    """Describes label efficiency or partial labels, as their benchmarks wrote them."""
    title, x_label = "Dice, mean over labels and test cases", "labeled cases (or per cent, or slices)"
    groups = content["summary"]
    height = 2.8 + 0.1 * len({group["arm"] for group in groups})
    drawn = chart(title, height, draw_budgets, groups, content["runs"], x_label, "Dice")
    rows = [[g["arm"], g["budget"], len(g.get("seeds", [])), figure(g["mean"], g["sd"])] for g in groups]
    return {"name": name, "cases": len(content["test_cases"]), "charts": [drawn], "rows": rows}


def samples_view(results: Results, model: Model, fold: Fold) -> dict[str, Any]:
    """Describes what a denoiser draws, and how near to real images it was measured to be."""
    name = f"{model.name}, fold {fold.name}"
    alt = f"Images drawn from the denoiser of {name}, below real ones where the sheet has any"
    sheets = (os.path.join(fold.folder, *parts) for parts in (("samples", "samples.png"), ("samples.png",)))
    found = [picture for path in sheets if (picture := results.picture(path, alt))]
    return {"name": name, "pictures": found[:1], "qualities": fold.qualities}


def best_model(results: Results, scores: Mapping[str, Evaluated]) -> tuple[str, str]:
    """Returns the highest mean DSC on validation cases, and whose it is."""
    means = {model.name: mean_over_organs(scores[model.name].measures["DSC"]) for model in results.models}
    known = [model for model in results.models if defined([means[model.name]])]
    if not known:
        return "-", "no validation yet"
    best = max(known, key=lambda model: means[model.name])
    return figure(means[best.name]), best.name + validated_on(best)
